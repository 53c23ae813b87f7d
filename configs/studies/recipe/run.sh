#!/bin/sh
# A recipe for the model and budget of the mixing study, from a short search of the rate and the study's own runs, and runs
# of it beside the study's default config at equal tokens. Needs configs/studies/mixing/run.sh to have run. Finished parts
# are skipped.
#   sh configs/studies/recipe/run.sh [folder, default runs/recipe] [folder of the mixing study, default runs/mixing]
set -eu
here=$(dirname "$0")
base="$here/../mixing/base.yaml"
out=${1:-runs/recipe}
mixing=${2:-runs/mixing}
command=${LIT_INTERNS1:-lit-interns1}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ ! -f "$out/search/lr_search.json" ]; then
    rm -rf "$out/search"
    $command lr-search --config "$base" --rates "[0.0025,0.005,0.01,0.02]" --tokens "[75000,150000,300000]" \
        --run_dir "$out/search"
fi
# the annealing law is fitted to runs of one mixture
[ -f "$out/mixing/mixing_law.json" ] || $command mixing-law "$mixing"/sevenths-* --out "$out/mixing"
[ -d "$out/plan" ] || $command recipe --config "$base" --rates "$out/search" --mixture "$out/mixing" \
    --annealing "$mixing/default-1" "$mixing/default-2" "$mixing/default-3" --out "$out/plan"
for seed in 1 2 3; do
    [ -f "$out/proposed-$seed/finished" ] && continue
    rm -rf "$out/proposed-$seed"
    $command fit --config "$out/plan/config.yaml" --model.seed "$seed" --run_dir "$out/proposed-$seed"
    touch "$out/proposed-$seed/finished"
done
$command report "$out/proposed-1" --compare "$mixing/default-1"
