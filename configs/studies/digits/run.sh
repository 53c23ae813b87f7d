#!/bin/sh
# Which digit is this? A small whole model, trained from scratch on 4,000 digits, against logistic regression on pixels;
# both are scored on the same 1,000 digits. Needs scikit-learn (the extra `dev`).
#   sh configs/studies/digits/run.sh [folder of the run, default runs/digits]
set -eu
here=$(dirname "$0")
run=${1:-runs/digits}
command=${LIT_INTERNS1:-lit-interns1}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ -d "$run" ] || $command fit --config "$here/../../multimodal/digits.yaml" --run_dir "$run"
"${PYTHON:-python}" "$here/compare.py" "$run"
