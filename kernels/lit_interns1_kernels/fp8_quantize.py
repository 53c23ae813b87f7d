"""FP8 quantisers with one scale for each block of 128 values (activations) or of 128 × 128 values (weights).

    amax_b = max(max_{i∈b} |x_i|, 1e-4)      scale_b = amax_b / 448      q_i = e4m3(x_i · 448 / amax_b)
    power of two:  scale_b = 2^⌈log2(amax_b / 448)⌉      q_i = e4m3(x_i / scale_b)
    x_i ≈ scale_b · q_i

448 is the largest e4m3 value. Scales are float32; those rounded to a power of two are rounded up, so that nothing
overflows, and make the division exact. Formats and the floor of amax as in the public code of arXiv 2508.16584
(activations 1×128, weights 128×128).

Letters: M rows, K contraction size, N output size; KB, NB = number of 128-blocks of K, of N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_interns1_kernels.backends import triton_target

BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def e4m3_problem(device: torch.device) -> str | None:
    """Why the FP8 kernels cannot run on this device, or None (a CPU computes the same in plain torch)."""
    if device.type in ("cpu", "meta"):
        return None
    target = triton_target(device)
    if target is not None and target != "hip" and int(target[2:]) // 10 in (9, 10):
        return None
    return (
        "the FP8 kernels need Triton and a GPU of compute capability 9.x or 10.x (Hopper, Blackwell): "
        f"{target or device} has no tensor-core products in e4m3fn, or not the descriptor copies and shared memory to "
        "feed them"
    )


def check_e4m3_device(device: torch.device) -> None:
    """Raises ValueError with the reason if the FP8 kernels cannot run on this device."""
    if problem := e4m3_problem(device):
        raise ValueError(problem)


def _check(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}: it must be float32, bfloat16 or float16")
    if x.shape[-1] % BLOCK or x.shape[-1] == 0:
        raise ValueError(f"{name} {tuple(x.shape)}: the last dimension must be a positive multiple of {BLOCK}")


def _check_pair(name: str, q: Tensor, scale: Tensor, scale_shape: tuple[int, ...]) -> None:
    if q.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name} has dtype {q.dtype}: it must be {torch.float8_e4m3fn}")
    if scale.dtype != torch.float32:
        raise ValueError(f"the scale of {name} has dtype {scale.dtype}: it must be {torch.float32}")
    if tuple(scale.shape) != scale_shape:
        raise ValueError(f"the scale of {name} {tuple(q.shape)} has shape {tuple(scale.shape)}: must be {scale_shape}")


def count_blocks(size: int) -> int:
    """⌈size / 128⌉."""
    return (size + BLOCK - 1) // BLOCK


def check_1x128(name: str, q_MK: Tensor, scale: Tensor) -> None:
    """Raises ValueError unless the two are what `quantize_1x128` gives; `name` is that of q in the message."""
    if q_MK.ndim != 2 or q_MK.shape[1] % BLOCK:
        raise ValueError(f"{name} {tuple(q_MK.shape)} must be (rows, a multiple of {BLOCK})")
    _check_pair(name, q_MK, scale, (q_MK.shape[0], q_MK.shape[1] // BLOCK))


def check_128x128(name: str, q_NK: Tensor, scale: Tensor) -> None:
    """Raises ValueError unless the two are what `quantize_128x128` gives; `name` is that of q in the message."""
    if q_NK.ndim < 2 or q_NK.shape[-1] % BLOCK:
        raise ValueError(f"{name} {tuple(q_NK.shape)} must be (..., rows, a multiple of {BLOCK})")
    *batch, rows, columns = q_NK.shape
    _check_pair(name, q_NK, scale, (*batch, count_blocks(rows), columns // BLOCK))


def _scale_and_inverse(amax: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    scale = amax / E4M3_MAX
    if not power_of_two:
        return scale, torch.full_like(amax, E4M3_MAX) / amax  # number / tensor would round twice
    # a float is 2^exponent · mantissa with mantissa in [1, 2): a carry out of any mantissa but 1 rounds up
    scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale, 1.0 / scale


def _outputs(x: Tensor, scale_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return q, x.new_empty(scale_shape, dtype=torch.float32)


@torch.library.custom_op("lit_interns1::quantize_1x128", mutates_args=(), device_types="cpu")
def _quantize_1x128(x_MK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    blocks = x_MK.float().unflatten(1, (-1, BLOCK))
    scale, inverse = _scale_and_inverse(blocks.abs().amax(2).clamp(min=AMAX_FLOOR), power_of_two_scales)
    return (blocks * inverse[:, :, None]).to(torch.float8_e4m3fn).flatten(1), scale


def _outputs_1x128(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(x_MK, (x_MK.shape[0], x_MK.shape[1] // BLOCK))


@_quantize_1x128.register_fake
def _(x_MK, power_of_two_scales):
    return _outputs_1x128(x_MK)


@_quantize_1x128.register_kernel("cuda")
def _quantize_1x128_on_gpu(x_MK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    check_e4m3_device(x_MK.device)
    from lit_interns1_kernels.device import fp8_quantize as device

    q_MK, scale = _outputs_1x128(x_MK)
    device.quantize_1x128(x_MK, power_of_two_scales, q_MK, scale)
    return q_MK, scale


@torch.library.custom_op("lit_interns1::quantize_128x128", mutates_args=(), device_types="cpu")
def _quantize_128x128(w_GNK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    rows = w_GNK.shape[1]
    padded = F.pad(w_GNK.float(), (0, 0, 0, -rows % BLOCK))
    blocks = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # (G, NB, 128, KB, 128)
    scale, inverse = _scale_and_inverse(blocks.abs().amax((2, 4)).clamp(min=AMAX_FLOOR), power_of_two_scales)
    q = (blocks * inverse[:, :, None, :, None]).to(torch.float8_e4m3fn).flatten(3, 4).flatten(1, 2)
    return q[:, :rows].contiguous(), scale


def _outputs_128x128(w_GNK: Tensor) -> tuple[Tensor, Tensor]:
    groups, rows, columns = w_GNK.shape
    return _outputs(w_GNK, (groups, count_blocks(rows), columns // BLOCK))


@_quantize_128x128.register_fake
def _(w_GNK, power_of_two_scales):
    return _outputs_128x128(w_GNK)


@_quantize_128x128.register_kernel("cuda")
def _quantize_128x128_on_gpu(w_GNK: Tensor, power_of_two_scales: bool) -> tuple[Tensor, Tensor]:
    check_e4m3_device(w_GNK.device)
    from lit_interns1_kernels.device import fp8_quantize as device

    q_GNK, scale = _outputs_128x128(w_GNK)
    device.quantize_128x128(w_GNK, power_of_two_scales, q_GNK, scale)
    return q_GNK, scale


def quantize_1x128(x_MK: Tensor, power_of_two_scales: bool = False) -> tuple[Tensor, Tensor]:
    """Quantises activations: each row in blocks of 128 columns. Not differentiable.

    Args:
        x_MK: (M, K) float32, bfloat16 or float16, of any strides; K a multiple of 128. Values must be finite: a NaN or
            an infinity spoils its block.
        power_of_two_scales: Round scales up to powers of two, so that multiplying by them is exact.

    Returns:
        q (M, K) float8_e4m3fn and scale (M, K/128) float32.

    Raises:
        ValueError: If the shape or the dtype is none of these, or the device has no e4m3 format.
    """
    if x_MK.ndim != 2:
        raise ValueError(f"x_MK {tuple(x_MK.shape)} must be (rows, columns)")
    _check("x_MK", x_MK)
    q_MK, scale = _quantize_1x128(x_MK.detach(), power_of_two_scales)
    return q_MK, scale


def quantize_128x128(w_NK: Tensor, power_of_two_scales: bool = False) -> tuple[Tensor, Tensor]:
    """Quantises weights in blocks of 128 × 128; the last block of rows may be smaller. Not differentiable.

    The blocks of a transposed matrix are the transposed blocks: if N is a multiple of 128, too, the quantised transpose
    is the transpose of what is quantised.

    Args:
        w_NK: (..., N, K) float32, bfloat16 or float16, of any strides; K a multiple of 128. Values must be finite.
        power_of_two_scales: Round scales up to powers of two.

    Returns:
        q (..., N, K) float8_e4m3fn and scale (..., ⌈N/128⌉, K/128) float32.

    Raises:
        ValueError: If the shape or the dtype is none of these, or the device has no e4m3 format.
    """
    if w_NK.ndim < 2:
        raise ValueError(f"w_NK {tuple(w_NK.shape)} must be (..., rows, columns)")
    _check("w_NK", w_NK)
    batch, matrix = w_NK.shape[:-2], w_NK.shape[-2:]
    q_GNK, scale = _quantize_128x128(w_NK.detach().reshape(-1, *matrix), power_of_two_scales)
    return q_GNK.reshape(*batch, *matrix), scale.reshape(*batch, *scale.shape[1:])


def dequantize_1x128(q_MK: Tensor, scale: Tensor) -> Tensor:
    """(M, K) float32: what `quantize_1x128` stored.

    Raises:
        ValueError: If shapes or dtypes are not those that `quantize_1x128` gives.
    """
    check_1x128("q_MK", q_MK, scale)
    return q_MK.float() * scale.repeat_interleave(BLOCK, 1)


def dequantize_128x128(q_NK: Tensor, scale: Tensor) -> Tensor:
    """(..., N, K) float32: what `quantize_128x128` stored.

    Raises:
        ValueError: If shapes or dtypes are not those that `quantize_128x128` gives.
    """
    check_128x128("q_NK", q_NK, scale)
    wide = scale.repeat_interleave(BLOCK, -2)[..., : q_NK.shape[-2], :].repeat_interleave(BLOCK, -1)
    return q_NK.float() * wide
