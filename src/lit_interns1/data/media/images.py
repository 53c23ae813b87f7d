"""Opening images: whatever holds a picture becomes an upright RGB image of 8 bits per channel, within limits.

    header → size limits → decode → EXIF orientation → transparency over white → RGB

The size limits are checked on the header, before a pixel is decoded: a file of some kilobytes can claim 20,000 × 20,000
pixels. Nothing is ever fetched: an address is refused. Orientation and the white background are what transformers'
`load_image` and `convert_to_rgb` do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lit_interns1.data.media.errors import MediaError

ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | Tensor
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read. Others are refused: some of Pillow's readers start programs (EPS) or are rare."""
_CHANNELS = (1, 3, 4)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?=//)|data:(?=\w+/)")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ImageOptions:
    """How images are opened.

    Attributes:
        max_pixels: Largest width × height, in pixels, as the header says. The default, 89,478,485, is where Pillow
            starts to warn of decompression bombs. Opening takes up to 16 bytes per pixel. Pillow has a ceiling of its
            own at twice `PIL.Image.MAX_IMAGE_PIXELS`.
        max_aspect_ratio: Largest ratio of the longer to the shorter side.
        transparency: `white`: transparent pixels are blended with white (transformers, qwen-vl-utils). `drop`: the
            alpha channel is left away, and what is under it shows (Pillow's `convert("RGB")`).

    Raises:
        ValueError: If a limit is not positive or `transparency` is unknown.
    """

    max_pixels: int = 89_478_485
    max_aspect_ratio: float = 200.0
    transparency: Literal["white", "drop"] = "white"

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"ImageOptions: max_pixels={self.max_pixels} must be at least 1")
        if not self.max_aspect_ratio >= 1:
            raise ValueError(f"ImageOptions: max_aspect_ratio={self.max_aspect_ratio} must be at least 1")
        if self.transparency not in ("white", "drop"):
            raise ValueError(f"ImageOptions: transparency={self.transparency!r} must be 'white' or 'drop'")

    def check_size(self, width: int, height: int, name: str) -> None:
        """Refuses an image that is empty, too large or too thin.

        Args:
            width: Width in pixels.
            height: Height in pixels.
            name: What to call the image in the message.

        Raises:
            MediaError: If the size breaks a limit.
        """
        if width < 1 or height < 1:
            raise MediaError(f"{name}: the image has no pixels ({width} × {height})")
        if width * height > self.max_pixels:
            raise MediaError(
                f"{name}: {width} × {height} = {width * height:,} pixels are more than max_pixels={self.max_pixels:,}"
            )
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise MediaError(
                f"{name}: the sides of {width} × {height} have a ratio of {max(width, height) / min(width, height):g}, "
                f"more than max_aspect_ratio={self.max_aspect_ratio:g}"
            )


DEFAULT_OPTIONS = ImageOptions()


def open_image(source: ImageSource, options: ImageOptions = DEFAULT_OPTIONS) -> Image.Image:
    """An upright RGB image.

    Args:
        source: A path, the bytes of a file, a Pillow image, or an array or tensor (H, W), (H, W, C) or (C, H, W) with
            C = 1, 3 or 4: integers in 0…255, or floats in 0…1. Of an animation, the first frame.
        options: Limits and the treatment of transparency.

    Raises:
        MediaError: For an address, a missing, damaged, truncated or unknown file, a size beyond the limits, or values
            that are no 8-bit colours. Of 16-bit grey images the upper 8 bits are taken, as Pillow does with 16-bit
            colour; images of 32-bit numbers are refused, since their range is not known.
    """
    name = describe(source)
    if isinstance(source, Image.Image):
        return to_rgb(source, options, name)
    if isinstance(source, (np.ndarray, Tensor)):
        return _convert(_from_array(source, options, name), options, name)
    with open_file(source) as picture:
        return to_rgb(picture, options, name)


