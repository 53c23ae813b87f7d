"""Accuracy of a run of `digits.yaml` or `signals.yaml` against a logistic regression on the raw numbers.

accuracy p of n:  standard error √(p(1 − p)/n);   a difference has the root of the sum of both squared

python configs/studies/digits/compare.py RUN_DIRECTORY [digits | vowels]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lit_interns1.data.bundled_conversations import labelled_arrays


def table(path: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, numbers) and (n,) labels; shorter signals are filled with zeros."""
    values, labels = labelled_arrays(path)
    flat = [np.pad(value, ((0, length - len(value)), (0, 0))).ravel().astype(float) for value in values]
    return np.stack(flat), labels


def logistic_regression(name: str) -> tuple[float, int]:
    """Accuracy on the test set, and its size; the penalty is chosen by cross-validation on the training set."""
    longest = max(len(value) for part in ("train", "test") for value in labelled_arrays(f"bundled:{name}/{part}")[0])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=400, tol=1e-3))
    search = GridSearchCV(model, {"logisticregression__C": np.logspace(-4, 0, 5)}, cv=5)
    search.fit(*table(f"bundled:{name}/train", longest))
    values, labels = table(f"bundled:{name}/test", longest)
    return float(search.score(values, labels)), len(labels)


def last_accuracy(run: Path) -> float:
    """The last `val/accuracy` of a run."""
    with (run / "metrics" / "metrics.csv").open() as stream:
        found = [row["val/accuracy"] for row in csv.DictReader(stream) if row.get("val/accuracy")]
    return float(found[-1])


def main() -> None:
    """Prints both accuracies and their difference in standard errors."""
    run, name = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "digits"
    theirs, count = logistic_regression(name)
    ours = last_accuracy(run)
    ours_error, theirs_error = (np.sqrt(p * (1 - p) / count) for p in (ours, theirs))
    print(f"model                {ours:.4f} ± {ours_error:.4f}")
    print(f"logistic regression  {theirs:.4f} ± {theirs_error:.4f}")
    print(f"difference           {ours - theirs:+.4f} = {(ours - theirs) / np.hypot(ours_error, theirs_error):.1f} "
          f"standard errors ({count} test examples)")  # fmt: skip


if __name__ == "__main__":
    main()
