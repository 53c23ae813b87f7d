#!/bin/sh
# Mixtures of three sources, their mixing law, its prediction for mixtures that it has not seen, and the best mixtures that
# it names beside the default one, at equal tokens. Finished runs are skipped, unfinished ones continued.
#   configs/studies/mixing/run.sh [folder of the runs, default runs/mixing] [further options of fit]
set -eu
here=$(dirname "$0")
out=${1:-runs/mixing}
[ $# -gt 0 ] && shift
command=${LIT_INTERNS1:-lit-interns1}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

train() {  # name, seed of the weights, weights of english, molecules and code, options
    run="$out/$1"
    [ -f "$run/finished" ] && return
    seed=$2
    sources="[{path: 'bundled:shakespeare', name: english, weight: $3},
        {path: 'bundled:molecules', name: molecules, weight: $4, prefix: '<SMILES>', suffix: '</SMILES>'},
        {path: 'bundled:python-stdlib', name: code, weight: $5}]"
    shift 5
    resume=
    if [ -e "$run/checkpoints/last.ckpt" ]; then
        resume="--ckpt_path last"
    else
        rm -rf "$run"
    fi
    # shellcheck disable=SC2086
    $command fit --config "$here/base.yaml" --model.seed "$seed" --data.sources "$sources" "$@" --run_dir "$run" $resume
    touch "$run/finished"
}

mixing_law() {  # name, purpose, held-out runs: weights and a reference as the purpose says
    [ -f "$out/$1/mixing_law.json" ] && return
    name=$1
    weights=
    [ "$2" = default ] && weights="--weights english=0.45 molecules=0.25 code=0.30"
    shift 2
    rm -rf "${out:?}/$name"
    [ $# -gt 0 ] && set -- --held_out "$@"
    # shellcheck disable=SC2086
    $command mixing-law $runs "$@" $weights --floors english=0.0625 molecules=0.0625 code=0.0625 \
        --reference english=0.45 molecules=0.25 code=0.30 --out "$out/$name"
}

share() {  # purpose: the best weights of english, molecules and code
    "${PYTHON:-python}" -c "import json, sys; best = json.load(open(sys.argv[1]))['best']['proportions']
print(*(round(best[name], 4) for name in ('english', 'molecules', 'code')))" "$out/law-$1/mixing_law.json"
}

# all mixtures in sevenths but two, each run with a seed of its own
runs=
seed=10
for english in 1 2 3 4 5; do
    for molecules in 1 2 3 4 5; do
        code=$((7 - english - molecules))
        [ "$code" -lt 1 ] && continue
        seed=$((seed + 1))
        case $english-$molecules in 2-3 | 3-2) continue ;; esac
        train "sevenths-$english-$molecules-$code" "$seed" "$english" "$molecules" "$code" "$@"
        runs="$runs $out/sevenths-$english-$molecules-$code"
    done
done
for purpose in equal default; do
    mixing_law "law-$purpose" "$purpose"
done

# what the law has not seen: the mixtures that it holds to be best for two purposes, the default one, and others
for seed in 1 2 3; do
    train "default-$seed" "$seed" 0.45 0.25 0.30 "$@"
    for purpose in equal default; do
        # shellcheck disable=SC2046
        train "best-$purpose-$seed" "$seed" $(share "$purpose") "$@"
    done
done
train sevenths-2-3-2 18 2 3 2 "$@"
train sevenths-3-2-2 21 3 2 2 "$@"
train more-english 31 0.60 0.20 0.20 "$@"
for purpose in equal default; do
    mixing_law "result-$purpose" "$purpose" \
        "$out"/default-? "$out/sevenths-2-3-2" "$out/sevenths-3-2-2" "$out/more-english" "$out"/best-*
done
