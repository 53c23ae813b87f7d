"""The one error of everything that reads images, videos and time series."""

from __future__ import annotations


class MediaError(ValueError):
    """An image, a video or a time series cannot be used; the message names it and the constraint."""
