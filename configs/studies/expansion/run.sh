#!/bin/sh
# A sparse model of 16 experts is trained, and goes on in four ways at equal tokens: as it is; with 64 experts, assigned in
# groups or by former ranks; and with 64 new experts and everything else new. Finished runs are skipped.
#   sh configs/studies/expansion/run.sh [folder of the runs, default runs/expansion] [seeds, default "1 2"]
set -eu
here=$(dirname "$0")
out=${1:-runs/expansion}
seeds=${2:-"1 2"}
command=${LIT_INTERNS1:-lit-interns1}
larger="--model.config.moe.num_experts 64 --model.config.moe.router grouped --model.config.moe.num_groups 8"
export OMP_NUM_THREADS=1

train() {  # name, configs and options: one run, and the validation before its first step
    run="$out/$1"
    shift
    [ -f "$run/finished" ] && return
    rm -rf "$run"
    $command validate "$@" | tee "$run-before.txt"
    $command fit "$@" --run_dir "$run"
    touch "$run/finished"
}

for seed in $seeds; do
    base="--config $here/base.yaml --model.seed $seed --data.seed $seed"
    further="--config $here/base.yaml --config $here/continue.yaml --model.seed $seed --data.seed $seed"
    weights="$out/weights-$seed"
    # shellcheck disable=SC2086
    train "base-$seed" $base
    if [ ! -f "$weights/finished" ]; then
        rm -rf "$weights"
        mkdir -p "$weights"
        trained="$out/base-$seed/checkpoints/last.ckpt"
        $command export --ckpt "$trained" --out "$weights/same"
        for method in grouped ranked; do
            # the same gradient of the router in all runs, so that they differ in the assignment only
            $command expand --from "$trained" --out "$weights/$method" --experts 64 --groups 8 --method "$method" \
                --seed "$seed" --router_gradient topk
        done
        touch "$weights/finished"
    fi
    # shellcheck disable=SC2086
    {
        train "same-$seed" $further --model.init_weights "$weights/same"
        train "grouped-$seed" $further $larger --model.init_weights "$weights/grouped"
        train "ranked-$seed" $further $larger --model.init_weights "$weights/ranked"
        train "scratch-$seed" $further $larger
    }
done
