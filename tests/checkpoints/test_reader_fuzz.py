"""Damaged and hostile folders, thousands of them: each is refused with a `WeightsError`, or read exactly.

What is accepted equals, bit by bit, the original where the index has checksums, and elsewhere what the safetensors
library reads from the files. A case that takes too long or too much memory fails, as does any other exception.
"""

import contextlib
import json
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from huggingface_folders import written_tensors
from lit_interns1.checkpoints import (
    WeightsError,
    config_from_pretrained,
    load_pretrained_model,
    load_pretrained_weights,
)
from lit_interns1.checkpoints.huggingface.audit import saved_tensors
from lit_interns1.checkpoints.huggingface.export import export_pretrained
from lit_interns1.checkpoints.huggingface.sources import ModelSource
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig

CASE_SECONDS = 20
MEMORY = 4 << 30
INDEX = "model.safetensors.index.json"
CONFIG = LanguageModelConfig(
    vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=8,
    moe=MoEConfig(num_experts=2, experts_per_token=1, intermediate_size=4), dense_layers=(0,),
)  # fmt: skip
EXAMPLES = pytest.mark.parametrize("examples", [30, pytest.param(350, marks=pytest.mark.slow)])


class Folders:
    """An export of ours, and the same without checksums; one file of a copy is exchanged in every case."""

    def __init__(self, root: Path) -> None:
        self.model = LanguageModel.create(CONFIG, seed=3).bfloat16()
        self.tensors = {name: tensor.detach() for name, (tensor, _) in saved_tensors(self.model).items()}
        self.ours = root / "ours"
        export_pretrained(ModelSource(self.model), CONFIG, self.ours, max_shard_bytes=700, progress=False)
        index = json.loads((self.ours / INDEX).read_text())
        assert len(index["metadata"]["sha256"]) > 2
        self.foreign = root / "foreign"
        shutil.copytree(self.ours, self.foreign)
        del index["metadata"]["sha256"]
        (self.foreign / INDEX).write_text(json.dumps(index))
        self.names = sorted(path.name for path in self.ours.glob("*.safetensors"))
        self.target = LanguageModel.create(CONFIG, seed=4).bfloat16()
        self.sentinel = {name: tensor.clone() for name, tensor in self.target.state_dict().items()}

    def read(self, folder: Path) -> dict[str, torch.Tensor] | None:
        """What is read into a model, None if the folder is refused, which leaves the model as it was."""
        self.target.load_state_dict(self.sentinel)
        try:
            with limits():
                load_pretrained_weights(self.target, folder)
        except WeightsError:
            assert all(same(tensor, self.sentinel[name]) for name, tensor in self.target.state_dict().items())
            return None
        return {name: tensor.detach() for name, (tensor, _) in saved_tensors(self.target).items()}

    def is_original(self, read: dict[str, torch.Tensor]) -> bool:
        return all(same(read[name], tensor) for name, tensor in self.tensors.items())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextlib.contextmanager
def limits():
    """No case hangs, and none takes memory for sizes that a file only claims."""

    def hang(*_):
        raise AssertionError(f"a case took more than {CASE_SECONDS} s")

    with open("/proc/self/statm", encoding="ascii") as status:
        used = int(status.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.alarm(CASE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def exchanged(path: Path, content: bytes):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("fuzz"))


def run(case, examples, *strategies):
    """Runs a case for many examples; the same ones every time. Returns how they ended."""
    outcomes = Counter()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.tuples(*strategies))
    def cases(arguments):
        outcomes[case(*arguments)] += 1

    cases()
    assert sum(outcomes.values()) >= examples
    return outcomes


# -- strategies ------------------------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=4,
)
"""Changes of bytes: kind, place as a fraction, value, length."""
EXTREME = st.sampled_from([0, 1, -1, 255, 2**16, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**40])
NUMBERS = EXTREME | st.integers(-10, 100) | st.floats(allow_nan=True, width=32)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def edited(content: bytes, edits, first: int = 0, last: int | None = None) -> bytes:
    """Bytes between two places changed."""
    result, last = bytearray(content), len(content) if last is None else last
    for kind, place, value, length in edits:
        at = min(first + int(place * max(last - first, 1)), max(len(result) - 1, 0))
        if kind == "flip" and result:
            result[at] ^= 1 << value % 8
        elif kind == "set" and result:
            result[at] = value
        elif kind == "insert":
            result[at:at] = bytes([value]) * length
        elif kind == "delete":
            del result[at : at + length]
        elif kind == "repeat":
            result[at:at] = result[at : at + length]
        elif kind == "cut":
            del result[at:]
    return bytes(result)


