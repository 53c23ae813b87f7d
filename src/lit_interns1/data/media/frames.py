"""Videos as sequences of frames: a folder of images, an animated file, a list of images, or an array.

Frames are opened one at a time, and only those that are asked for, so that a long video does not have to fit into
memory. There is no decoder of video codecs here: turn an MP4 into frames first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from lit_interns1.data.media.errors import MediaError
from lit_interns1.data.media.images import (
    DEFAULT_OPTIONS,
    ImageOptions,
    ImageSource,
    decoding,
    describe,
    local_path,
    open_file,
    open_image,
    to_rgb,
)

VideoSource: TypeAlias = str | Path | bytes | Sequence[ImageSource] | np.ndarray | Tensor
SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File names in a folder of frames."""


@dataclass(frozen=True)
class Video:
    """Frames that can be opened, and their rate.

    Attributes:
        frames: The frames, or the path or bytes of an animated file.
        num_frames: How many there are.
        frames_per_second: Their rate in Hz.
        name: What to call the video in messages.
    """

    frames: Sequence[ImageSource] | str | Path | bytes
    num_frames: int
    frames_per_second: float
    name: str

    def read(self, indices: Sequence[int], options: ImageOptions = DEFAULT_OPTIONS) -> Iterator[Image.Image]:
        """Opens the frames of these indices, one at a time.

        Args:
            indices: Ascending indices of frames.
            options: How images are opened.

        Raises:
            MediaError: If a frame cannot be opened or differs from the first in its size.
        """
        size = None
        for index, frame in zip(indices, self._open(indices, options)):
            size = size or frame.size
            if frame.size != size:
                raise MediaError(
                    f"{self.name}: frame {index} has {frame.width} × {frame.height} pixels, "
                    f"the first that is read {size[0]} × {size[1]}; all must be equal"
                )
            yield frame

    def _open(self, indices: Sequence[int], options: ImageOptions) -> Iterator[Image.Image]:
        if not isinstance(self.frames, (str, Path, bytes)):
            for index in indices:
                yield open_image(self.frames[index], options)
            return
        with open_file(self.frames) as picture:
            for index in indices:
                decoding(self.name, partial(picture.seek, index))
                yield to_rgb(picture, options, f"{self.name}, frame {index}")


def open_video(
    source: VideoSource, frames_per_second: float | None = None, options: ImageOptions = DEFAULT_OPTIONS
) -> Video:
    """Finds the frames of a video and their rate; no frame is kept.

    Args:
        source: A folder of images (in the order of their names, numbers by value), an animated GIF, WebP, PNG, AVIF or
            TIFF as a path or bytes, a list of images, or an array or tensor (T, H, W, C) or (T, C, H, W).
        frames_per_second: Rate of the frames in Hz. May be left out for an animated file that says how long every
            frame lasts: then the mean rate, number of frames over total time.
        options: Limits for the frames.

    Raises:
        MediaError: If there is no frame, or no rate.
    """
    if frames_per_second is not None and not 0 < frames_per_second < math.inf:
        raise MediaError(f"frames_per_second={frames_per_second} must be a positive number")
    name, rate = describe(source), frames_per_second
    frames: Sequence[ImageSource] | str | Path | bytes
    if isinstance(source, (str, Path)) and local_path(source).is_dir():
        folder = local_path(source)
        paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        paths.sort(key=_natural)
        frames = paths
        count = len(frames)
    elif isinstance(source, (str, Path, bytes)):
        frames = source
        with open_file(source) as picture:
            options.check_size(*picture.size, name)
            count = decoding(name, lambda: int(getattr(picture, "n_frames", 1)))
            rate = rate or decoding(name, lambda: _mean_rate(picture, count))
    elif isinstance(source, (np.ndarray, Tensor)):
        if source.ndim != 4:
            raise MediaError(f"{name}: a video has the shape (T, H, W, C) or (T, C, H, W)")
        frames, count = list(source), len(source)
    elif isinstance(source, Sequence):
        frames, count, name = source, len(source), f"list of {len(source)} frames"
    else:
        raise MediaError(f"a video is a path, bytes, a list of images, an array or a tensor; got {name}")
    if count < 1:
        raise MediaError(f"{name}: no frames; names of images end in {', '.join(SUFFIXES)}")
    if rate is None:
        raise MediaError(f"{name}: the rate of the frames is not known; give frames_per_second")
    return Video(frames, count, rate, name)


def _mean_rate(picture: Image.Image, count: int) -> float | None:
    milliseconds = 0.0
    for index in range(count):
        picture.seek(index)
        picture.load()  # WebP and AVIF know the duration of a frame when it is decoded
        duration = float(picture.info.get("duration", 0) or 0)
        if duration <= 0:
            return None
        milliseconds += duration
    return 1000.0 * count / milliseconds


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts `frame10` behind `frame9`."""
    parts = re.findall(r"(\d+)|(\D+)", path.name)
    return [(int(digits), "") if digits else (-1, text) for digits, text in parts], path.name
