"""Images and videos at their native resolution, as patches (Intern-S1-Pro, arXiv 2603.25040 §2.3; Qwen3-VL's form).

A frame is resized to multiples of patch · merge, and τ frames make a temporal patch; an image is repeated τ times. With
(t, h, w) the grid in patches of τ × p × p, a patch is a row of C·τ·p·p values (channel, frame, row, column), and the
rows come in merge windows, so that the m·m patches which become one token are neighbours:

    row order (t, h/m, w/m, m, m)        tokens = t · h · w / m²

Shapes: P = t·h·w patches, C = 3 channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lit_interns1.data.media.errors import MediaError
from lit_interns1.data.media.frames import Video, VideoSource, open_video
from lit_interns1.data.media.images import ImageOptions, ImageSource, open_image
from lit_interns1.data.media.resize import (
    check_normalisation,
    check_positive,
    normalise_,
    resize_bicubic,
    smart_resize,
)


@dataclass(frozen=True)
class VisualPatches:
    """The patches of one image or video.

    Attributes:
        pixel_values: (P, C·τ·p·p) float32, in merge-window order.
        grid_thw: (1, 3) int64: temporal patches, rows and columns of patches. Those of several images or videos are
            put together with `torch.cat`, like `pixel_values`.
        num_tokens: Tokens behind the merger, t·h·w/m².
        timestamps: Seconds of every temporal patch of a video; empty for an image.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    num_tokens: int
    timestamps: tuple[float, ...] = ()


