"""Training state on disk."""

from lit_interns1.checkpoints.publish import partial_path, publish, remove_published
from lit_interns1.checkpoints.sharded import UnsafeCheckpointError, load_sharded
from lit_interns1.checkpoints.sharded_writer import ShardedWriter

__all__ = [
    "ShardedWriter", "UnsafeCheckpointError", "load_sharded", "partial_path", "publish", "remove_published",
]  # fmt: skip
