"""Pixels equal those of transformers' image processors; every kind of picture opens upright in RGB, or is refused."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader

from lit_interns1.data.media import (
    ImageOptions,
    MediaError,
    NativeImageProcessor,
    TileProcessor,
    VisualPatches,
    open_image,
)

SIZES = [  # (height, width): tiny, thin, odd, exact multiples, at and around the limits of 65,536 pixels
    *[(1, 1), (1, 2), (2, 1), (3, 5), (7, 7), (16, 16), (31, 33), (32, 32), (47, 48), (48, 47), (1, 200), (200, 1)],
    *[(2, 400), (400, 2), (3, 599), (5, 1000), (1000, 5), (11, 2200), (20, 1999), (1999, 20), (64, 64), (64, 1024)],
    *[(255, 257), (256, 256), (256, 255), (257, 256), (240, 272), (272, 240), (100, 655), (100, 656), (300, 200)],
    *[(448, 448), (449, 447), (448, 896), (896, 448), (223, 669), (480, 640), (640, 480), (512, 768), (360, 640)],
    *[(333, 999), (999, 333), (500, 500), (634, 633), (300, 401), (399, 301), (270, 480), (123, 457), (901, 37)],
    *[(112, 1120), (784, 224)],
]


@cache
def picture(height: int, width: int) -> Image.Image:
    """Noise over gradients: sharp enough for a wrong filter or a wrong place to show."""
    generator = np.random.default_rng([height, width])
    ramp = np.linspace(0, 255, width)[None, :, None] * [1, 0.5, 0] + np.linspace(0, 255, height)[:, None, None] * [
        0,
        0.5,
        1,
    ]
    noise = generator.integers(0, 256, (height, width, 3))
    return Image.fromarray(np.where(generator.random((height, width, 1)) < 0.5, ramp, noise).astype(np.uint8))


def qwen(**size):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    half = [0.5] * 3
    return module.Qwen2VLImageProcessorPil(
        patch_size=size.pop("patch_size", 16), size=size, image_mean=half, image_std=half, **{"merge_size": 2}
    )


def internvl(**options):
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    return module.GotOcr2ImageProcessorPil(
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], crop_to_patches=True, **options
    )


def test_native_patches_equal_qwen2_vl():
    assert len(SIZES) >= 50
    theirs, ours = qwen(shortest_edge=65_536, longest_edge=16_777_216), NativeImageProcessor()
    for height, width in SIZES:
        expected = theirs(picture(height, width), return_tensors="pt")
        got = ours(picture(height, width))
        assert torch.equal(got.grid_thw, expected["image_grid_thw"]), (height, width)
        assert torch.equal(got.pixel_values, expected["pixel_values"]), (height, width)
        tokens = int(expected["image_grid_thw"].prod()) // 4
        assert got.num_tokens == ours.num_tokens(height, width) == tokens
        assert got.timestamps == ()


@pytest.mark.parametrize(
    ("patch_size", "min_pixels", "max_pixels"), [(4, 64, 4_096), (14, 3_136, 100_352), (16, 65_536, 65_536)]
)
def test_native_options_equal_qwen2_vl(patch_size, min_pixels, max_pixels):
    theirs = qwen(patch_size=patch_size, shortest_edge=min_pixels, longest_edge=max_pixels)
    ours = NativeImageProcessor(patch_size=patch_size, min_pixels=min_pixels, max_pixels=max_pixels)
    for height, width in SIZES[::4]:
        expected = theirs(picture(height, width), return_tensors="pt")
        got = ours(picture(height, width))
        assert torch.equal(got.grid_thw, expected["image_grid_thw"])
        assert torch.equal(got.pixel_values, expected["pixel_values"])


def test_patches_lie_in_merge_windows():
    """Without resizing: value (C, frame, row, column) of a patch, and patches by windows of 2 × 2."""
    pixels = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    processor = NativeImageProcessor(
        patch_size=2, merge_size=2, temporal_patch_size=3, min_pixels=1, mean=(0,) * 3, std=(1,) * 3
    )
    got = processor(pixels)
    assert got.grid_thw.tolist() == [[1, 4, 8]]
    assert got.pixel_values.shape == (32, 36)
    assert got.num_tokens == 8
    rows = got.pixel_values.reshape(2, 4, 2, 2, 3, 3, 2, 2)  # window row, window column, row, column, C, frame, y, x
    for window_row, window_column, row, column, channel, frame, y, x in np.ndindex(2, 4, 2, 2, 3, 3, 2, 2):
        value = pixels[window_row * 4 + row * 2 + y, window_column * 4 + column * 2 + x, channel]
        found = rows[window_row, window_column, row, column, channel, frame, y, x]
        assert round(float(found) * 255) == value


def test_tiles_equal_internvl():
    theirs, ours = internvl(size={"height": 448, "width": 448}), TileProcessor()
    for height, width in SIZES[::7]:
        expected = theirs(picture(height, width), return_tensors="pt")
        got = ours(picture(height, width))
        assert torch.equal(got.pixel_values, expected["pixel_values"]), (height, width)
        assert got.num_tiles == ours.num_tiles(height, width) == expected["num_patches"][0]


@pytest.mark.parametrize(("smallest", "largest"), [(1, 12), (3, 7), (1, 1), (4, 40)])
def test_small_tiles_equal_internvl(smallest, largest):
    theirs = internvl(size={"height": 28, "width": 28}, min_patches=smallest, max_patches=largest)
    ours = TileProcessor(tile_size=28, min_tiles=smallest, max_tiles=largest)
    for height, width in SIZES if largest == 12 else SIZES[::4]:
        expected = theirs(picture(height, width), return_tensors="pt")
        assert torch.equal(ours(picture(height, width)).pixel_values, expected["pixel_values"]), (height, width)


def test_grids_equal_internvl_for_many_sizes():
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    sizes = np.random.default_rng(0).integers(1, 3000, (3000, 2)).tolist()
    sizes += [[a * 100, b * 100] for a in range(1, 13) for b in range(1, 13)]  # ties
    for height, width in sizes:
        expected = module.get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        assert TileProcessor().grid(height, width) == expected


def test_published_sizes():
    """Intern-S1-Pro: 512 × 768 → 32 × 48 patches, 384 tokens. Tiles: a square image of one tile has no thumbnail."""
    assert NativeImageProcessor()(picture(512, 768)).grid_thw.tolist() == [[1, 32, 48]]
    assert NativeImageProcessor().num_tokens(512, 768) == 384
    assert TileProcessor().num_tiles(448, 448) == 1
    assert TileProcessor().num_tiles(448, 896) == 3
    assert TileProcessor(thumbnail=False).num_tiles(448, 896) == 2
    assert len(TileProcessor(thumbnail=False, tile_size=8)(picture(8, 16)).pixel_values) == 2


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_sources_are_one_picture(tmp_path: Path):
    image = picture(20, 30)
    expected = np.asarray(image)
    (tmp_path / "a.png").write_bytes(encoded(image))
    array = np.asarray(image)
    first = np.moveaxis(array, -1, 0)
    sources = [
        tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), encoded(image, "BMP"), encoded(image, "TIFF"),
        encoded(image, "WEBP", lossless=True), image, array, first, array.astype(np.int64), torch.tensor(array),
        torch.tensor(first.copy()), array / 255, torch.tensor(array / 255), (array / 255).astype(np.float32),
    ]  # fmt: skip
    for source in sources:
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), expected), type(source)
    grey = array[..., 0]
    for source in (grey, grey[..., None], grey[None], torch.tensor(grey), encoded(Image.fromarray(grey))):
        assert np.array_equal(np.asarray(open_image(source)), np.repeat(grey[..., None], 3, -1))
    assert np.asarray(open_image(np.full((2, 2), 0.999, np.float32))).min() == 255  # rounded, not cut
    halves = torch.tensor(array / 255, dtype=torch.bfloat16)
    assert np.abs(np.asarray(open_image(halves)).astype(int) - array).max() <= 1
    assert (
        np.abs(np.asarray(open_image(encoded(image, "JPEG", quality=100, subsampling=0))).astype(int) - array).max() < 9
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_transformers(orientation, tmp_path: Path):
    utilities = pytest.importorskip("transformers.image_utils")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(20, 30), exif=exif))
    expected = np.asarray(utilities.load_image(str(path)))
    assert np.array_equal(np.asarray(open_image(path)), expected)
    assert (expected.shape[:2] == (30, 20)) == (orientation > 4)
    with Image.open(path) as image:  # an image that carries its EXIF is turned, too, and is not changed itself
        assert np.array_equal(np.asarray(open_image(image)), expected)
        assert image.size == (30, 20)


def test_transparency_is_white_or_dropped():
    transforms = pytest.importorskip("transformers.image_transforms")
    rgba = picture(9, 9).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9) * 3))
    palette = picture(9, 9).quantize(8)
    cases = [
        rgba, rgba.convert("LA"), Image.open(io.BytesIO(encoded(palette, "PNG", transparency=3))),
        Image.open(io.BytesIO(encoded(picture(9, 9), "PNG", transparency=(255, 0, 0)))),
        Image.open(io.BytesIO(encoded(palette, "GIF", transparency=2))), palette, picture(9, 9).convert("CMYK"),
        picture(9, 9).convert("1"), picture(9, 9).convert("YCbCr"),
    ]  # fmt: skip
    for image in cases:
        expected = transforms.convert_to_rgb(image, return_numpy=True)
        assert np.array_equal(np.asarray(open_image(image)), expected), image.mode
        dropped = open_image(image, ImageOptions(transparency="drop"))
        assert np.array_equal(np.asarray(dropped), np.asarray(image.convert("RGB"))), image.mode
    assert np.array_equal(np.asarray(open_image(np.asarray(rgba))), np.asarray(open_image(rgba)))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(open_image(clear)).min() == 255


def test_sixteen_bits_are_cut_to_eight():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        got = np.asarray(open_image(encoded(Image.fromarray(values), kind)))
        assert np.array_equal(got[..., 1], values // 256)
    for mode in ("I", "F"):
        with pytest.raises(MediaError, match=f"mode {mode}"):
            open_image(Image.new(mode, (4, 4)))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG that claims a size and holds these chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (header, *chunks, (b"IEND", b""))
    )


def test_sizes_beyond_the_limits(monkeypatch):
    for source in (
        Image.new("RGB", (0, 5)),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        torch.zeros(3, 5, 0),
    ):
        with pytest.raises(MediaError, match="no pixels"):
            open_image(source)
    monkeypatch.setattr("PIL.Image.warnings.warn", lambda *arguments: None)  # Pillow's own, of large images
    for header in (png(20_000, 20_000), png(12_000, 9_000), png(2**31 - 1, 2**31 - 1)):
        with pytest.raises(MediaError, match=r"pixels|MAX_IMAGE_PIXELS"):
            open_image(header)
    with pytest.raises(MediaError, match=r"30 × 20 = 600 pixels are more than max_pixels=599"):
        open_image(picture(20, 30), ImageOptions(max_pixels=599))
    with pytest.raises(MediaError, match="max_pixels=599"):
        open_image(np.asarray(picture(20, 30)), ImageOptions(max_pixels=599))
    assert open_image(picture(20, 30), ImageOptions(max_pixels=600)).size == (30, 20)
    assert open_image(picture(1, 200)).size == (200, 1)
    for height, width in ((1, 201), (603, 3)):
        with pytest.raises(MediaError, match="ratio of 201, more than max_aspect_ratio=200"):
            open_image(picture(height, width))
    assert open_image(picture(1, 201), ImageOptions(max_aspect_ratio=201)).size == (201, 1)


def test_damaged_and_foreign_files(tmp_path: Path):
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000"):
        data = encoded(picture(64, 64), kind)
        with pytest.raises(MediaError, match=r"damaged|opened"):
            open_image(data[: len(data) // 2])
    (tmp_path / "a.png").write_bytes(encoded(picture(64, 64))[:-400])
    with pytest.raises(MediaError, match=r"a\.png: damaged or truncated"):
        open_image(tmp_path / "a.png")
    for source in (b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"):
        with pytest.raises(MediaError, match=r"not an image, or damaged; formats that are read are .*PNG"):
            open_image(source)
    with pytest.raises(MediaError, match="no such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(MediaError, match="not a file"):
        open_image(tmp_path)
    for source in (None, 3, [1]):
        with pytest.raises(MediaError, match="an image is a path"):
            open_image(source)  # type: ignore[arg-type]


def test_text_that_unpacks_to_much():
    """Pillow's limit for texts raises a `ValueError`, while the file is opened or while it is decoded."""
    pixels, text = (b"IDAT", zlib.compress(bytes(20))), (b"zTXt", b"k\0\0" + zlib.compress(bytes(5_000_000)))
    assert open_image(png(4, 4, pixels)).size == (4, 4)
    for chunks, message in (((text, pixels), "cannot be opened"), ((pixels, text), "damaged or truncated")):
        with pytest.raises(MediaError, match=message):
            open_image(png(4, 4, *chunks))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"]), st.data())
