#!/bin/sh
# Do token weights predict what a model can do better than the mean loss, on data recipes that the fit has not seen?
# 4 recipes × 2 sizes × 5 checkpoints = 40 checkpoints. Finished runs, records and scores are kept: start it again to go on.
#   sh configs/studies/salience/run.sh [directory of the runs]
set -eu
here=$(dirname "$0")
runs=${1:-runs/salience-study}
program=${LIT_INTERNS1:-lit-interns1}

sources() {  # rows of English, molecules and code
    echo "[{path: 'bundled:shakespeare', name: english, weight: $1}," \
        "{path: 'bundled:molecules', name: molecules, weight: $2, prefix: '<SMILES>', suffix: '</SMILES>'}," \
        "{path: 'bundled:python-stdlib', name: code, weight: $3}]"
}

study() {  # recipe, rows, layers: one run, its records and its scores
    run=$runs/$1-$3
    if [ ! -e "$run/finished" ]; then
        rm -rf "$run"
        # shellcheck disable=SC2086
        $program fit --config "$here/model.yaml" --run_dir "$run" --model.config.num_layers "$3" \
            --data.sources "$(sources $2)"
        touch "$run/finished"
    fi
    $program salience record --run_dir "$run" --ckpt 'step*.ckpt' --recipe "$1"
    $program salience score --run_dir "$run" --ckpt 'step*.ckpt'
}

export OMP_NUM_THREADS=1  # the two sizes run side by side
for recipe in english:6:1:1 molecules:1:6:1 code:1:1:6 even:1:1:1; do
    name=${recipe%%:*}
    rows=$(echo "${recipe#*:}" | tr ':' ' ')
    study "$name" "$rows" 1 &
    small=$!
    study "$name" "$rows" 3
    wait $small
done
$program salience fit --losses "$runs" --output "$runs/fit"
