"""Stride, lengths and normalisation against published values and the plain formula; files, shapes and bad values."""

from __future__ import annotations

import math
import pickle
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_interns1.data.media import MediaError, TimeSeries, TimeSeriesProcessor, signal_files
from lit_interns1.nn.signal_patches import patch_count, patch_stride, token_count

PROCESS = TimeSeriesProcessor()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(3.0, 7.0, shape)


def reference(values: np.ndarray, rate: float | None) -> tuple[np.ndarray, float, int]:
    """Normalised values, rate and tokens by the plain formula, in float64 and the whole series at once."""
    values = (values - values.mean(0, keepdims=True)) / (values.std(0, keepdims=True) + 1e-8)
    values = values[:240_000]
    rate = max(len(values) / 4, 1.0) if rate is None or rate <= 0 else rate
    stride = np.floor(160 / (1 + np.exp(-rate / 100)) ** 6)
    patches = np.ceil((len(values) - 2 * stride) / stride) + 1
    return values, rate, int((patches // 2 + 1) // 2)


@pytest.mark.parametrize(
    ("rate", "stride"),
    [(1, 2), (10, 3), (50, 9), (100, 24), (200, 74), (400, 143), (500, 153), (1000, 159), (16_000, 160)],
)
def test_stride_by_sampling_rate(rate, stride):
    assert patch_stride(rate) == stride


@pytest.mark.parametrize(
    ("rate", "points", "patches", "tokens"),
    [
        (100, 1000, 41, 10),
        (1000, 64_000, 402, 101),
        (16_000, 64_000, 399, 100),
        (16_000, 240_000, 1499, 375),
        (1, 100, 49, 12),
    ],
)
def test_lengths(rate, points, patches, tokens):
    got = PROCESS(noise(points), rate)
    assert (got.num_patches, got.num_tokens, got.num_points) == (patches, tokens, points)
    assert got.values_TC.shape == ((patches - 1) * got.stride + 2 * got.stride, 1)
    assert got.values_TC.unfold(0, 2 * got.stride, got.stride).shape[0] == patches
    assert not got.values_TC[points:].any()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.floats(0.01, 1e6))
def test_lengths_by_the_formula_and_never_without_a_token(points, rate):
    stride = patch_stride(rate)
    assert 2 <= stride <= 160
    patches, tokens = patch_count(points, stride), token_count(points, rate)
    assert (patches - 1) * stride + 2 * stride >= points
    plain = math.ceil((points - 2 * stride) / stride) + 1
    if (plain // 2 + 1) // 2 >= 1:
        assert (patches, tokens) == (plain, (plain // 2 + 1) // 2)
        assert patch_count((patches + 1) * stride, stride) == patches  # the zeros change nothing
    else:
        assert (patches, tokens) == (2, 1)


@pytest.mark.parametrize(("points", "channels"), [(1000, 1), (300_000, 2), (70_000, 20), (5, 3)])
@pytest.mark.parametrize("rate", [None, 0, 44.0, 16_000.0])
def test_values_by_the_formula(points, channels, rate):
    values = noise(points, channels) * 10.0 ** np.arange(channels)
    expected, expected_rate, tokens = reference(values, rate)
    got = PROCESS(values, rate)
    assert got.num_points == len(expected)
    assert got.sampling_rate == expected_rate
    assert got.num_tokens == max(tokens, 1)
    torch.testing.assert_close(got.values_TC[: len(expected)], torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_the_whole_series():
    values = np.concatenate([np.zeros(240_000), np.full(240_000, 2.0)])
    got = PROCESS(values, 100.0)
    assert got.num_points == 240_000
    assert torch.equal(got.values_TC[:240_000], torch.full((240_000, 1), -1.0))
    assert TimeSeriesProcessor(max_points=7)(values).num_points == 7


def test_blocks_do_not_show(monkeypatch):
    values = noise(1000, 3)
    whole = PROCESS(values).values_TC
    monkeypatch.setattr(signal_files, "BLOCK", 64)
    torch.testing.assert_close(PROCESS(values).values_TC, whole, rtol=1e-6, atol=1e-7)


def test_numbers_of_any_kind():
    values = np.arange(-50, 51)
    expected = PROCESS(values.astype(float)).values_TC
    kinds = [values.astype(kind) for kind in (np.int8, np.int64, np.float16, np.float32, ">i2", np.longdouble)]
    unsigned = (values + 50).astype(np.uint8)
    tensors = [torch.tensor(values), torch.tensor(values, dtype=torch.bfloat16), torch.tensor(values + 0.0).double()]
    for source in (*kinds, *tensors, unsigned, values.tolist(), values[:, None], tuple(values.tolist())):
        torch.testing.assert_close(PROCESS(source).values_TC, expected, rtol=1e-6, atol=1e-6)
    large = np.array([2**60, 2**60 + 2**20, 2**60 + 2**21])
    assert PROCESS(large).values_TC[:3, 0].tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449])


def test_short_and_constant_series():
    one = PROCESS([5.0])
    assert (one.num_points, one.num_tokens, one.num_patches, one.sampling_rate) == (1, 1, 2, 1.0)
    assert not one.values_TC.any()
    short = PROCESS(noise(100), 200.0)  # the plain formula has no token here
    assert (short.stride, short.num_tokens, len(short.values_TC)) == (74, 1, 222)
    for value in (0.1, 1e10 / 3, 1e-30, -7.0):
        for points in (3, 7, 100_000):
            assert not PROCESS(np.full(points, value)).values_TC.any()
    tiny = PROCESS([0.0, 1e-8]).values_TC[:2, 0]  # ±5e-9 / (5e-9 + 1e-8)
    assert tiny.tolist() == pytest.approx([-1 / 3, 1 / 3])
    far = 1e9 + noise(10_000)
    assert PROCESS(far).values_TC[:10_000].std(correction=0) == pytest.approx(1.0, abs=1e-4)


def test_layouts():
    values = noise(50, 3)
    assert torch.equal(TimeSeriesProcessor(time_axis=1)(values.T).values_TC, PROCESS(values).values_TC)
    assert TimeSeriesProcessor(time_axis=0)(values.T).values_TC.shape[1] == 50
    assert TimeSeriesProcessor(time_axis=1)(values[:, 0]).num_points == 50
    assert PROCESS(noise(1, 1)).num_tokens == 1
    for shape in ((3, 50), (4, 4), (1, 9)):
        with pytest.raises(MediaError, match=r"may be \(T, C\) or \(C, T\); say time_axis=0"):
            PROCESS(noise(*shape))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no points"),
        (np.zeros((0, 3)), "no points"),
        (np.zeros((5, 0)), "no points"),
        (np.float64(3.0), r"shape \(T,\) or \(T, C\)"),
        (np.zeros((5, 2, 2)), r"shape \(T,\) or \(T, C\)"),
        (np.zeros(5, complex), "dtype complex128"),
        (np.zeros(5, bool), "dtype bool"),
        (["a", "b"], "dtype <U1"),
        ([1, "b"], "dtype <U"),
        ([[1.0, 2.0], [3.0]], "no rectangular series"),
        ([None, None], "dtype object"),
        (None, "dtype object"),
        (np.array([1.0, 2.0, np.nan, 3.0]), "values must be finite, got nan at point 2, channel 0"),
        (np.array([1.0, -np.inf]), "got -inf at point 1, channel 0"),
        (np.array([[1.0, 2.0], [2.0, 3.0], [0.0, np.inf]]), "got inf at point 2, channel 1"),
        (np.array([1e200, -1e200]), "variance exceeds the range of float64"),
        (np.array([1.7e308, -1.7e308]), "variance exceeds the range of float64"),
        (np.zeros((1000, 257)), "257 channels are more than max_channels=256"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(MediaError, match=message):
        PROCESS(values)


def test_nan_is_found_in_any_block(monkeypatch):
    monkeypatch.setattr(signal_files, "BLOCK", 64)
    values = noise(1000)
    values[777] = np.nan
    with pytest.raises(MediaError, match="nan at point 777"):
        PROCESS(values)
    with pytest.raises(MediaError, match="nan at point 777"):  # also behind the points that are kept
        TimeSeriesProcessor(max_points=10)(values)


def test_bad_rates_and_options():
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(MediaError, match=f"sampling_rate={rate}"):
            PROCESS([1.0, 2.0], rate)
    for options in ({"max_points": 0}, {"max_channels": 0}, {"time_axis": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
            TimeSeriesProcessor(**options)


def test_numpy_files(tmp_path: Path):
    values = noise(500, 2)
    expected = PROCESS(values)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", np.asfortranarray(values))
    np.savez(tmp_path / "one.npz", signal=values)
    np.savez_compressed(tmp_path / "two.npz", signal=values, other=values[:9])
    for name in ("a.npy", "b.npy", "one.npz"):
        assert torch.equal(PROCESS(tmp_path / name).values_TC, expected.values_TC)
    assert torch.equal(
        TimeSeriesProcessor(archive_key="signal")(str(tmp_path / "two.npz")).values_TC, expected.values_TC
    )
    with pytest.raises(MediaError, match="archive_key must name one of the arrays signal, other"):
        PROCESS(tmp_path / "two.npz")
    with pytest.raises(MediaError, match="archive_key='x' is not among the arrays signal, other"):
        TimeSeriesProcessor(archive_key="x")(tmp_path / "two.npz")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", a=np.array([{}]))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:3000])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "one.npz").read_bytes()[:3000])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npz").write_bytes(b"text")
    for name in ("objects.npy", "objects.npz", "cut.npy", "cut.npz", "empty.npy", "text.npz"):
        with pytest.raises(MediaError, match=f"{name}: damaged, or no array of numbers"):
            PROCESS(tmp_path / name)


def test_archives_that_unpack_to_much(tmp_path: Path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(100_000))
    monkeypatch.setattr(signal_files, "MAX_ARCHIVE_BYTES", 799_999)
    with pytest.raises(MediaError, match="unpacks to 800,000 bytes, more than 799,999"):
        PROCESS(tmp_path / "a.npz")


def test_csv_files(tmp_path: Path):
    values = noise(300, 2)
    file = tmp_path / "a.csv"
    expected = PROCESS(values).values_TC
    lines = [f"{a!r},{b!r}" for a, b in values.tolist()]
    for text in (
        "\n".join(lines),
        "left,right\r\n" + "\r\n".join(lines) + "\r\n",
        "\ufeff" + "\n".join(lines) + "\n\n",
    ):
        file.write_text(text, encoding="utf-8", newline="")
        assert torch.equal(PROCESS(file).values_TC, expected)
    bad = [
        ("1,2\n3\n", "line 2: 1 columns, 2 in the first line"),
        ("1,2\n3,x\n", "line 2: not a number"),
        ("1,2\n3,\n", "line 2: not a number"),
        ("1,x\n3,4\n", "line 1: not a number"),
        ("1\nnan\n", "got nan at point 1"),
        ("", "no points"),
        ("a,b\n", "no points"),
        ("1,2\n" * 9 + "\n\n1,2\n1,2,3\n", "line 13: 3 columns"),
        ("x,y\n1\n2\n", "line 2: 1 columns, 2 in the first line"),
        ("1_0\n2\n", "lines 1…2: could not convert"),
        ("1," * 300 + "1\n", "301 channels"),
        ("1," * 50_000, "a line of more than"),
    ]
    for text, message in bad:
        file.write_text(text)
        with pytest.raises(MediaError, match=message):
            PROCESS(file)
    file.write_bytes(b"1\n\xff\xfe\n")
    with pytest.raises(MediaError, match="not UTF-8"):
        PROCESS(file)


def test_csv_files_of_several_blocks(tmp_path: Path, monkeypatch):
    values = noise(5000, 2)
    file = tmp_path / "a.csv"
    file.write_text("a,b\n" + "".join(f'{a!r},"{b!r}"\n' for a, b in values.tolist()))
    monkeypatch.setattr(signal_files, "BLOCK", 1000)
    torch.testing.assert_close(PROCESS(file).values_TC, PROCESS(values).values_TC, rtol=1e-6, atol=1e-7)
    with open(file, "a") as stream:
        stream.write("1,x\n")
    with pytest.raises(MediaError, match="line 5002: not a number in '1,x'"):
        PROCESS(file)


def write_wave(path: Path, samples: np.ndarray, width: int, rate: int = 8000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            data = (samples + 128).astype(np.uint8).tobytes()
        else:
            data = b"".join(int(value).to_bytes(width, "little", signed=True) for value in samples.ravel())
        file.writeframes(data)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wave_files(tmp_path: Path, width, channels, monkeypatch):
    monkeypatch.setattr(signal_files, "BLOCK", 100)
    limit = 2 ** (8 * width - 1)
    samples = np.random.default_rng(width).integers(-limit, limit, (777, channels))
    samples[:2] = [[-limit] * channels, [limit - 1] * channels]
    write_wave(tmp_path / "a.wav", samples, width)
    got = PROCESS(tmp_path / "a.wav")
    assert got.sampling_rate == 8000.0
    torch.testing.assert_close(got.values_TC, PROCESS(samples / limit, 8000.0).values_TC, rtol=1e-6, atol=1e-6)
    assert PROCESS(tmp_path / "a.wav", 8000.0).num_tokens == got.num_tokens


def test_bad_wave_files(tmp_path: Path):
    path = tmp_path / "a.wav"
    write_wave(path, np.arange(100)[:, None], 2)
    with pytest.raises(MediaError, match="sampling_rate=44100 Hz, but the file says 8000 Hz"):
        PROCESS(path, 44_100)
    whole = path.read_bytes()
    floats = bytearray(whole)
    floats[20:22] = struct.pack("<H", 3)
    for content, message in (
        (whole[:-50], "truncated"),
        (whole[:-51], "truncated"),
        (whole[:20], "damaged"),
        (b"", "damaged"),
        (floats, "not integer PCM"),
    ):
        path.write_bytes(content)
        with pytest.raises(MediaError, match=message):
            PROCESS(path)


def test_other_paths(tmp_path: Path):
    (tmp_path / "a.mp3").write_bytes(b"")
    with pytest.raises(MediaError, match=r"must end in \.npy, \.npz, \.csv or \.wav"):
        PROCESS(tmp_path / "a.mp3")
    with pytest.raises(MediaError, match="no such file"):
        PROCESS(tmp_path / "a.npy")
    with pytest.raises(MediaError, match="nothing is fetched"):
        PROCESS("https://a/b.npy")


def test_pickles():
    assert pickle.loads(pickle.dumps(PROCESS)) == PROCESS
    assert isinstance(PROCESS([1.0, 2.0]), TimeSeries)
