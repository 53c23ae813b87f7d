"""Training state on disk."""

from lit_interns1.checkpoints.sharded import UnsafeCheckpointError, load_sharded

__all__ = ["UnsafeCheckpointError", "load_sharded"]
