"""Opens a Hugging Face folder: config and headers are read and compared before a model is built or weights are read.

every size of config.json ≤ the longest dimension of the files;    layers, experts ≤ the tensors that are there
"""

from __future__ import annotations

import math
from pathlib import Path

from lit_interns1.checkpoints.agreement import this_rank
from lit_interns1.checkpoints.gguf.weights import open_gguf_weights
from lit_interns1.checkpoints.huggingface.config import PretrainedConfig, read_pretrained_config
from lit_interns1.checkpoints.huggingface.errors import WeightsError
from lit_interns1.checkpoints.huggingface.files import WeightFiles
from lit_interns1.data.gguf_file import is_gguf_file
from lit_interns1.models import LanguageModelConfig


def open_pretrained(folder: str | Path) -> tuple[PretrainedConfig, WeightFiles]:
    """Config and files of a folder, with headers read and sizes compared; no weights.

    Raises:
        WeightsError: If one of them cannot be read, or the config is of a larger model than the files can hold.
    """
    pretrained = read_pretrained_config(folder)
    if is_gguf_file(folder):
        return pretrained, open_gguf_weights(folder)
    files = WeightFiles(Path(folder), pretrained.block_shape)
    _check_sizes(pretrained.model, files)
    return pretrained, files


def _check_sizes(config: LanguageModelConfig, files: WeightFiles) -> None:
    """Keeps a config with absurd numbers from being built, or audited for hours: every size is one of a stored tensor.

    Raises:
        WeightsError: If a size is larger than any in the files.
    """
    shapes = [tensor.shape for tensor in files.tensors.values() if math.prod(tensor.shape)]
    longest = max((size for shape in shapes for size in shape), default=0)
    matrices = max(len(shapes), sum(shape[0] for shape in shapes if len(shape) == 3))
    moe = config.moe
    bounds = {
        "vocab_size": (config.vocab_size, longest),
        "hidden_size": (config.hidden_size, longest),
        "num_heads · head_dim": (config.num_heads * config.head_dim, longest),
        "num_layers": (config.num_layers, len(shapes)),
        "intermediate_size": (config.intermediate_size if config.num_moe_layers < config.num_layers else 0, longest),
        "moe.intermediate_size": (moe.intermediate_size if moe else 0, longest),
        "num_moe_layers · moe.num_experts": (config.num_moe_layers * moe.num_experts if moe else 0, matrices),
    }
    for name, (size, bound) in bounds.items():
        if size > bound:
            raise WeightsError(f"{files.folder}: config.json says {name} = {size}, but its files have room for {bound}")


def verify_share(files: WeightFiles) -> int:
    """Compares this rank's share of the files with their checksums; each file is the share of one rank.

    The largest file goes first, and each to the rank that has the fewest bytes.

    Returns:
        Bytes that were hashed.

    Raises:
        WeightsError: If a file of the share is not what was written; on this rank only.
    """
    rank, world = this_rank()
    bytes_of_rank, mine = [0] * world, list[str]()
    for name in sorted(files.sizes, key=lambda name: (-files.sizes[name], name)):
        least = bytes_of_rank.index(min(bytes_of_rank))
        bytes_of_rank[least] += files.sizes[name]
        if least == rank:
            mine.append(name)
    return files.verify(mine)
