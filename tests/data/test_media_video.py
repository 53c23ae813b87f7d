"""Sampling, sizes, grids, patches and times equal those of the Qwen3-VL processor; every source is the same video."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_interns1.data.media import (
    ImageOptions,
    MediaError,
    NativeImageProcessor,
    NativeVideoProcessor,
    open_video,
    timestamp_text,
)

SMALL = NativeVideoProcessor(patch_size=4, min_pixels=64, max_pixels=16_384, frames_per_second=2.0)


def clip(frames: int, height: int = 24, width: int = 40) -> np.ndarray:
    """(T, H, W, 3): noise, another in every frame."""
    return np.random.default_rng([frames, height, width]).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def qwen3_vl():
    """The parts of the official processor that run without torchvision."""
    return pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0, 3.7, 23.976, 24.0, 29.97, 60.0])
def test_sampling_equals_qwen3_vl(qwen3_vl, rate):
    metadata = pytest.importorskip("transformers.video_utils").VideoMetadata
    for target, smallest, largest in ((2.0, 4, 768), (1.0, 2, 10), (7.5, 5, 31)):
        theirs = qwen3_vl.Qwen3VLVideoProcessor(fps=target, min_frames=smallest, max_frames=largest)
        ours = NativeVideoProcessor(frames_per_second=target, min_frames=smallest, max_frames=largest)
        for count in (2, 3, 4, 5, 9, 24, 25, 97, 240, 1001, 20_000):
            expected = theirs.sample_frames(metadata(total_num_frames=count, fps=rate)).tolist()
            assert ours.sample(count, rate) == expected


def test_sizes_and_grids_equal_qwen3_vl(qwen3_vl):
    theirs = qwen3_vl.Qwen3VLVideoProcessor(cap_pixels_per_frame=False)
    limits = {"shortest_edge": 4_096, "longest_edge": 25_165_824}
    generator = np.random.default_rng(0)
    sizes = [
        (count, *size) for count in (2, 3, 4, 5, 7, 48, 767, 768) for size in ((1, 1), (5, 900), (31, 33), (1080, 1920))
    ]
    sizes += [(int(t), int(h), int(w)) for t, h, w in generator.integers([2, 1, 1], [769, 2500, 2500], (1500, 3))]
    checked = 0
    for count, height, width in sizes:
        if max(height, width) > 200 * min(height, width):
            continue
        size = qwen3_vl.smart_resize(
            count, height, width, temporal_factor=2, factor=32, min_pixels=4_096, max_pixels=25_165_824
        )
        ours = NativeVideoProcessor()
        assert ours.target_size(count, height, width) == size
        patches = theirs.get_num_of_video_patches(count, height, width, {"size": limits})
        assert ours.num_tokens(count, height, width) == patches // 4
        checked += 1
    assert checked > 1400


@pytest.mark.parametrize("frames", [2, 3, 5, 8])
def test_patches_equal_qwen3_vl(qwen3_vl, frames):
    """The official order of patches, of frames that keep their size; and of resized frames."""
    theirs = qwen3_vl.Qwen3VLVideoProcessor()
    for height, width in ((24, 40), (37, 61)):
        video = clip(frames, height, width)
        got = SMALL(video, frames_per_second=2.0)
        size = SMALL.target_size(frames, height, width)
        resized = [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in video]
        frames_TCHW = torch.tensor(np.stack(resized)).permute(0, 3, 1, 2).float()
        expected, *grid = theirs.patchify((frames_TCHW / 255 - 0.5)[None] / 0.5, 4, 2, 2)
        assert got.grid_thw.tolist() == [grid]
        assert torch.equal(got.pixel_values, expected[0])
        assert got.num_tokens == SMALL.num_tokens(frames, height, width) == len(expected[0]) // 4
        assert len(got.timestamps) == grid[0]


def test_still_video_is_an_image():
    """Two equal frames make the patches of the image."""
    frame = clip(1, 64, 96)[0]
    image = NativeImageProcessor(min_pixels=4_096)(frame)
    video = NativeVideoProcessor()(np.stack([frame, frame]), frames_per_second=1)
    assert torch.equal(image.pixel_values, video.pixel_values)
    assert torch.equal(image.grid_thw, video.grid_thw)


def test_timestamps_equal_qwen3_vl():
    processor = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl").Qwen3VLProcessor
    for rate in (0.3, 2.0, 24.0, 29.97):
        for indices in ([0, 1], [0, 12, 24], [3, 5, 9, 40, 77], list(range(0, 500, 7))):
            for step in (1, 2, 3):
                expected = processor._calculate_timestamps(None, list(indices), rate, step)
                ours = NativeVideoProcessor(temporal_patch_size=step)
                assert ours.timestamps(indices, rate) == tuple(expected)
    assert timestamp_text(0.25) == "<0.2 seconds>"
    assert timestamp_text(12.0) == "<12.0 seconds>"


def animated(video: np.ndarray, kind: str, **options) -> bytes:
    frames = [Image.fromarray(frame) for frame in video]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def test_sources_are_one_video(tmp_path: Path):
    video = clip(12)
    expected = SMALL(video, 4.0)
    assert expected.grid_thw[0, 0] == 3
    assert expected.timestamps == (0.25, 1.375, 2.5)  # frames 0, 2 | 4, 7 | 9, 11 at 4 Hz
    for index, frame in enumerate(video):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.png")  # frame10 comes behind frame9
    (tmp_path / "notes.txt").write_text("no frame")
    webp, tiff = animated(video, "WEBP", lossless=True, duration=250), animated(video, "TIFF")
    apng = animated(video, "PNG", duration=250)
    (tmp_path / "a.webp.bin").write_bytes(webp)
    sources = [
        tmp_path, list(video), [Image.fromarray(frame) for frame in video], torch.tensor(video), webp, tiff, apng,
        torch.tensor(video).permute(0, 3, 1, 2), [tmp_path / f"frame{index}.png" for index in range(12)],
        tmp_path / "a.webp.bin", str(tmp_path),
    ]  # fmt: skip
    for source in sources:
        got = SMALL(source, 4.0)
        assert torch.equal(got.pixel_values, expected.pixel_values)
        assert got.timestamps == expected.timestamps
    for source in (webp, apng):  # the file says 250 ms a frame
        assert SMALL(source).timestamps == expected.timestamps
    assert torch.equal(SMALL(open_video(video, 4.0)).pixel_values, expected.pixel_values)


def test_gif_rate_is_the_mean():
    levels = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (0, 255, 0, 255, 0)])
    video = open_video(animated(levels, "GIF", duration=[100, 100, 300, 400, 100]))
    assert video.num_frames == 5
    assert video.frames_per_second == pytest.approx(5.0)
    assert [int(np.asarray(frame).mean()) for frame in video.read([0, 1, 3, 4])] == [0, 255, 255, 0]


def test_only_sampled_frames_are_opened():
    class Frames(list):
        opened: list[int] = []

        def __getitem__(self, index):
            self.opened.append(index)
            return super().__getitem__(index)

    frames = Frames(clip(100))
    SMALL(frames, 25.0)
    assert frames.opened == SMALL.sample(100, 25.0)
    assert len(frames.opened) == 8


def test_what_is_refused(tmp_path: Path):
    webp = animated(clip(6), "WEBP", lossless=True, duration=100)
    still = animated(clip(6), "TIFF")
    cases = [
        (lambda: SMALL(clip(1), 2.0), "1 frame.* less than temporal_patch_size=2"),
        (lambda: SMALL(clip(4)), "the rate of the frames is not known; give frames_per_second"),
        (lambda: SMALL(still), "give frames_per_second"),
        (lambda: SMALL(clip(4), 0.0), "frames_per_second=0.0 must be"),
        (lambda: SMALL(clip(4), float("nan")), "frames_per_second=nan must be"),
        (lambda: SMALL([], 2.0), "no frames"),
        (lambda: SMALL(tmp_path, 2.0), "no frames"),
        (lambda: SMALL(tmp_path / "missing", 2.0), "no such file"),
        (lambda: SMALL("https://a/b.gif", 2.0), "nothing is fetched"),
        (lambda: SMALL(b"nothing", 2.0), "not an image"),
        (lambda: SMALL(webp[: len(webp) // 2], 2.0), "damaged|opened"),
        (lambda: SMALL(clip(4)[0], 2.0), "a video has the shape"),
        (lambda: SMALL(3, 2.0), "a video is a path"),  # type: ignore[arg-type]
        (lambda: SMALL([clip(2)[0], clip(2, 8, 8)[1]], 2.0), "frame 1 has 8 × 8 pixels, the first .* 40 × 24"),
        (lambda: SMALL([clip(2)[0], None], 2.0), "an image is a path"),  # type: ignore[list-item]
        (lambda: NativeVideoProcessor(image_options=ImageOptions(max_pixels=959))(webp), "max_pixels=959"),
        (lambda: open_video(webp, options=ImageOptions(max_pixels=959)), "max_pixels=959"),
        (lambda: NativeVideoProcessor(frames_per_second=0), "frames_per_second=0"),
        (lambda: NativeVideoProcessor(min_frames=1), "min_frames=1 is less than temporal_patch_size=2"),
        (lambda: NativeVideoProcessor(max_frames=3), "max_frames=3 is less than min_frames=4"),
    ]
    for act, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            act()
        assert isinstance(caught.value, MediaError) or "NativeVideoProcessor" in str(caught.value)


def test_pickles():
    assert pickle.loads(pickle.dumps(SMALL)) == SMALL
