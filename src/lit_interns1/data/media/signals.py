"""Time series of any sampling rate, ready for an encoder that chooses its patches from the rate (Intern-S1-Pro).

    x_c   = (x_c − mean_c) / (std_c + 1e-8)     per channel c, over the whole series; then the first 240,000 points

(arXiv 2603.25040 §2.5; as in LMDeploy's inference code.) Stride, number of patches and tokens follow from the sampling
rate in Hz (`lit_interns1.nn.signal_patches`); where none is known, it is max(T/4, 1). Zeros, i.e. the mean, fill the
last patch, and extend a series of at most one patch to two.

Shapes: T points, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_interns1.data.media.errors import MediaError
from lit_interns1.data.media.resize import check_positive
from lit_interns1.data.media.signal_files import SignalSource, open_signal
from lit_interns1.nn.signal_patches import MAX_POINTS, patch_count, patch_stride, token_count


@dataclass(frozen=True)
class TimeSeries:
    """A normalised series.

    Attributes:
        values_TC: ((L − 1)·s + p, C) float32: the normalised points, then zeros.
        sampling_rate: Hz, given, read from the file, or max(T/4, 1).
        num_points: T, points in front of the zeros.
        stride: s, in points; a patch is twice as long.
        num_patches: L.
        num_tokens: Tokens that the encoder makes of it.
    """

    values_TC: Tensor
    sampling_rate: float
    num_points: int
    stride: int
    num_patches: int
    num_tokens: int


@dataclass(frozen=True)
class TimeSeriesProcessor:
    """Series → normalised points with the stride and the number of tokens.

    The series is read in blocks: of 10⁷ points, only the first `max_points` are ever kept.

    Attributes:
        max_points: Points that are kept, per channel. Mean and deviation are those of the whole series.
        max_channels: Most channels.
        time_axis: Which axis of a 2-D array is time: 0 for (T, C), 1 for (C, T). None takes (T, C), and refuses arrays
            that have not more points than channels, for which this is doubtful.
        archive_key: Which array of a `.npz` file; may be left out if there is one.

    Raises:
        ValueError: If a limit is not positive, or the axis is neither 0 nor 1.
    """

    max_points: int = MAX_POINTS
    max_channels: int = 256
    time_axis: int | None = None
    archive_key: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_positive(name, max_points=self.max_points, max_channels=self.max_channels)
        if self.time_axis not in (None, 0, 1):
            raise ValueError(f"{name}: time_axis={self.time_axis} must be 0, 1 or null")

    def __call__(self, source: SignalSource, sampling_rate: float | None = None) -> TimeSeries:
        """Reads and normalises a series.

        Args:
            source: An array or tensor (T,), (T, C) or, with `time_axis=1`, (C, T), of integers or floats; or the path
                of a `.npy`, `.npz`, `.csv` or `.wav` file.
            sampling_rate: Hz. None or 0: that of the `.wav` file, else max(T/4, 1) with T after the cut.

        Raises:
            MediaError: If the series is empty, holds NaN or infinities or no numbers, has too many channels, cannot be
                read, or if `sampling_rate` is negative or differs from that of the file.
        """
        if sampling_rate is not None and not 0 <= sampling_rate < math.inf:
            raise MediaError(f"sampling_rate={sampling_rate} must be a finite number of Hz, or 0 or null if unknown")
        signal = open_signal(source, self.time_axis, self.archive_key, self.max_channels)
        if sampling_rate and signal.sampling_rate and sampling_rate != signal.sampling_rate:
            raise MediaError(
                f"{signal.name}: sampling_rate={sampling_rate:g} Hz, but the file says {signal.sampling_rate:g} Hz"
            )
        normalised_TC = _normalise(signal.blocks, self.max_points, signal.name)
        num_points = len(normalised_TC)
        rate = float(sampling_rate or signal.sampling_rate or max(num_points / 4, 1.0))
        stride = patch_stride(rate)
        num_patches = patch_count(num_points, stride)
        values_TC = np.zeros(((num_patches + 1) * stride, normalised_TC.shape[1]), dtype=np.float32)
        values_TC[:num_points] = normalised_TC
        return TimeSeries(
            torch.from_numpy(values_TC), rate, num_points, stride, num_patches, token_count(num_points, rate)
        )


def _normalise(blocks: Iterable[np.ndarray], max_points: int, name: str) -> np.ndarray:
    """The first `max_points` points, normalised with the moments of all; blocks are (n, C) of any number type.

    Moments are added up in float64 around the first point, by the rule for joining two sets (Chan et al. 1979): with n,
    μ and M = Σ(x − μ)², M ← M + M' + (μ' − μ)² · n·n'/(n + n').
    """
    count, start_C, mean_C, moment_C = 0, np.zeros(1), np.zeros(1), np.zeros(1)
    kept: list[np.ndarray] = []
    for block in blocks:
        values = block.astype(np.float64)
        if not np.isfinite(values).all():
            row, channel = np.argwhere(~np.isfinite(values))[0]
            found = f"{values[row, channel]} at point {count + row}, channel {channel}"
            raise MediaError(f"{name}: values must be finite, got {found}")
        if count == 0:
            start_C = values[0].copy()
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is found below
            values -= start_C
            joined = count + len(values)
            shift_C = values.mean(axis=0) - mean_C
            moment_C = moment_C + np.square(values - values.mean(axis=0)).sum(axis=0)
            moment_C = moment_C + shift_C**2 * (count * len(values) / joined)
            mean_C = mean_C + shift_C * (len(values) / joined)
        if (missing := max_points - count) > 0:
            kept.append(values[:missing].copy())
        count = joined
    if count == 0:
        raise MediaError(f"{name}: the series has no points")
    std_C = np.sqrt(moment_C / count)
    if not (np.isfinite(mean_C).all() and np.isfinite(std_C).all()):
        raise MediaError(f"{name}: values are too large: their variance exceeds the range of float64")
    return ((np.concatenate(kept) - mean_C) / (std_C + 1e-8)).astype(np.float32)
