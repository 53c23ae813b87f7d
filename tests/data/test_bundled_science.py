"""The bundled science pictures and molecule questions: sizes, labels, answers, and no overlap of training and test."""

import re
from collections import Counter

import numpy as np
import pytest

from lit_interns1.data import molecule_questions
from lit_interns1.data.bundled_conversations import bundled_record, labelled_arrays
from lit_interns1.data.conversations import ConversationSource
from lit_interns1.data.molecule_questions import QUESTIONS, molecule_question
from lit_interns1.data.smiles import Molecule

PICTURE_MEANS = {
    "astronomy": (18.6, 19.8, 19.1),
    "microscopy": (68.0, 68.0, 68.0),
    "grass": (118.2, 118.2, 118.2),
    "gravel": (126.5, 126.5, 126.5),
    "brick wall": (111.5, 111.5, 111.5),
}
"""Mean red, green and blue of the whole pictures, read from their files."""


def pictures(part):
    records = [bundled_record(f"bundled:science-pictures/{part}", i)["messages"] for i in range(SIZES[part])]
    images = np.stack([asked["content"][0]["image"] for asked, _ in records])
    return images, np.array([answered["content"] for _, answered in records])


SIZES = {"train": 1152, "test": 288}


@pytest.mark.parametrize("part", SIZES)
def test_pictures_and_labels(part):
    images, labels = pictures(part)
    assert len(ConversationSource(f"bundled:science-pictures/{part}").open()) == len(images)
    assert images.shape[1:] == (32, 32, 3)
    assert images.dtype == np.uint8
    assert set(Counter(labels.tolist()).values()) == {len(images) // 6}
    assert np.array_equal(np.stack(labelled_arrays(f"bundled:science-pictures/{part}")[0]), images)
    for name, mean in PICTURE_MEANS.items():
        found = images[labels == name].mean(axis=(0, 1, 2))
        lowered = np.array(mean) - 3.5  # by the three bits that are not kept
        assert np.abs(found - lowered).max() < 2.5, (name, found)
    red, green, blue = images[labels == "eye fundus"].mean(axis=(1, 2)).T
    assert (red > green + 20).all()
    assert (red > blue + 60).all()
    wall = images[labels == "brick wall"][..., 0].astype(float)
    across, down = (np.abs(np.diff(wall, axis=axis)).mean() for axis in (2, 1))
    assert across / down == pytest.approx(2.45, abs=0.3)  # of the whole picture: its courses stand upright
    grey = np.isin(labels, ["microscopy", "grass", "gravel", "brick wall"])
    assert np.array_equal((images == images[..., :1]).all(axis=(1, 2, 3)), grey)


def test_training_and_test_pictures_share_no_region():
    """No window of 12 × 12 pixels of a test picture occurs in a training picture, wherever; flat windows left out."""
    weights = np.random.default_rng(0).integers(1, 2**40, size=(2, 12))

    def windows(images):
        green = images[..., 1].astype(np.int64)
        inner = sum(weights[0, j] * green[:, :, j : j + 21] for j in range(12))
        hashes = sum(weights[1, i] * inner[:, i : i + 21] for i in range(12))
        views = np.lib.stride_tricks.sliding_window_view(images[..., 1], (12, 12), axis=(1, 2))
        return hashes[np.ptp(views, axis=(3, 4)) >= 40]

    (train, _), (test, _) = pictures("train"), pictures("test")
    found = windows(test)
    assert len(found) > 40_000
    assert not np.isin(found, windows(train)).any()
    assert np.isin(windows(np.roll(test, 3, axis=1)), found).mean() > 0.7  # shifted copies are found


def test_molecule_answers_are_those_of_rdkit():
    chemistry = pytest.importorskip("rdkit.Chem")
    symbols = {"carbon": "C", "nitrogen": "N", "oxygen": "O"}
    asked = Counter()
    for training, count in ((True, 400), (False, 1000)):
        for index in range(count):
            question, answer = molecule_question(index, training)
            match = re.fullmatch(r"(?:How many (\w+)(?: atoms)? does|Does) (\S+) (?:have|contain sulfur)\?", question)
            kind, smiles = match.groups()
            molecule = chemistry.MolFromSmiles(smiles)
            elements = Counter(atom.GetSymbol() for atom in molecule.GetAtoms())
            if kind == "rings":
                expected = str(len(chemistry.GetSSSR(molecule)))  # independent rings
            else:
                expected = ("yes" if elements["S"] else "no") if kind is None else str(elements[symbols[kind]])
            assert answer == expected, question
            asked[kind] += 1
    assert set(asked.values()) == {1400 // len(QUESTIONS)}


def test_molecule_questions_are_conversations(monkeypatch):
    monkeypatch.setattr(molecule_questions, "parse_smiles", lambda _: Molecule((), ()))  # only questions, and fast
    molecules = {}
    for part, size in (("train", 20_000), ("test", 1_000)):
        opened = ConversationSource(f"bundled:molecule-questions/{part}").open()
        assert len(opened) == size
        asked, answered = opened.read(size - 1).messages
        assert (asked.parts[0].value, answered.parts[0].value) == molecule_question(size - 1, part == "train")
        assert [*opened.read(0).media] == []
        molecules[part] = {re.search(r" does (\S+)|Does (\S+)", molecule_question(i, part == "train")[0]).group()
                           .split()[1] for i in range(size)}  # fmt: skip
        assert len(molecules[part]) == size
        assert not any("." in written for written in molecules[part])  # rings are counted for one piece
    assert not molecules["train"] & molecules["test"]
    lengths = [np.mean([len(written) for written in molecules[part]]) for part in ("train", "test")]
    assert abs(lengths[0] - lengths[1]) < 1  # both are samples of the whole file, which is sorted
    begins = [np.mean([written.startswith("C") for written in molecules[part]]) for part in ("train", "test")]
    assert abs(begins[0] - begins[1]) < 0.06


def test_sets_do_not_change():
    found = [molecule_question(index, training) for training in (True, False) for index in (0, 4)]
    assert found == [
        ("How many carbon atoms does O=C(Nc1ccccc1-c1nc(-c2ccncc2)no1)c1cccnc1 have?", "19"),
        ("Does COc1ccc(O)c(C(=O)OCc2cc(C)no2)c1 contain sulfur?", "no"),
        ("How many carbon atoms does COc1cc2ccn(CC#N)c(=O)c2c(OC)c1OC have?", "14"),
        ("Does CCOc1ccccc1-c1cn2c(C)c(C(C)=O)sc2n1 contain sulfur?", "yes"),
    ]
    picture, same = (bundled_record("bundled:science-pictures/test", 5)["messages"][0] for _ in range(2))
    assert np.array_equal(picture["content"][0]["image"], same["content"][0]["image"])
