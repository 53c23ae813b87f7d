"""Training state on disk, and weights from elsewhere."""

from lit_interns1.checkpoints.huggingface import (
    CheckpointSource,
    ExportedWeights,
    FolderSource,
    ModelSource,
    WeightsError,
    config_from_pretrained,
    export_pretrained,
    load_pretrained_model,
    load_pretrained_weights,
    open_source,
)
from lit_interns1.checkpoints.publish import partial_path, publish, remove_published
from lit_interns1.checkpoints.reading import CONFIG_KEY, MULTIMODAL_KEY, REWARD_KEY, read_checkpoint
from lit_interns1.checkpoints.sharded import UnsafeCheckpointError, load_sharded
from lit_interns1.checkpoints.sharded_writer import METADATA_FILE, ShardedWriter

__all__ = [
    "CONFIG_KEY", "CheckpointSource", "ExportedWeights", "FolderSource", "METADATA_FILE", "MULTIMODAL_KEY",
    "ModelSource", "REWARD_KEY", "ShardedWriter", "UnsafeCheckpointError", "WeightsError", "config_from_pretrained",
    "export_pretrained", "load_pretrained_model", "load_pretrained_weights", "load_sharded", "open_source",
    "partial_path", "publish", "read_checkpoint", "remove_published",
]  # fmt: skip
