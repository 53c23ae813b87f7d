#!/bin/sh
# AdamW, Muon and Mousse (two-sided and one-sided) on two sizes: for each of them the best learning rate by lr-search, in runs
# that decay as the real ones do; then runs with that rate and several seeds. Finished searches and runs are skipped.
#   sh configs/studies/optimizers/run.sh [folder, default runs/optimizers] [sizes] [seeds, "1 2 3"] [optimizers]
set -eu
here=$(dirname "$0")
out=${1:-runs/optimizers}
sizes=${2:-"small large"}
seeds=${3:-"1 2 3"}
arms=${4:-"adamw muon mousse mousse-one-sided"}
command=${LIT_INTERNS1:-lit-interns1}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1

optimizer() {  # arm, rate: the options; what is clipped is what AdamW updates
    common="lr: $2, weight_decay: 0.1, elementwise_clip: 1.0"
    case $1 in
        adamw) echo "{class_path: torch.optim.AdamW, init_args: {lr: $2, betas: [0.9, 0.95], weight_decay: 0.1, fused: true}}" ;;
        muon) echo "{class_path: lit_interns1.optim.Muon, init_args: {$common}}" ;;
        mousse) echo "{class_path: lit_interns1.optim.Mousse, init_args: {$common, side: both}}" ;;
        mousse-one-sided) echo "{class_path: lit_interns1.optim.Mousse, init_args: {$common, side: smaller}}" ;;
    esac
}

clip() {  # arm: norm of all gradients to which the Trainer clips
    [ "$1" = adamw ] && echo 1.0 || echo null
}

best() {  # search: the rate
    "$python" -c "import json, sys; print('%.3g' % json.load(open(sys.argv[1] + '/lr_search.json'))['best'][-1]['rate'])" "$1"
}

search() {  # size, arm, configs: small ones around 0.006, large ones around what was best for the small model, half as long
    run="$out/search-$1-$2"
    [ -f "$run/lr_search.json" ] && return
    rm -rf "$run"
    if [ "$1" = small ]; then
        tokens=409600 around=0.006
    else
        tokens=153600 around=$(best "$out/search-small-$2")
    fi
    rates=$("$python" -c "import sys; r = float(sys.argv[1]); print(f'[{r / 2:.3g},{r:.3g},{r * 2:.3g}]')" "$around")
    # shellcheck disable=SC2086
    $command lr-search $3 --model.seed 10 --data.seed 10 --model.optimizer "$(optimizer "$2" "$around")" \
        --trainer.gradient_clip_val "$(clip "$2")" --clock.max_tokens "$tokens" --rates "$rates" --tokens "$tokens" \
        --schedule run --window 0.1 --num_points 3 --run_dir "$run"
}

train() {  # size, arm, seed, configs
    run="$out/$1-$2-$3"
    [ -f "$run/finished" ] && return
    rm -rf "$run"
    # shellcheck disable=SC2086
    $command fit $4 --model.seed "$3" --data.seed "$3" --trainer.gradient_clip_val "$(clip "$2")" \
        --model.optimizer "$(optimizer "$2" "$(best "$out/search-$1-$2")")" --run_dir "$run"
    touch "$run/finished"
}

for size in $sizes; do
    configs="--config $here/small.yaml"
    [ "$size" = large ] && configs="$configs --config $here/large.yaml"
    for arm in $arms; do
        search "$size" "$arm" "$configs"
    done
    for seed in $seeds; do
        for arm in $arms; do
            train "$size" "$arm" "$seed" "$configs"
        done
    done
done
