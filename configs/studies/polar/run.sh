#!/bin/sh
# POLAR's pre-training in small. Policies are a small language model after 40 thousand and after 400 thousand tokens, each
# at three temperatures. A reward model that starts from the later one learns who wrote what, and is tried on prompts that
# it has not seen, and on policies (other temperatures) that it has not seen. Finished parts are skipped.
#   sh configs/studies/polar/run.sh [folder of the runs, default runs/polar]
set -eu
here=$(dirname "$0")
out=${1:-runs/polar}
command=${LIT_INTERNS1:-lit-interns1}
python=${PYTHON:-python}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$out"

train() {  # name, configs and options
    run="$out/$1"
    shift
    [ -f "$run/finished" ] && return
    rm -rf "$run"
    $command fit "$@" --run_dir "$run"
    touch "$run/finished"
}

sample() {  # file, options
    file="$out/$1.jsonl"
    shift
    [ -f "$file" ] && return
    "$python" "$here/sample.py" "$file.part" --policies "early:$out/early/checkpoints/last.ckpt" \
        "late:$out/late/checkpoints/last.ckpt" "$@"
    mv "$file.part" "$file"
}

train early --config "$here/language-model.yaml" --clock.max_tokens 40000
train late --config "$here/language-model.yaml"
sample train --prompts 600
sample held-out --prompts 200 --held_out
sample held-out-policies --prompts 200 --held_out --temperatures 0.65 0.95
# in brackets: without them the command line would read the file as a list
train reward --config "$here/../../reward/polar.yaml" --model.init_weights "$out/late/checkpoints/last.ckpt" \
    --data.sources "[$out/train.jsonl]" --data.validation_sources "[$out/held-out.jsonl]" --data.validation_rows 24
"$python" "$here/evaluate.py" "$out/reward/checkpoints/last.ckpt" "$out/held-out.jsonl" "$out/held-out-policies.jsonl"
