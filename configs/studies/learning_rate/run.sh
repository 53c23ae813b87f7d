#!/bin/sh
# The best learning rate of two sizes at three horizons each, their joint law, and its prediction for a longer run of the
# larger model beside what a search of that run finds. Finished searches are skipped.
#   configs/studies/learning_rate/run.sh [folder of the runs, default runs/learning_rate] [further options of lr-search]
set -eu
here=$(dirname "$0")
out=${1:-runs/learning_rate}
[ $# -gt 0 ] && shift
command=${LIT_INTERNS1:-lit-interns1}

search() {
    run="$out/$1"
    shift
    [ -f "$run/lr_search.json" ] && return
    rm -rf "$run"
    # shellcheck disable=SC2086
    $command lr-search --config "$here/base.yaml" "$@" --run_dir "$run"
}

search small "$@" --rates "[0.002,0.004,0.008,0.016,0.032]" --tokens "[100000,200000,400000]"
search large --config "$here/size.yaml" "$@" --rates "[0.002,0.004,0.008,0.016,0.032]" --tokens "[100000,200000,400000]"
search long --config "$here/size.yaml" "$@" --rates "[0.002,0.004,0.008,0.016]" --tokens 1200000
$command lr-search --law "$out/small" "$out/large" --target "$out/long"
