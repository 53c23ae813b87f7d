"""InternVL's dynamic tiles: an image is cut into 1 to 12 squares, and a thumbnail joins them.

Among the grids of `a` columns and `b` rows with min ≤ a·b ≤ max, in the order of a·b, that with the smallest
|W/H − a/b| is taken; of two that are equally near, the later one if W·H > ½ · tile² · a·b. The image is resized to
(a·tile) × (b·tile), which does not keep its aspect ratio, and cut row by row. More than one tile: the whole image,
resized to one tile, comes last. (InternVL 1.5, arXiv 2404.16821 §3.3; Intern-S1, arXiv 2508.15763 §2.1.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lit_interns1.data.media.images import ImageOptions, ImageSource, open_image
from lit_interns1.data.media.resize import check_normalisation, check_positive, normalise_, resize_bicubic


@dataclass(frozen=True)
class Tiles:
    """The tiles of one image.

    Attributes:
        pixel_values: (n, 3, tile, tile) float32, normalised; row by row, then the thumbnail if there is one.
        columns: Tiles side by side.
        rows: Tiles one below the other.
    """

    pixel_values: Tensor
    columns: int
    rows: int

    @property
    def num_tiles(self) -> int:
        """Tiles, the thumbnail included."""
        return self.pixel_values.shape[0]


@dataclass(frozen=True)
class TileProcessor:
    """Images → tiles, for InternViT (Intern-S1, Intern-S1-mini).

    A frame of a video is one tile: use `max_tiles=1`.

    Attributes:
        tile_size: Side of a tile, in pixels.
        min_tiles: Fewest tiles of an image, without the thumbnail.
        max_tiles: Most tiles of an image, without the thumbnail.
        thumbnail: Whether the whole image joins as one more tile, where there is more than one.
        mean: Mean of red, green and blue, of values in 0…1.
        std: Standard deviation of red, green and blue.
        image_options: How images are opened.

    Raises:
        ValueError: If a number of tiles is not positive or min exceeds max, or the normalisation is no such thing.
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    image_options: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_positive(name, tile_size=self.tile_size, min_tiles=self.min_tiles)
        if self.max_tiles < self.min_tiles:
            raise ValueError(f"{name}: max_tiles={self.max_tiles} is less than min_tiles={self.min_tiles}")
        check_normalisation(name, self.mean, self.std)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of tiles for an image of `height` × `width` pixels."""
        nearest, best = float("inf"), (1, 1)
        for columns, rows in _grids(self.min_tiles, self.max_tiles):
            distance = abs(width / height - columns / rows)
            large_enough = width * height > 0.5 * self.tile_size**2 * columns * rows
            if distance < nearest or (distance == nearest and large_enough):
                nearest, best = distance, (columns, rows)
        return best

    def num_tiles(self, height: int, width: int) -> int:
        """Tiles of an image of `height` × `width` pixels, the thumbnail included."""
        columns, rows = self.grid(height, width)
        return columns * rows + (self.thumbnail and columns * rows > 1)

    def __call__(self, image: ImageSource) -> Tiles:
        """Opens an image and cuts it.

        Raises:
            MediaError: If the image cannot be opened (`open_image`).
        """
        picture, size = open_image(image, self.image_options), self.tile_size
        columns, rows = self.grid(picture.height, picture.width)
        pixels = np.empty((self.num_tiles(picture.height, picture.width), 3, size, size), dtype=np.float32)
        whole = resize_bicubic(picture, rows * size, columns * size).reshape(rows, size, columns, size, 3)
        cut = pixels[: rows * columns].reshape(rows, columns, 3, size, size)
        cut[...] = whole.transpose(0, 2, 4, 1, 3)
        if len(pixels) > rows * columns:
            pixels[-1] = resize_bicubic(picture, size, size).transpose(2, 0, 1)
        normalise_(pixels, self.mean, self.std, channel_axis=1)
        return Tiles(torch.from_numpy(pixels), columns, rows)


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    sides = range(1, max_tiles + 1)
    grids = [(a, b) for a in sides for b in sides if min_tiles <= a * b <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
