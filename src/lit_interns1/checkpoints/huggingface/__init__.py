"""Weights of Hugging Face folders: config.json and safetensors files in, with an audit of every key."""

from lit_interns1.checkpoints.huggingface.config import config_from_pretrained, end_of_text_ids, is_pretrained_folder
from lit_interns1.checkpoints.huggingface.encoder_config import multimodal_config_from_pretrained
from lit_interns1.checkpoints.huggingface.errors import Problem, WeightsError
from lit_interns1.checkpoints.huggingface.export import ExportedWeights, export_pretrained
from lit_interns1.checkpoints.huggingface.layouts import LAYOUTS, Layout
from lit_interns1.checkpoints.huggingface.load import (
    LoadedWeights,
    load_pretrained_model,
    load_pretrained_multimodal_model,
    load_pretrained_weights,
)
from lit_interns1.checkpoints.huggingface.rules import Rule, Spelling
from lit_interns1.checkpoints.huggingface.sources import (
    CheckpointSource,
    FolderSource,
    ModelSource,
    TensorInfo,
    WeightSource,
    open_source,
)
from lit_interns1.checkpoints.huggingface.streaming import exported_tensors

__all__ = [
    "CheckpointSource", "ExportedWeights", "FolderSource", "LAYOUTS", "Layout", "LoadedWeights", "ModelSource",
    "Problem", "Rule", "Spelling", "TensorInfo", "WeightSource", "WeightsError", "config_from_pretrained",
    "end_of_text_ids", "export_pretrained", "exported_tensors", "is_pretrained_folder", "load_pretrained_model",
    "load_pretrained_multimodal_model", "load_pretrained_weights", "multimodal_config_from_pretrained", "open_source",
]  # fmt: skip
