"""Weights of Hugging Face folders: config.json and safetensors files in, with an audit of every key."""

from lit_interns1.checkpoints.huggingface.config import config_from_pretrained, end_of_text_ids, is_pretrained_folder
from lit_interns1.checkpoints.huggingface.errors import Problem, WeightsError
from lit_interns1.checkpoints.huggingface.layouts import LAYOUTS, Layout
from lit_interns1.checkpoints.huggingface.load import LoadedWeights, load_pretrained_model, load_pretrained_weights
from lit_interns1.checkpoints.huggingface.rules import Rule, Spelling

__all__ = [
    "LAYOUTS", "Layout", "LoadedWeights", "Problem", "Rule", "Spelling", "WeightsError", "config_from_pretrained",
    "end_of_text_ids", "is_pretrained_folder", "load_pretrained_model", "load_pretrained_weights",
]  # fmt: skip
