"""Image encoders and the merger that brings their patches into a language model.

    patches (ΣP, 3·t·p·p), grids (M, 3) → features (ΣP, H) → merge 2 × 2 neighbours → (ΣP/4, hidden of the decoder)

Images of a batch are packed one behind the other and never padded: a grid says how many patches an image has in time,
height and width, and attention stays inside an image (inside a frame, for video).

`InternVisionEncoder` (Intern-S1: arXiv 2508.15763 §2.1) has a class token and learned positions of one tile size,
resized for others. `NativeVisionEncoder` (Intern-S1-Pro: arXiv 2603.25040 §2.3) takes any size: learned positions are
interpolated and queries and keys rotated by row and column; its patches come in the order of the merge windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_interns1.models.config import check_divides, check_positive
from lit_interns1.nn.document_attention import DocumentAttention
from lit_interns1.nn.initialization import Constant, Distribution, Normal
from lit_interns1.nn.parallel_plan import ParallelPlan
from lit_interns1.nn.rotary import rotary_frequencies
from lit_interns1.nn.vision import NormKind, VisionBlock


@dataclass(frozen=True)
class InternVisionConfig:
    """InternViT.

    Attributes:
        hidden_size: H.
        num_layers: Blocks.
        num_heads: Heads; they divide H.
        intermediate_size: Width inside the feed-forward networks.
        image_size: Pixels of the side of a tile, for which positions are learned.
        patch_size: Pixels of the side of a patch.
        norm: "rms_norm" (6B) or "layer_norm" (300M).
        qk_norm: RMSNorm on queries and keys over the whole width (6B).
        attention_bias: Biases on queries, keys and values (300M).
        norm_eps: ε of the norms.
        layer_scale: Start of the layer scales.
        merge_size: Side of the window of patches that become one token.
        initializer_range: Standard deviation of initial weights.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int = 448
    patch_size: int = 14
    norm: NormKind = "rms_norm"
    qk_norm: bool = True
    attention_bias: bool = False
    norm_eps: float = 1e-6
    layer_scale: float = 0.1
    merge_size: int = 2
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_layers", "num_heads", "intermediate_size", "patch_size", "merge_size")
        check_divides(("hidden_size", self.hidden_size), ("num_heads", self.num_heads))
        check_divides(("image_size", self.image_size), ("patch_size × merge_size", self.patch_size * self.merge_size))
        if self.norm not in ("rms_norm", "layer_norm"):
            raise ValueError(f"norm = {self.norm!r} is unknown: choose rms_norm or layer_norm")

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return 3 * self.patch_size**2

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that one tile becomes."""
        return (self.image_size // self.patch_size // self.merge_size) ** 2


@dataclass(frozen=True)
class NativeVisionConfig:
    """The native-resolution encoder.

    Attributes:
        hidden_size: H.
        num_layers: Blocks.
        num_heads: Heads; they divide H.
        intermediate_size: Width inside the feed-forward networks.
        patch_size: Pixels of the side of a patch.
        temporal_patch_size: Frames in a patch; an image is repeated.
        merge_size: Side of the window of patches that become one token.
        num_positions: Learned positions, a square.
        norm_eps: ε of the norms.
        initializer_range: Standard deviation of initial weights.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    num_positions: int = 2304
    norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_positive(
            self, "hidden_size", "num_layers", "num_heads", "intermediate_size", "patch_size", "temporal_patch_size",
            "merge_size", "num_positions",
        )  # fmt: skip
        check_divides(("hidden_size", self.hidden_size), ("4 × num_heads (rows and columns)", 4 * self.num_heads))
        if round(self.num_positions**0.5) ** 2 != self.num_positions:
            raise ValueError(f"num_positions = {self.num_positions} must be a square number")

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2


VisionConfig = InternVisionConfig | NativeVisionConfig