def test_any_damage_is_a_picture_or_a_media_error(kind, data):
    original = bytearray(encoded(picture(24, 24), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MediaError):
        assert open_image(bytes(original)).mode == "RGB"


@pytest.mark.parametrize(
    "address", ["http://a/b.png", "HTTPS://a/b.png", "s3://a/b", "file:///b", "data:image/png;base64,AA"]
)
def test_addresses_are_refused(address):
    with pytest.raises(MediaError, match="nothing is fetched"):
        open_image(address)


def test_a_name_with_a_colon_is_a_path(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http_a.png", "a:b.png", "data:x"):
        Path(name).write_bytes(encoded(picture(4, 4)))
        assert open_image(name).size == (4, 4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 3), np.uint8), "both its first and its last axis"),
        (np.zeros((8, 8, 2), np.uint8), "neither its first nor its last axis"),
        (np.zeros(8, np.uint8), "has the shape"),
        (np.full((8, 8), 256), r"integers in 0…255, got 256…256"),
        (np.full((8, 8), -1), r"integers in 0…255"),
        (np.full((8, 8), 1.01), r"floats in 0…1"),
        (np.full((8, 8), np.nan), r"floats in 0…1"),
        (np.zeros((8, 8), bool), "dtype bool"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(MediaError, match=message):
        open_image(array)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageOptions(max_pixels=0), "max_pixels=0"),
        (lambda: ImageOptions(max_aspect_ratio=0.5), "max_aspect_ratio"),
        (lambda: ImageOptions(transparency="black"), "transparency='black'"),  # type: ignore[arg-type]
        (lambda: NativeImageProcessor(patch_size=0), "patch_size=0"),
        (lambda: NativeImageProcessor(min_pixels=0), "min_pixels=0"),
        (lambda: NativeImageProcessor(max_pixels=1000), "max_pixels=1000"),
        (lambda: NativeImageProcessor(min_pixels=1, max_pixels=1023), "one window of"),
        (lambda: NativeImageProcessor(std=(1.0, 0.0, 1.0)), "std="),
        (lambda: NativeImageProcessor(mean=(1.0, float("nan"), 1.0)), "mean="),
        (lambda: TileProcessor(tile_size=0), "tile_size=0"),
        (lambda: TileProcessor(min_tiles=0), "min_tiles=0"),
        (lambda: TileProcessor(min_tiles=3, max_tiles=2), "max_tiles=2 is less than min_tiles=3"),
        (lambda: TileProcessor(std=(1.0, 1.0)), "std="),  # type: ignore[arg-type]
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_from_yaml_and_in_loader_workers():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--processor", type=NativeImageProcessor | TileProcessor)
    read = parser.parse_string(
        "processor:\n  class_path: lit_interns1.data.media.NativeImageProcessor\n"
        "  init_args: {patch_size: 4, min_pixels: 64, image_options: {max_pixels: 5000, transparency: drop}}\n"
    )
    processor = parser.instantiate(read).processor
    expected = NativeImageProcessor(
        patch_size=4, min_pixels=64, image_options=ImageOptions(max_pixels=5000, transparency="drop")
    )
    assert processor == expected
    assert pickle.loads(pickle.dumps(processor)) == processor
    loader = DataLoader([picture(9, 40), picture(30, 7)], batch_size=None, num_workers=1, collate_fn=processor)
    for got, image in zip(loader, (picture(9, 40), picture(30, 7))):
        assert isinstance(got, VisualPatches)
        assert torch.equal(got.pixel_values, processor(image).pixel_values)
