"""FP8 blocks of an export: new ones from numbers, and those of a folder where the numbers are still the same.

    q, s = quantize(w);   where dequantize(q_old, s_old) = w in all of a block, it keeps q_old and s_old

Several pairs of q and s stand for the same numbers: without the second rule a folder would not come back byte by byte.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1.checkpoints.huggingface.files import Window, dequantize
from lit_interns1_kernels.fp8_quantize import BLOCK, quantize_128x128


class FP8Blocks(NamedTuple):
    """A window of matrices in e4m3: numbers (…, rows, columns), and scales (…, ⌈rows/128⌉, ⌈columns/128⌉)."""

    numbers: Tensor
    scales: Tensor


def quantized(values: Tensor, power_of_two_scales: bool) -> FP8Blocks:
    """Numbers (…, rows, columns) that begin with a block; the last blocks may be smaller. Scales are float32."""
    columns = values.shape[-1]
    padded = F.pad(values.float(), (0, -columns % BLOCK))
    numbers, scales = quantize_128x128(padded, power_of_two_scales)
    return FP8Blocks(numbers[..., :columns], scales)


def keep_unchanged(values: Tensor, new: FP8Blocks, old: FP8Blocks) -> FP8Blocks:
    """The old blocks where they are the values' numbers (in their type), else the new ones."""
    same = dequantize(old.numbers, old.scales, (BLOCK, BLOCK)).to(values.dtype) == values
    rows, columns = values.shape[-2:]
    padded = F.pad(same, (0, -columns % BLOCK, 0, -rows % BLOCK), value=True)
    whole = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).all(-1).all(-2)
    wide = whole.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]
    numbers = torch.where(wide, old.numbers.view(torch.uint8), new.numbers.view(torch.uint8))
    scales = torch.where(whole, old.scales.float(), new.scales)
    return FP8Blocks(numbers.view(torch.float8_e4m3fn), scales)


def scale_window(window: Window) -> Window:
    """The scales of a window of matrices that begins and ends with blocks."""
    return (*window[:-2], *(slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in window[-2:]))