def describe(source: Any) -> str:
    """What to call a source in messages."""
    if isinstance(source, (str, Path)):
        return str(source)[:300]
    if isinstance(source, bytes):
        return f"{len(source):,} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"{source.mode} image")
    if isinstance(source, (np.ndarray, Tensor)):
        return f"{'tensor' if isinstance(source, Tensor) else 'array'} of shape {tuple(source.shape)}"
    return type(source).__name__


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The values on the CPU; bfloat16, which NumPy has not, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def local_path(source: str | Path) -> Path:
    """The path of a file or directory that exists.

    Raises:
        MediaError: For an address, or if there is nothing.
    """
    if isinstance(source, str) and (address := _ADDRESS.match(source)):
        raise MediaError(
            f"{describe(source)}: {address[0]} addresses are not read, nothing is fetched; give a path or bytes"
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise MediaError(f"{path}: no such file or directory")
    return path


def open_file(source: str | Path | bytes) -> Image.Image:
    """Reads the header of an image file; the pixels come when they are needed. Close it, or use `with`.

    Raises:
        MediaError: If it is no file of the `FORMATS`.
    """
    name = describe(source)
    if isinstance(source, bytes):
        file: Path | BytesIO = BytesIO(source)
    elif isinstance(source, (str, Path)):
        file = local_path(source)
        if not file.is_file():
            raise MediaError(f"{name}: not a file")
    else:
        raise MediaError(f"an image is a path, bytes, a Pillow image, an array or a tensor; got {name}")
    Image.init()
    formats = [entry for entry in FORMATS if entry in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {error} To allow it, raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image, or damaged; formats that are read are {', '.join(formats)}") from error
    except MemoryError:
        raise
    except Exception as error:  # the readers of damaged files raise almost anything
        raise MediaError(f"{name}: cannot be opened ({error})") from error


def decoding(name: str, work: Callable[[], _Result]) -> _Result:
    """Does some decoding; whatever a decoder raises on damaged data becomes a `MediaError`."""
    try:
        return work()
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise MediaError(f"{name}: damaged or truncated image ({error})") from error


def to_rgb(picture: Image.Image, options: ImageOptions, name: str) -> Image.Image:
    """Decodes the current frame of an opened image: upright, RGB."""
    options.check_size(*picture.size, name)

    def upright() -> Image.Image:
        picture.load()
        return ImageOps.exif_transpose(picture)

    return decoding(name, lambda: _convert(upright(), options, name))


def _convert(picture: Image.Image, options: ImageOptions, name: str) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise MediaError(f"{name}: 32-bit pixels (mode {picture.mode}) have no known range; scale them to 0…255")
    transparent = "A" in picture.getbands() or picture.info.get("transparency") is not None
    if transparent and options.transparency == "white":
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _from_array(source: np.ndarray | Tensor, options: ImageOptions, name: str) -> Image.Image:
    values = as_numpy(source) if isinstance(source, Tensor) else source
    if values.ndim == 3:
        first, last = values.shape[0] in _CHANNELS, values.shape[-1] in _CHANNELS
        if first == last:
            either = "both its first and its last axis" if first else "neither its first nor its last axis"
            raise MediaError(f"{name}: {either} could be the channels (1, 3 or 4); give a Pillow image")
        values = np.moveaxis(values, 0, -1) if first else values
        values = values[..., 0] if values.shape[-1] == 1 else values
    elif values.ndim != 2:
        raise MediaError(f"{name}: an image has the shape (H, W), (H, W, C) or (C, H, W)")
    options.check_size(values.shape[1], values.shape[0], name)
    if values.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(values))
    floats = np.issubdtype(values.dtype, np.floating)
    if not floats and not np.issubdtype(values.dtype, np.integer):
        raise MediaError(f"{name}: dtype {values.dtype} is neither an integer nor a float")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (1 if floats else 255)):
        limits = "floats in 0…1" if floats else "integers in 0…255"
        raise MediaError(f"{name}: values must be {limits}, got {low}…{high}")
    return Image.fromarray(np.rint(values * 255.0).astype(np.uint8) if floats else values.astype(np.uint8))
