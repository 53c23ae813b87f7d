#!/bin/sh
# Constant batch sizes, the law that they give, and the schedule of that law at equal tokens. Finished runs are skipped,
# unfinished ones continued.
#   configs/studies/batch_size/run.sh [folder of the runs, default runs/batch_size] [further options of fit]
set -eu
here=$(dirname "$0")
out=${1:-runs/batch_size}
[ $# -gt 0 ] && shift
command=${LIT_INTERNS1:-lit-interns1}

train() {
    name=$1
    shift
    run="$out/$name"
    [ -f "$run/finished" ] && return
    resume=
    if [ -e "$run/checkpoints/last.ckpt" ]; then
        resume="--ckpt_path last"
    else
        rm -rf "$run"
    fi
    # shellcheck disable=SC2086
    $command fit --config "$here/base.yaml" "$@" --run_dir "$run" $resume
    touch "$run/finished"
}

runs=
for rows in 8 16 32 64 128 256; do
    # as few passes as memory allows: the arithmetic of a step is the same, and it is sooner done
    train "b$rows" "$@" --data.global_batch_size "$rows" --data.micro_batch_size "$((rows < 64 ? rows : 64))"
    runs="$runs $out/b$rows"
done
# shellcheck disable=SC2086
# losses down to where the curves have crossed
$command batch-size-law $runs --out "$out/law" --targets 5.5 5.2 5.0 4.9 4.8 4.7 4.65 4.6 4.55 4.52 4.49
train schedule --config "$here/schedule.yaml" "$@" --data.global_batch_size 8 \
    --trainer.callbacks.schedule.artefact "$out/law/law.json"
# shellcheck disable=SC2086
$command report "$out/schedule" --compare $runs
