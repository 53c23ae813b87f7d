"""Sizes and resampling that both image processors share.

Native resolution keeps the aspect ratio as closely as whole windows allow. With factor f = patch · merge,

    (h, w) = f · round((H, W) / f)                      if min_pixels ≤ t·h·w ≤ max_pixels
    (h, w) = f · floor((H, W) / (β f)), at least f      if more;   β = √(T·H·W / max_pixels)
    (h, w) = f · ceil ((H, W) · β / f)                  if less;   β = √(min_pixels / (T·H·W))

with T = t = 1 for an image, and t = τ · round(T / τ) for a video of T frames and temporal patches of τ frames
(Qwen2-VL, arXiv 2409.12191 §2.1, and the processors of Qwen2-VL and Qwen3-VL). `round` goes to even at a half.
Resampling is Pillow's bicubic filter on 8-bit values.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """The size (height, width) to which an image, or every frame of a video, is resized.

    Args:
        height: Height of the original, in pixels.
        width: Width of the original, in pixels.
        factor: Both sides become multiples of this, in pixels.
        min_pixels: Fewest pixels, over all frames.
        max_pixels: Most pixels, over all frames; a side never falls below `factor` for it.
        num_frames: Frames of the video; 1 for an image.
        temporal_factor: Frames per temporal patch; 1 for an image.
    """
    if temporal_factor > 1 and min(height, width) < factor:  # a video smaller than a window is enlarged first
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    frames = round(num_frames / temporal_factor) * temporal_factor
    pixels = frames * new_height * new_width
    if pixels > max_pixels:
        beta = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif pixels < min_pixels:
        beta = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def resize_bicubic(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """An RGB image resized to (height, width, 3), uint8."""
    return np.asarray(picture.resize((width, height), resample=Image.Resampling.BICUBIC))


def normalise_(values: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], channel_axis: int) -> None:
    """x ← (x / 255 − mean) / std in place, per channel.

    Args:
        values: float32 values in 0…255.
        mean: Mean of every channel, of values in 0…1.
        std: Standard deviation of every channel.
        channel_axis: Which axis the channels are.
    """
    shape = [1] * values.ndim
    shape[channel_axis] = len(mean)
    values /= np.float32(255)
    values -= np.array(mean, dtype=np.float32).reshape(shape)
    values /= np.array(std, dtype=np.float32).reshape(shape)


def check_normalisation(owner: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Refuses a mean or a standard deviation that is not three finite numbers, or a deviation that is not positive."""
    for option, value in (("mean", mean), ("std", std)):
        if len(value) != 3 or not all(math.isfinite(entry) for entry in value):
            raise ValueError(f"{owner}: {option}={value} must be three finite numbers, for red, green and blue")
    if min(std) <= 0:
        raise ValueError(f"{owner}: std={std} must be positive")


def check_positive(owner: str, **options: int) -> None:
    """Refuses options below 1."""
    for option, value in options.items():
        if value < 1:
            raise ValueError(f"{owner}: {option}={value} must be at least 1")
