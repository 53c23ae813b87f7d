"""Sharded checkpoints are read back, and what would run code is refused and not run."""

import io
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException, save

from lit_interns1.checkpoints import UnsafeCheckpointError, load_sharded


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def checkpoint(tmp_path):
    state = {"weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, "rate": 0.25}
    save(state, checkpoint_id=tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def template():
    return {"weights": {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, "rate": 0.0}


def test_what_was_saved_comes_back(checkpoint):
    state = template()
    load_sharded(state, checkpoint)
    assert torch.equal(state["weights"]["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(state["weights"]["b"], torch.ones(4, dtype=torch.bfloat16))
    assert state["rate"] == 0.25


def test_missing_entries_stay_only_where_that_is_allowed(checkpoint):
    state = template() | {"new": 7}
    with pytest.raises(CheckpointException, match="new"):
        load_sharded(state, checkpoint)
    state = template() | {"new": 7}
    load_sharded(state, checkpoint, allow_missing=True)
    assert (state["new"], state["rate"]) == (7, 0.25)


def refused(checkpoint):
    with pytest.raises((CheckpointException, UnsafeCheckpointError)) as caught:
        load_sharded(template(), checkpoint)
    return str(caught.value)


def test_metadata_that_would_call_a_function_is_refused_and_the_function_not_called(checkpoint, tmp_path):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = Payload(tmp_path / "called")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "mkdir" in refused(checkpoint)
    assert not (tmp_path / "called").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # the payload is real
    assert (tmp_path / "called").exists()


def test_an_entry_that_would_call_a_function_is_refused_and_the_function_not_called(checkpoint, tmp_path):
    state = template() | {"rate": Payload(tmp_path / "called")}
    save(state, checkpoint_id=checkpoint)
    assert "'rate' is not plain data" in refused(checkpoint)
    assert not (tmp_path / "called").exists()


def test_metadata_that_is_something_else_is_refused(checkpoint):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(["no metadata"]))
    assert "the metadata is a list" in refused(checkpoint)
    buffer = io.BytesIO()
    pickle.dump(torch.nn.Linear, buffer)
    (checkpoint / ".metadata").write_bytes(buffer.getvalue())
    assert "torch.nn.modules.linear.Linear" in refused(checkpoint)
