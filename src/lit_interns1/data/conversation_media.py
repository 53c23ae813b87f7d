"""How images, videos and signals of a conversation become vectors: their number from headers, their values later.

    header → spans ("<1.0 seconds>", 64), …        how many placeholders stand where, behind which text
    pixels, points → item (values, facts, n)       what the encoder reads; n must be what was announced

Two families of images: native resolution (Intern-S1-Pro) and tiles (Intern-S1). Another one is another subclass of
`Visuals`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from lit_interns1.data.media.errors import MediaError
from lit_interns1.data.media.frames import open_video
from lit_interns1.data.media.images import ImageOptions, decoding, describe, open_file, open_image
from lit_interns1.data.media.native import NativeImageProcessor, NativeVideoProcessor, VisualPatches, timestamp_text
from lit_interns1.data.media.signal_files import open_signal
from lit_interns1.data.media.signals import TimeSeriesProcessor
from lit_interns1.data.media.tiling import TileProcessor, Tiles
from lit_interns1.nn.signal_patches import token_count

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)


class Span(NamedTuple):
    """Placeholders that stand together.

    Attributes:
        text: Text in front of them.
        vectors: How many.
    """

    text: str
    vectors: int


class Item(NamedTuple):
    """One item of `MediaItems`.

    Attributes:
        values: As the kind wants them.
        facts: As the kind wants them.
        vectors: How many the encoder makes of it.
    """

    values: Tensor
    facts: tuple[float, ...]
    vectors: int


def image_size(source: Any, options: ImageOptions) -> tuple[int, int]:
    """Height and width of an image as it is shown, from its header where it is a file.

    Raises:
        MediaError: If it cannot be opened, or breaks a limit.
    """
    if isinstance(source, (np.ndarray, Tensor, Image.Image)):
        picture = open_image(source, options)
        return picture.height, picture.width
    name = describe(source)
    with open_file(source) as picture:
        options.check_size(*picture.size, name)
        width, height = picture.size
        # not picture.getexif(): that of a PNG decodes all pixels
        sideways = decoding(name, lambda: Image.Image.getexif(picture).get(_ORIENTATION)) in _SIDEWAYS
    return (width, height) if sideways else (height, width)


class Visuals(ABC):
    """Images and videos of one family of encoders."""

    video_kind: str = "video"
    """The kind of items that a video becomes."""
    merge_size: int
    """Patches of the side of a window that becomes one vector."""

    @property
    @abstractmethod
    def image_options(self) -> ImageOptions:
        """How images are opened."""

    @property
    @abstractmethod
    def patch_values(self) -> int:
        """Numbers in a patch."""

    @abstractmethod
    def image_spans(self, height: int, width: int) -> list[Span]:
        """Placeholders of an image."""

    @abstractmethod
    def read_image(self, picture: Any) -> Item:
        """An opened image, for the encoder."""

    @abstractmethod
    def video_spans(self, source: Any, frames_per_second: float | None) -> list[Span]:
        """Placeholders of a video."""

    @abstractmethod
    def read_video(self, source: Any, frames_per_second: float | None) -> list[Item]:
        """A video, for the encoder."""

    def measure_image(self, source: Any) -> list[Span]:
        """Placeholders of an image, from its header."""
        return self.image_spans(*image_size(source, self.image_options))


def _native_item(patches: VisualPatches) -> Item:
    return Item(patches.pixel_values, tuple(patches.grid_thw[0].tolist()), patches.num_tokens)


@dataclass(frozen=True)
class NativeVisuals(Visuals):
    """At native resolution, for Intern-S1-Pro's encoder.

    Attributes:
        image: How images are cut.
        video: How videos are cut.
    """

    image: NativeImageProcessor = field(default_factory=NativeImageProcessor)
    video: NativeVideoProcessor = field(default_factory=NativeVideoProcessor)

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            if getattr(self.image, name) != getattr(self.video, name):
                raise ValueError(
                    f"NativeVisuals: {name} is {getattr(self.image, name)} for images and {getattr(self.video, name)} "
                    "for videos; one encoder reads both"
                )

    @property
    def merge_size(self) -> int:  # type: ignore[override]
        """Patches of the side of a window."""
        return self.image.merge_size

    @property
    def image_options(self) -> ImageOptions:
        """How images are opened."""
        return self.image.image_options

    @property
    def patch_values(self) -> int:
        """3·t·p·p."""
        return 3 * self.image.temporal_patch_size * self.image.patch_size**2

    def image_spans(self, height: int, width: int) -> list[Span]:
        """One span."""
        return [Span("", self.image.num_tokens(height, width))]

    def read_image(self, picture: Any) -> Item:
        """Patches in the order of the merge windows."""
        return _native_item(self.image(picture))

    def video_spans(self, source: Any, frames_per_second: float | None) -> list[Span]:
        """One span per temporal patch, behind its time."""
        video = open_video(source, frames_per_second, self.video.image_options)
        if video.num_frames < self.video.temporal_patch_size:
            raise MediaError(f"{video.name}: {video.num_frames} frame(s), fewer than a temporal patch")
        indices = self.video.sample(video.num_frames, video.frames_per_second)
        first = video.frames if isinstance(video.frames, (str, Path, bytes)) else video.frames[0]
        height, width = image_size(first, self.video.image_options)
        times = self.video.timestamps(indices, video.frames_per_second)
        total = self.video.num_tokens(len(indices), height, width)
        return [Span(timestamp_text(seconds), total // len(times)) for seconds in times]

    def read_video(self, source: Any, frames_per_second: float | None) -> list[Item]:
        """One item."""
        return [_native_item(self.video(source, frames_per_second))]


@dataclass(frozen=True)
class TiledVisuals(Visuals):
    """As tiles, for InternViT. A frame of a video is an image of one tile.

    Attributes:
        tiles: How images are cut into tiles.
        patch_size: Pixels of the side of a patch of the encoder.
        merge_size: Patches of the side of a window that becomes one vector.
        frames_per_second: Rate to which videos are thinned out, in Hz.
        max_frames: Most frames of a video.
    """

    tiles: TileProcessor = field(default_factory=TileProcessor)
    patch_size: int = 14
    merge_size: int = 2
    frames_per_second: float = 2.0
    max_frames: int = 768

    video_kind = "image"

    def __post_init__(self) -> None:
        if self.tiles.tile_size % (self.patch_size * self.merge_size):
            raise ValueError(
                f"TiledVisuals: tile_size={self.tiles.tile_size} is not a multiple of patch_size · merge_size = "
                f"{self.patch_size} · {self.merge_size}"
            )

    @property
    def image_options(self) -> ImageOptions:
        """How images are opened."""
        return self.tiles.image_options

    @property
    def patch_values(self) -> int:
        """3·p·p."""
        return 3 * self.patch_size**2

    @property
    def tokens_per_tile(self) -> int:
        """Vectors of one tile."""
        return (self.tiles.tile_size // self.patch_size // self.merge_size) ** 2

    def image_spans(self, height: int, width: int) -> list[Span]:
        """One span for all tiles."""
        return [Span("", self.tiles.num_tiles(height, width) * self.tokens_per_tile)]

    def read_image(self, picture: Any) -> Item:
        """Patches of every tile, row by row."""
        return self._item(self.tiles(picture))

    def _item(self, tiles: Tiles) -> Item:
        side, patch = self.tiles.tile_size // self.patch_size, self.patch_size
        cut = tiles.pixel_values.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # (n, 3, h, p, w, p)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.patch_values)
        return Item(patches, (tiles.num_tiles, side, side), tiles.num_tiles * self.tokens_per_tile)

    def _sample(self, num_frames: int, rate: float) -> list[int]:
        wanted = min(max(1, int(num_frames / rate * self.frames_per_second)), self.max_frames, num_frames)
        return np.linspace(0, num_frames - 1, wanted).round().astype(int).tolist()

    def video_spans(self, source: Any, frames_per_second: float | None) -> list[Span]:
        """One span per frame, behind its number."""
        video = open_video(source, frames_per_second, self.image_options)
        count = len(self._sample(video.num_frames, video.frames_per_second))
        return [Span(f"{chr(10) * bool(i)}Frame{i + 1}: ", self.tokens_per_tile) for i in range(count)]

    def read_video(self, source: Any, frames_per_second: float | None) -> list[Item]:
        """One item per frame."""
        video = open_video(source, frames_per_second, self.image_options)
        single = TileProcessor(
            self.tiles.tile_size, max_tiles=1, mean=self.tiles.mean, std=self.tiles.std,
            image_options=self.image_options,
        )  # fmt: skip
        indices = self._sample(video.num_frames, video.frames_per_second)
        return [self._item(single(frame)) for frame in video.read(indices, self.image_options)]


def signal_spans(source: Any, sampling_rate: float | None, processor: TimeSeriesProcessor) -> list[Span]:
    """Placeholders of a signal. Only headers are read of `.npy` files; others are read once."""
    signal = open_signal(source, processor.time_axis, processor.archive_key, processor.max_channels)
    points = 0
    for block in signal.blocks:
        points = min(points + len(block), processor.max_points)
        if points == processor.max_points:
            break
    if not points:
        raise MediaError(f"{signal.name}: the series has no points")
    rate = float(sampling_rate or signal.sampling_rate or max(points / 4, 1.0))
    return [Span("", token_count(points, rate))]


def read_signal(source: Any, sampling_rate: float | None, processor: TimeSeriesProcessor) -> Item:
    """A signal, for the encoder: its points, channels of a point side by side."""
    series = processor(source, sampling_rate)
    values_TC = series.values_TC[: series.num_points]  # the encoder adds its own zeros
    facts = (float(values_TC.shape[0]), float(values_TC.shape[1]), series.sampling_rate)
    return Item(values_TC.reshape(-1), facts, series.num_tokens)


class ImageTransform(ABC):
    """A random change of training images. A subclass keeps the size of the image.

    Its `repr` is compared when a run is resumed; that of a dataclass says what matters.
    """

    @abstractmethod
    def __call__(self, picture: Image.Image, random: np.random.Generator) -> Image.Image:
        """The image, changed as `random` says."""


@dataclass(frozen=True)
class RandomAffine(ImageTransform):
    """Shifts, rotates and scales about the middle of the image; each by an amount drawn evenly from ± its limit.

    Attributes:
        shift: Most pixels, in both directions.
        rotation: Most degrees.
        scale: Most relative change of size, e.g. 0.1.
        fill: Grey value, 0…255, of what comes in from outside.

    Raises:
        ValueError: If a limit is negative, or scale is not below 1.
    """

    shift: float = 2.0
    rotation: float = 0.0
    scale: float = 0.0
    fill: int = 0

    def __post_init__(self) -> None:
        if min(self.shift, self.rotation, self.scale) < 0 or self.scale >= 1 or not 0 <= self.fill <= 255:
            raise ValueError(f"{self}: limits must not be negative, scale below 1 and fill in 0…255")

    def __call__(self, picture: Image.Image, random: np.random.Generator) -> Image.Image:
        """The image after one affine map, bilinear."""
        right, down, turn, grow = random.uniform(-1, 1, 4)
        angle, size = np.deg2rad(turn * self.rotation), 1.0 + grow * self.scale
        cosine, sine = np.cos(angle) / size, np.sin(angle) / size
        x, y = picture.width / 2, picture.height / 2
        from_x, from_y = x + right * self.shift, y + down * self.shift
        inverse = (cosine, sine, x - cosine * from_x - sine * from_y,
                   -sine, cosine, y + sine * from_x - cosine * from_y)  # fmt: skip
        return picture.transform(
            picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=(self.fill,) * 3
        )
