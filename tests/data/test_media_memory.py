"""How much memory hostile and large inputs take: peaks of anonymous memory, each in a process of its own."""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]

WATCH = """
import sys, threading, time
import numpy as np
from PIL import Image
from lit_interns1.data.media import *

def live():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

peak, running = live(), True
def watch():
    global peak
    while running:
        peak = max(peak, live())
        time.sleep(0.002)

path = sys.argv[1]
TimeSeriesProcessor()(np.arange(1000)), NativeImageProcessor()(np.zeros((64, 64, 3), np.uint8))  # warm up
start = live()
thread = threading.Thread(target=watch)
thread.start()
try:
{work}
finally:
    running = False
    thread.join()
print("PEAK", max(peak, live()) - start)
"""


def peak_megabytes(work: str, path: Path) -> float:
    """Megabytes that `work` takes at its peak, over what the process had."""
    script = WATCH.replace("{work}", textwrap.indent(textwrap.dedent(work), "    "))
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    megabytes = int(ran.stdout.split("PEAK")[1]) / 1e6
    print(f"{path.name}: {megabytes:.0f} MB")
    return megabytes


def write_bomb(path: Path, side: int) -> None:
    """A valid grey PNG of side × side zeros, compressed while it is written."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze, row = zlib.compressobj(1), bytes(side + 1)
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


REFUSED = """
for processor in (open_image, NativeImageProcessor(), TileProcessor(), lambda path: NativeVideoProcessor()(path, 1.0)):
    try:
        processor(path)
    except MediaError as error:
        assert "20000" in str(error).replace(",", "").replace(" ", "") or "400000000" in str(error), error
    else:
        raise AssertionError("not refused")
"""


def test_a_bomb_is_refused_by_its_header(tmp_path: Path):
    write_bomb(tmp_path / "bomb.png", 20_000)
    assert (tmp_path / "bomb.png").stat().st_size < 5e6
    assert peak_megabytes(REFUSED, tmp_path / "bomb.png") < 20


def test_opening_takes_sixteen_bytes_a_pixel(tmp_path: Path):
    pixels = 4000 * 4000
    Image.new("RGBA", (4000, 4000), (9, 9, 9, 99)).save(tmp_path / "rgba.png", compress_level=1)
    assert peak_megabytes("open_image(path)", tmp_path / "rgba.png") < 16 * pixels / 1e6 + 20


def test_an_image_of_any_size_makes_a_bounded_number_of_patches(tmp_path: Path):
    """24 bytes for each of the resized pixels (float32, three channels, two frames), and the opened image."""
    Image.new("RGB", (8000, 8000), (9, 99, 199)).save(tmp_path / "large.png", compress_level=1)
    assert peak_megabytes("NativeImageProcessor()(path)", tmp_path / "large.png") < (12 * 64 + 32 * 16.78) + 20


def test_a_long_video_is_opened_frame_by_frame(tmp_path: Path):
    """1,000 frames of 480 × 640 (0.9 GB as bytes) thinned out to 500; the patches have 24.8 million pixels."""
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(frame).save(tmp_path / "0.jpg", quality=30)
    for index in range(1, 1000):
        (tmp_path / f"{index}.jpg").hardlink_to(tmp_path / "0.jpg")
    work = "assert NativeVideoProcessor()(path, 4.0).grid_thw[0, 0] == 250"
    assert peak_megabytes(work, tmp_path) < 12 * 25.2 + 40


TEN_MILLION = """
series = TimeSeriesProcessor({options})(path, 1000.0)
assert series.num_points == 240_000 and series.num_tokens == 377, series
"""


@pytest.mark.parametrize("kind", ["npy", "npz", "wav", "csv"])
def test_ten_million_points(kind, tmp_path: Path):
    """Read in blocks: the memory does not depend on the length, but for a .npz, which is unpacked as a whole."""
    points, path = 10_000_000, tmp_path / f"a.{kind}"
    values = np.random.default_rng(0).integers(-32768, 32768, points).astype(np.int16)
    if kind == "npy":
        np.save(path, values.astype(np.float64))
    elif kind == "npz":
        np.savez(path, values)
    elif kind == "csv":
        path.write_text("\n".join(map(str, values.tolist())))
    else:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(1000)
            file.writeframes(values.tobytes())
    whole = 20 if kind == "npz" else 0
    assert peak_megabytes(TEN_MILLION.replace("{options}", ""), path) < 60 + whole
