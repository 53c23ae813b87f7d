#!/usr/bin/env bash
# Three objectives, three seeds, on sums; then noise in the engine, with and without replay and correction.
#   configs/studies/reinforcement/run.sh runs/reinforcement
# About 70 minutes of one thread; runs that are there already are kept.
set -euo pipefail
out=${1:?name a directory for the runs}
here=$(dirname "$0")
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-offline}
fit() { # name, options: one run, unless it is there
  local name=$1
  shift
  [ -e "$out/$name/checkpoints/last.ckpt" ] || lit-interns1 fit "$@" --run_dir "$out/$name"
}
fit warm-up --config configs/rl/chain-sum-warm-up.yaml
policy() { # name, seed, options
  local name=$1 seed=$2
  shift 2
  fit "$name-$seed" --config configs/rl/chain-sum.yaml --model.init_weights "$out/warm-up/checkpoints/last.ckpt" \
    --seed_everything "$seed" --data.seed "$seed" "$@"
}
for seed in 1 2 3; do
  policy rloo $seed
  policy oreal $seed --model.objective OREAL --model.objective.credit none --model.objective.kl_coef 0
  policy pro $seed --model.objective InternS1Pro
done
python "$here/measure.py" before="$out/warm-up/checkpoints/last.ckpt" $(
  for name in rloo oreal pro; do for seed in 1 2 3; do
    echo "$name-$seed=$out/$name-$seed/checkpoints/last.ckpt"
  done; done
)

noisy() { # noise, steps, name, options: four updates on each rollout batch of an engine whose routers are noisy
  local noise=$1 steps=$2 name=$3
  shift 3
  policy "noise-$noise-$name" 1 --model.engine.router_noise "$noise" --data.updates_per_rollout 4 \
    --data.samples_per_micro_batch 128 --trainer.max_steps "$steps" --trainer.val_check_interval "$steps" "$@"
}
correction="--model.correction RolloutCorrection --model.correction.mode mask --model.correction.low 0.5
  --model.correction.high 5"
for noise in "0.5 160" "2.0 240"; do
  noisy $noise none --model.replay none
  noisy $noise correction --model.replay none $correction
  noisy $noise replay --model.replay r3
  noisy $noise both --model.replay r3 $correction
done
python "$here/figure.py" "$out" "$out/reinforcement.png"
python "$here/measure.py" before="$out/warm-up/checkpoints/last.ckpt" $(
  for noise in 0.5 2.0; do for name in none correction replay both; do
    echo "noise-$noise-$name=$out/noise-$noise-$name-1/checkpoints/last.ckpt"
  done; done
)