class PatchEmbedding(nn.Module):
    """The convolution whose stride is its kernel, as a product with flattened patches.

    Args:
        hidden_size: H.
        kernel: Size of a patch: (height, width), or (time, height, width).
        std: Standard deviation of the initial weight.
    """

    def __init__(self, hidden_size: int, kernel: tuple[int, ...], std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, 3, *kernel))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self._std = std

    def parameter_distribution(self, name: str) -> Distribution:
        """A normal weight, no bias."""
        return Normal(self._std) if name == "weight" else Constant(0.0)

    def forward(self, patches_PC: Tensor) -> Tensor:
        """(P, 3·t·p·p), channel first, → (P, H)."""
        return F.linear(patches_PC.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def patch_counts(grid_M3: Tensor) -> Tensor:
    """(M,) patches of each image."""
    return grid_M3.long().prod(dim=1)


def window_order(height: int, width: int, merge_size: int) -> Tensor:
    """(height · width,) row-major numbers of patches, window by window, row-major inside a window."""
    index = torch.arange(height * width).view(height // merge_size, merge_size, width // merge_size, merge_size)
    return index.transpose(1, 2).flatten()


def check_grid(patches_PC: Tensor, grid_M3: Tensor, config: VisionConfig) -> None:
    """Whether patches and grids belong together.

    Raises:
        ValueError: If not, or if a side cannot be merged.
    """
    if patches_PC.ndim != 2 or patches_PC.shape[1] != config.patch_values:
        raise ValueError(f"patches must be (patches, {config.patch_values}), got {tuple(patches_PC.shape)}")
    if grid_M3.ndim != 2 or grid_M3.shape[1] != 3:
        raise ValueError(f"grids must be (images, 3) = time, height, width in patches, got {tuple(grid_M3.shape)}")
    if int(patch_counts(grid_M3).sum()) != patches_PC.shape[0]:
        raise ValueError(f"grids {grid_M3.tolist()[:8]} need {int(patch_counts(grid_M3).sum())} patches, "
                         f"got {patches_PC.shape[0]}")  # fmt: skip
    if bool((grid_M3 < 1).any()) or bool((grid_M3[:, 1:] % config.merge_size).any()):
        raise ValueError(f"height and width of grids {grid_M3.tolist()[:8]} must be multiples of "
                         f"merge_size = {config.merge_size}")  # fmt: skip


class VisionEncoder(nn.Module):
    """What the two encoders share.

    Attributes:
        blocks are in `layers`; `hidden_size` is the width of a patch's features, `merge_size` as in the config.
    """

    config: VisionConfig
    layers: nn.ModuleList

    def forward(self, patches_PC: Tensor, grid_M3: Tensor) -> Tensor:
        """(ΣP, 3·t·p·p) and (M, 3) → (ΣP, H), patches in the order of the merge windows.

        Raises:
            ValueError: As `check_grid`.
        """
        raise NotImplementedError

    def smallest_input(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The smallest image there is, black: what ranks without an image compute, to join the collectives."""
        side = self.config.merge_size
        return (
            torch.zeros(side * side, self.config.patch_values, device=device),
            torch.tensor([[1, side, side]], device=device),
        )

    def parallel_plan(self) -> ParallelPlan:
        """Every block is a unit."""
        return ParallelPlan(list(self.layers), checkpointed=list(self.layers))


class InternVisionEncoder(VisionEncoder):
    """InternViT without a head.

    Args:
        config: Its shape.

    Patches of a tile are given row by row.
    """

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config: InternVisionConfig = config
        side = config.image_size // config.patch_size
        self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(1, side * side + 1, config.hidden_size))
        self.patch_embedding = PatchEmbedding(
            config.hidden_size, (config.patch_size, config.patch_size), config.initializer_range
        )
        self.layers = nn.ModuleList(
            VisionBlock(
                config.hidden_size, config.num_heads, config.intermediate_size, "gelu", config.norm, config.norm_eps,
                config.attention_bias, config.qk_norm, config.layer_scale,
            )
            for _ in range(config.num_layers)
        )  # fmt: skip

    def parameter_distribution(self, name: str) -> Distribution:
        """Class token and positions are drawn."""
        return Normal(self.config.initializer_range)

    def _positions(self, height: int, width: int) -> Tensor:
        """(height · width, H), resized bicubically if the size is not the learned one."""
        learned = self.position_embedding[0, 1:]
        side = self.config.image_size // self.config.patch_size
        if (height, width) == (side, side):
            return learned
        image = learned.view(1, side, side, -1).permute(0, 3, 1, 2).float()
        resized = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T.to(learned.dtype)

    def forward(self, patches_PC: Tensor, grid_M3: Tensor) -> Tensor:
        """(ΣP, 3·p·p) row by row and (M, 3) → (ΣP, H) in the order of the merge windows; the class token is dropped."""
        check_grid(patches_PC, grid_M3, self.config)
        tiles = [(height, width) for time, height, width in grid_M3.tolist() for _ in range(time)]
        positions = {size: self._positions(*size) for size in dict.fromkeys(tiles)}
        x_PD = self.patch_embedding(patches_PC) + torch.cat([positions[size] for size in tiles])
        first_D = self.class_token[0] + self.position_embedding[0, :1]
        # one class token before each tile
        lengths = torch.tensor([height * width for height, width in tiles])
        boundaries = torch.cat([torch.zeros(1, dtype=torch.long), (lengths + 1).cumsum(0)])
        tile_P = torch.repeat_interleave(torch.arange(len(tiles)), lengths)
        place_P = (torch.arange(len(tile_P)) + tile_P + 1).to(x_PD.device)
        all_PD = x_PD.new_empty(int(boundaries[-1]), x_PD.shape[1])
        all_PD = all_PD.index_copy(0, boundaries[:-1].to(x_PD.device), first_D.expand(len(tiles), -1).to(x_PD.dtype))
        all_PD = all_PD.index_copy(0, place_P, x_PD)
        attend = DocumentAttention(boundaries.to(x_PD.device), causal=False)
        for block in self.layers:
            all_PD = block(all_PD, attend)
        starts = (boundaries[:-1] + 1).tolist()
        orders = {size: window_order(*size, self.config.merge_size) for size in positions}
        index = torch.cat([start + orders[size] for start, size in zip(starts, tiles, strict=True)])
        return all_PD.index_select(0, index.to(x_PD.device))


class NativeVisionEncoder(VisionEncoder):
    """The encoder that takes images of any size.

    Args:
        config: Its shape.

    Patches are given frame by frame in the order of the merge windows.
    """

    def __init__(self, config: NativeVisionConfig) -> None:
        super().__init__()
        self.config: NativeVisionConfig = config
        self.patch_embedding = PatchEmbedding(
            config.hidden_size, (config.temporal_patch_size, config.patch_size, config.patch_size),
            config.initializer_range,
        )  # fmt: skip
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)
        self.layers = nn.ModuleList(
            VisionBlock(
                config.hidden_size, config.num_heads, config.intermediate_size, "gelu_tanh", norm_eps=config.norm_eps
            )
            for _ in range(config.num_layers)
        )
        frequencies = config.hidden_size // config.num_heads // 4
        self.register_buffer("frequencies", torch.empty(frequencies), persistent=False)
        self.reset_buffers()

    frequencies: Tensor

    def reset_buffers(self) -> None:
        """Recomputes the frequencies of rows and columns."""
        if not self.frequencies.is_meta:
            self.frequencies.copy_(rotary_frequencies(2 * self.frequencies.numel(), 1e4))

    def _positions(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Four learned positions and their weights for every patch of a frame: (4, h·w) each, row-major."""
        side = round(self.config.num_positions**0.5)
        rows, columns = torch.linspace(0, side - 1, height), torch.linspace(0, side - 1, width)
        low_r, low_c = rows.long(), columns.long()
        high_r, high_c = (low_r + 1).clamp(max=side - 1), (low_c + 1).clamp(max=side - 1)
        part_r, part_c = (rows - low_r)[:, None], (columns - low_c)[None]
        index = [(r[:, None] * side + c[None]).flatten() for r in (low_r, high_r) for c in (low_c, high_c)]
        weight = [(r * c).flatten() for r in (1 - part_r, part_r) for c in (1 - part_c, part_c)]
        return torch.stack(index), torch.stack(weight)

    def forward(self, patches_PC: Tensor, grid_M3: Tensor) -> Tensor:
        """(ΣP, 3·t·p·p) and (M, 3), both frame by frame in the order of the merge windows, → (ΣP, H)."""
        check_grid(patches_PC, grid_M3, self.config)
        device, merge = patches_PC.device, self.config.merge_size
        index: list[Tensor] = []
        weight: list[Tensor] = []
        place: list[Tensor] = []
        frames: list[int] = []
        for time, height, width in grid_M3.tolist():
            order = window_order(height, width, merge)
            four_index, four_weight = self._positions(height, width)
            rows_columns = torch.stack((order // width, order % width), dim=1)
            for part, value in ((index, four_index[:, order]), (weight, four_weight[:, order])):
                part.append(value.repeat(1, time))
            place.append(rows_columns.repeat(time, 1))
            frames += [height * width] * time
        learned = self.position_embedding(torch.cat(index, 1).to(device))
        weights_4P = torch.cat(weight, 1).to(device, learned.dtype)
        x_PD = self.patch_embedding(patches_PC)
        x_PD = x_PD + (learned * weights_4P[..., None]).sum(0)
        angles = (torch.cat(place).to(device)[..., None].float() * self.frequencies).flatten(1)
        table = torch.cat((angles, angles), dim=-1)[:, None]
        boundaries = torch.tensor([0, *frames], device=device).cumsum(0)
        attend = DocumentAttention(boundaries, causal=False)
        for block in self.layers:
            x_PD = block(x_PD, attend, (table.cos(), table.sin()))
        return x_PD


class PatchMerger(nn.Module):
    """2 × 2 neighbouring patches → one vector of the decoder's width.

        y = W₂ gelu(W₁ [norm x₁ … norm x₄])     or     W₂ gelu(W₁ norm [x₁ … x₄])

    Args:
        hidden_size: H of the encoder.
        output_size: Width of the decoder.
        merge_size: Side of the window.
        inner_size: Width between the two layers.
        norm_merged: Normalise the joined vector (Intern-S1) instead of each patch (Intern-S1-Pro).
        norm_eps: ε of the norm.
    """

    def __init__(
        self, hidden_size: int, output_size: int, merge_size: int, inner_size: int, norm_merged: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.merged_size, self.norm_merged = hidden_size * merge_size**2, norm_merged
        self.norm = nn.LayerNorm(self.merged_size if norm_merged else hidden_size, norm_eps)
        self.fc1 = nn.Linear(self.merged_size, inner_size)
        self.fc2 = nn.Linear(inner_size, output_size)

    def forward(self, x_PD: Tensor) -> Tensor:
        """(P, H) in the order of the windows → (P / merge², output)."""
        if self.norm_merged:
            merged = self.norm(x_PD.reshape(-1, self.merged_size))
        else:
            merged = self.norm(x_PD).reshape(-1, self.merged_size)
        return self.fc2(F.gelu(self.fc1(merged)))


def build_vision(config: VisionConfig) -> VisionEncoder:
    """The encoder that a config describes."""
    if isinstance(config, InternVisionConfig):
        return InternVisionEncoder(config)
    return NativeVisionEncoder(config)


def build_merger(config: VisionConfig, output_size: int) -> PatchMerger:
    """The merger of an encoder's family."""
    if isinstance(config, InternVisionConfig):
        return PatchMerger(config.hidden_size, output_size, config.merge_size, output_size, True, 1e-5)
    inner = config.hidden_size * config.merge_size**2
    return PatchMerger(config.hidden_size, output_size, config.merge_size, inner, False, config.norm_eps)
