"""Images, videos and time series: opened within limits, and turned into what the encoders take. No Lightning."""

from __future__ import annotations

from lit_interns1.data.media.errors import MediaError
from lit_interns1.data.media.frames import Video, open_video
from lit_interns1.data.media.images import ImageOptions, open_image
from lit_interns1.data.media.native import NativeImageProcessor, NativeVideoProcessor, VisualPatches, timestamp_text
from lit_interns1.data.media.signals import TimeSeries, TimeSeriesProcessor
from lit_interns1.data.media.tiling import TileProcessor, Tiles

__all__ = [
    "ImageOptions",
    "MediaError",
    "NativeImageProcessor",
    "NativeVideoProcessor",
    "TileProcessor",
    "Tiles",
    "TimeSeries",
    "TimeSeriesProcessor",
    "Video",
    "VisualPatches",
    "open_image",
    "open_video",
    "timestamp_text",
]
