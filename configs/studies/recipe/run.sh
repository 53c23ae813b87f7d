#!/bin/sh
# Searches at two small sizes on the data of tiny.yaml, the recipe that they and other studies give for it, and a run of
# the recipe beside the default config at equal tokens. Finished parts are skipped.
#   sh configs/studies/recipe/run.sh [folder, default runs/recipe] [further options of recipe, such as --mixture LAW]
set -eu
here=$(dirname "$0")
base="$here/../../pretrain/tiny.yaml"
out=${1:-runs/recipe}
[ $# -gt 0 ] && shift
command=${LIT_INTERNS1:-lit-interns1}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

search() {  # name, options
    run="$out/$1"
    shift
    [ -f "$run/lr_search.json" ] && return
    rm -rf "$run"
    $command lr-search --config "$base" "$@" --run_dir "$run"
}

train() {  # name, config
    run="$out/$1"
    [ -f "$run/finished" ] && return
    rm -rf "$run"
    $command fit --config "$2" --run_dir "$run"
    touch "$run/finished"
}

rates="[0.002,0.004,0.008,0.016]"
search small --config "$here/small.yaml" --rates "$rates" --tokens "[100000,200000,400000]"
search medium --config "$here/medium.yaml" --rates "$rates" --tokens "[100000,200000,400000]"
[ -d "$out/plan" ] || $command recipe --config "$base" --rates "$out/small" "$out/medium" --out "$out/plan" "$@"
train default "$base"
train proposed "$out/plan/config.yaml"
$command report "$out/proposed" --compare "$out/default"