@dataclass(frozen=True)
class _NativeResolution:
    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_options: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_positive(
            name,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
            min_pixels=self.min_pixels,
        )
        if self.max_pixels < max(self.min_pixels, self.factor**2):
            raise ValueError(
                f"{name}: max_pixels={self.max_pixels} must be at least min_pixels={self.min_pixels} and one window of "
                f"(patch_size · merge_size)² = {self.factor**2} pixels"
            )
        check_normalisation(name, self.mean, self.std)

    @property
    def factor(self) -> int:
        """Both sides of a resized frame are multiples of this, in pixels."""
        return self.patch_size * self.merge_size

    def _patches(self, num_temporal: int, height: int, width: int) -> np.ndarray:
        """Room for the patches: (t, h·w, C, τ, p, p)."""
        patch = self.patch_size
        grid = (height // patch) * (width // patch)
        return np.empty((num_temporal, grid, 3, self.temporal_patch_size, patch, patch), dtype=np.float32)

    def _cut(self, frame_HWC: np.ndarray) -> np.ndarray:
        """(H, W, C) → (h·w, C, p, p) in merge-window order."""
        height, width, channels = frame_HWC.shape
        patch, merge = self.patch_size, self.merge_size
        windows = frame_HWC.reshape(height // self.factor, merge, patch, width // self.factor, merge, patch, channels)
        return windows.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, patch, patch)

    def _finish(
        self, patches: np.ndarray, height: int, width: int, timestamps: tuple[float, ...] = ()
    ) -> VisualPatches:
        normalise_(patches, self.mean, self.std, channel_axis=2)
        num_temporal, num_spatial = patches.shape[:2]
        pixel_values = torch.from_numpy(patches.reshape(num_temporal * num_spatial, -1))
        grid = torch.tensor([[num_temporal, height // self.patch_size, width // self.patch_size]])
        return VisualPatches(pixel_values, grid, num_temporal * num_spatial // self.merge_size**2, timestamps)


@dataclass(frozen=True)
class NativeImageProcessor(_NativeResolution):
    """Images → patches at native resolution, for the vision encoder of Intern-S1-Pro.

    Attributes:
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per side of a window that becomes one token.
        temporal_patch_size: How often the image is repeated, to fill a temporal patch.
        min_pixels: Fewest pixels of the resized image (`shortest_edge` in the files of the official processor).
        max_pixels: Most pixels of the resized image (`longest_edge` there).
        mean: Mean of red, green and blue, of values in 0…1.
        std: Standard deviation of red, green and blue.
        image_options: How images are opened.

    Raises:
        ValueError: If a size is not positive or max_pixels is less than min_pixels or one window.
    """

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image of `height` × `width` pixels is resized."""
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of `height` × `width` pixels."""
        new_height, new_width = self.target_size(height, width)
        return new_height * new_width // self.factor**2

    def __call__(self, image: ImageSource) -> VisualPatches:
        """Opens an image and cuts it into patches.

        Raises:
            MediaError: If the image cannot be opened (`open_image`).
        """
        picture = open_image(image, self.image_options)
        height, width = self.target_size(picture.height, picture.width)
        patches = self._patches(1, height, width)
        patches[0] = self._cut(resize_bicubic(picture, height, width))[:, :, None]
        return self._finish(patches, height, width)


@dataclass(frozen=True)
class NativeVideoProcessor(_NativeResolution):
    """Videos → patches at native resolution, with a time for each temporal patch.

    Frames are spread evenly from the first to the last; their number follows from `frames_per_second` and the limits.
    The last frame is repeated to fill a temporal patch. A temporal patch has the mean time of its first and last frame.

    Attributes:
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per side of a window that becomes one token.
        temporal_patch_size: Frames per temporal patch.
        min_pixels: Fewest pixels of the resized video, over all frames.
        max_pixels: Most pixels of the resized video, over all frames.
        mean: Mean of red, green and blue, of values in 0…1.
        std: Standard deviation of red, green and blue.
        image_options: How frames are opened.
        frames_per_second: Rate to which the video is thinned out, in Hz.
        min_frames: Fewest frames that are taken, if the video has them.
        max_frames: Most frames that are taken.

    Raises:
        ValueError: As `NativeImageProcessor`; and if the rate is not positive, max_frames is less than min_frames, or
            min_frames is less than one temporal patch.
    """

    min_pixels: int = 4_096
    max_pixels: int = 25_165_824
    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not 0 < self.frames_per_second < math.inf:
            raise ValueError(f"{name}: frames_per_second={self.frames_per_second} must be a positive number")
        if self.min_frames < self.temporal_patch_size:
            raise ValueError(
                f"{name}: min_frames={self.min_frames} is less than temporal_patch_size={self.temporal_patch_size}"
            )
        if self.max_frames < self.min_frames:
            raise ValueError(f"{name}: max_frames={self.max_frames} is less than min_frames={self.min_frames}")

    def sample(self, num_frames: int, frames_per_second: float) -> list[int]:
        """Indices of the frames that are taken.

        Args:
            num_frames: Frames of the video.
            frames_per_second: Their rate in Hz.
        """
        wanted = int(num_frames / frames_per_second * self.frames_per_second)
        wanted = min(max(wanted, self.min_frames), self.max_frames, num_frames)
        return np.linspace(0, num_frames - 1, wanted).round().astype(int).tolist()

    def timestamps(self, indices: Sequence[int], frames_per_second: float) -> tuple[float, ...]:
        """Seconds of every temporal patch that these frames make.

        Args:
            indices: Frames that are taken.
            frames_per_second: Rate of the video in Hz.
        """
        step = self.temporal_patch_size
        seconds = [index / frames_per_second for index in indices]
        seconds += seconds[-1:] * (-len(seconds) % step)
        return tuple((seconds[i] + seconds[i + step - 1]) / 2 for i in range(0, len(seconds), step))

    def target_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width to which `num_frames` frames of `height` × `width` pixels are resized."""
        return smart_resize(
            height, width, self.factor, self.min_pixels, self.max_pixels, num_frames, self.temporal_patch_size
        )

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of `num_frames` frames that were taken, of `height` × `width` pixels."""
        new_height, new_width = self.target_size(num_frames, height, width)
        return -(-num_frames // self.temporal_patch_size) * new_height * new_width // self.factor**2

    def __call__(self, video: VideoSource | Video, frames_per_second: float | None = None) -> VisualPatches:
        """Opens the frames that are taken, one at a time, and cuts them into patches.

        Args:
            video: What `open_video` takes, or what it returns.
            frames_per_second: Rate of the video in Hz; see `open_video`.

        Raises:
            MediaError: If the video cannot be opened, or has fewer frames than a temporal patch.
        """
        if not isinstance(video, Video):
            video = open_video(video, frames_per_second, self.image_options)
        step = self.temporal_patch_size
        if video.num_frames < step:
            raise MediaError(
                f"{video.name}: {video.num_frames} frame(s) are less than temporal_patch_size={step}; "
                "a single picture is an image, not a video"
            )
        indices = self.sample(video.num_frames, video.frames_per_second)
        patches, size = None, (0, 0)
        for position, frame in enumerate(video.read(indices, self.image_options)):
            if patches is None:
                size = self.target_size(len(indices), frame.height, frame.width)
                patches = self._patches(-(-len(indices) // step), *size)
            # the last frame fills what is left of its temporal patch
            slots = slice(position % step, None if position == len(indices) - 1 else position % step + 1)
            patches[position // step, :, :, slots] = self._cut(resize_bicubic(frame, *size))[:, :, None]
        assert patches is not None
        return self._finish(patches, *size, self.timestamps(indices, video.frames_per_second))


def timestamp_text(seconds: float) -> str:
    """The text in front of a temporal patch of a video, such as `<1.5 seconds>`."""
    return f"<{seconds:.1f} seconds>"