def places(value, path=()):
    """All places inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


CHANGES = st.lists(
    st.tuples(st.sampled_from(["replace", "remove", "swap", "rename"]), st.randoms(use_true_random=False), JSON),
    min_size=1,
    max_size=3,
)


def changed(value, changes):
    """A JSON value changed at random places: another value, none, that of another place, or under another key."""
    for kind, random, new in changes:
        inside = [path for path in places(value) if path]
        if not inside:
            return new
        path = random.choice(inside)
        parent = value
        for step in path[:-1]:
            parent = parent[step]
        if kind == "swap":
            other = random.choice(inside)
            found = value
            for step in other:
                found = found[step]
            value = replaced(value, path, found)
        elif kind == "replace" or isinstance(parent, list):
            value = replaced(value, path, new)
        else:
            name = str(new)[:40] if kind == "rename" else None
            entries = {(name if key == path[-1] and name is not None else key): inner for key, inner in parent.items()}
            if kind == "remove":
                del entries[path[-1]]
            value = replaced(value, path[:-1], entries)
    return value


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


# -- the cases -------------------------------------------------------------------------------------------------------


def library_agrees(folders: Folders, folder: Path) -> bool:
    """Whether the model holds what the safetensors library reads from the files."""
    theirs = {key: tensor for name in folders.names for key, tensor in load_file(folder / name).items()}
    ours = written_tensors(folders.target, torch.bfloat16)
    return ours.keys() == theirs.keys() and all(same(ours[key], t.bfloat16()) for key, t in theirs.items())


@EXAMPLES
def test_bytes_of_headers(folders, examples):
    def case(number, edits, name):
        folder = folders.ours if name == "ours" else folders.foreign
        path = folder / folders.names[number % len(folders.names)]
        content = path.read_bytes()
        damaged = edited(content, edits, 0, 8 + int.from_bytes(content[:8], "little"))
        with exchanged(path, damaged):
            read = folders.read(folder)
            if read is None:
                return "refused"
            assert folders.is_original(read) if name == "ours" else library_agrees(folders, folder)
            return "unchanged" if damaged == content else "accepted"

    outcomes = run(case, examples, st.integers(0, 99), EDITS, st.sampled_from(["ours", "foreign"]))
    assert outcomes["refused"] > examples // 2


@EXAMPLES
def test_entries_of_headers(folders, examples):
    """Names, types, shapes and places in a header of the right length, in files without checksums."""

    def case(number, changes):
        path = folders.foreign / folders.names[number % len(folders.names)]
        header, numbers = header_of(path.read_bytes())
        with exchanged(path, with_header(changed(header, changes), numbers)):
            read = folders.read(folders.foreign)
            if read is None:
                return "refused"
            assert library_agrees(folders, folders.foreign)
            return "accepted"

    outcomes = run(case, examples, st.integers(0, 99), CHANGES)
    assert outcomes["refused"] > examples // 2


@EXAMPLES
def test_numbers_of_our_exports(folders, examples):
    """Whatever changes behind the header of a file, the checksum of the file shows it."""

    def case(number, edits):
        path = folders.ours / folders.names[number % len(folders.names)]
        content = path.read_bytes()
        damaged = edited(content, edits, 8 + int.from_bytes(content[:8], "little"))
        with exchanged(path, damaged):
            read = folders.read(folders.ours)
            assert (read is not None) == (damaged == content)
            assert read is None or folders.is_original(read)
            return "refused" if read is None else "unchanged"

    outcomes = run(case, examples, st.integers(0, 99), EDITS)
    assert outcomes["refused"] > examples // 2


@EXAMPLES
def test_bytes_of_indices(folders, examples):
    def case(edits):
        path = folders.ours / INDEX
        with exchanged(path, edited(path.read_bytes(), edits)):
            read = folders.read(folders.ours)
            assert read is None or folders.is_original(read)
            return "refused" if read is None else "accepted"

    assert run(case, examples, EDITS)["refused"] > examples // 2


@EXAMPLES
def test_entries_of_indices(folders, examples):
    def case(changes):
        path = folders.ours / INDEX
        with exchanged(path, json.dumps(changed(json.loads(path.read_text()), changes)).encode()):
            read = folders.read(folders.ours)
            assert read is None or folders.is_original(read)
            return "refused" if read is None else "accepted"

    assert run(case, examples, CHANGES)["refused"] > examples // 2


@EXAMPLES
def test_files_that_change_places(folders, examples):
    """Names of files exchanged, files cut off, filled up, doubled or taken away."""

    def case(kind, one, other, size):
        a, b = (folders.ours / folders.names[number % len(folders.names)] for number in (one, other))
        first, second = a.read_bytes(), b.read_bytes()
        new = {
            "exchange": (second, first),
            "double": (first, first),
            "cut": (first[:size], second),
            "fill": (first + b"\0" * size, second),
            "empty": (b"", second),
        }[kind]
        with exchanged(b, new[1]), exchanged(a, new[0]):
            read = folders.read(folders.ours)
            unchanged = (a.read_bytes(), b.read_bytes()) == (first, second)
            assert (read is not None) == unchanged
            return "refused" if read is None else "unchanged"

    kinds = st.sampled_from(["exchange", "double", "cut", "fill", "empty"])
    sizes = st.integers(1, 400)
    assert run(case, examples, kinds, st.integers(0, 99), st.integers(0, 99), sizes)["refused"] > examples // 2


@EXAMPLES
def test_config_files(folders, examples):
    """A config is refused, or describes a network whose weights are those of the files."""

    def case(edits, changes):
        path = folders.ours / "config.json"
        content = path.read_bytes()
        damaged = edited(content, edits) if edits else json.dumps(changed(json.loads(content), changes)).encode()
        with exchanged(path, damaged):
            read = folders.read(folders.ours)
            assert read is None or folders.is_original(read)
            try:
                with limits():
                    config = config_from_pretrained(folders.ours)
                    model = load_pretrained_model(folders.ours)
            except WeightsError:
                return "refused"
            assert config == model.config
            tensors = {name: tensor.detach() for name, (tensor, _) in saved_tensors(model).items()}
            assert folders.is_original({name: tensor.bfloat16() for name, tensor in tensors.items()})
            return "accepted"

    outcomes = run(case, examples, st.none() | EDITS, CHANGES)
    assert outcomes["refused"] > examples // 10
    assert outcomes["accepted"]
