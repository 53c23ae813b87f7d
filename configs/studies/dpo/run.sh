#!/bin/sh
# Molecules before and after preference training: a short pre-training without the held-out molecules, then DPO, then
# held-out pairs and sampled molecules of both. Finished runs are skipped. About ten minutes on one core.
#   sh configs/studies/dpo/run.sh [folder of the runs, default runs/dpo]
set -eu
here=$(dirname "$0")
out=${1:-runs/dpo}
command=${LIT_INTERNS1:-lit-interns1}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1

train() {  # name, configs and options: one run
    run="$out/$1"
    shift
    [ -f "$run/finished" ] && return
    rm -rf "$run"
    $command fit "$@" --run_dir "$run"
    touch "$run/finished"
}

mkdir -p "$out"
[ -f "$out/molecules.txt" ] || $python "$here/molecules.py" "$out/molecules.txt"
source="{path: $out/molecules.txt, name: molecules, lines: true, prefix: <SMILES>, suffix: </SMILES>}"
train pretrain --config "$here/../../pretrain/tiny.yaml" --config "$here/pretrain.yaml" --data.sources "[$source]"
train dpo --config "$here/../../preference/molecules.yaml" \
    --model.init_weights "$out/pretrain/checkpoints/last.ckpt"
$python "$here/evaluate.py" "$out" 500
