"""An image encoder and a text encoder that meet in one space (arXiv 2103.00020 §2.3; 2303.15343 §3).

    x = unit(W_image pool(norm(vision(patches))))      y = unit(W_text mean(text(ids)))      s = t · x·y + b

pool is the mean over the patches of an image, or attention: one learned query per head, whose keys and values are the
image's patches (as the head of SigLIP's encoders, arXiv 2303.15343 §4, here without its feed-forward network). The
image encoder is `vision`, as in `MultimodalModel`, so its weights fit there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_interns1.models.config import check_divides, check_positive
from lit_interns1.models.text_encoder import TextEncoder, TextEncoderConfig
from lit_interns1.models.vision import InternVisionConfig, NativeVisionConfig, VisionConfig, build_vision, patch_counts
from lit_interns1.nn.initialization import Constant, Distribution, Normal
from lit_interns1.nn.media import MediaItems
from lit_interns1.nn.parallel_plan import ParallelPlan

Pooling = Literal["mean", "attention"]


@dataclass(frozen=True)
class ImageTextConfig:
    """The two encoders and what joins them.

    Attributes:
        vision: The image encoder.
        text: The text encoder.
        embedding_size: Width of the common space.
        pooling: How patches become one vector: "mean" or "attention".
        initial_scale: t at the start.
        initial_bias: b at the start; None = no bias.
        max_scale: t is held below this.
    """

    vision: VisionConfig
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    embedding_size: int = 64
    pooling: Pooling = "attention"
    initial_scale: float = 10.0
    initial_bias: float | None = -10.0
    max_scale: float = math.inf

    def __post_init__(self) -> None:
        check_positive(self, "embedding_size")
        if self.pooling not in ("mean", "attention"):
            raise ValueError(f"pooling = {self.pooling!r} is unknown: choose mean or attention")
        if not 0 < self.initial_scale <= self.max_scale:
            raise ValueError(f"initial_scale = {self.initial_scale} must be in (0, max_scale = {self.max_scale}]")


def image_text_config_from_dict(values: Mapping[str, Any]) -> ImageTextConfig:
    """The config that `dataclasses.asdict` was taken of."""
    vision = values["vision"]
    kind = InternVisionConfig if "image_size" in vision else NativeVisionConfig
    return ImageTextConfig(**{**values, "vision": kind(**vision), "text": TextEncoderConfig(**values["text"])})


def owners(length_M: Tensor, device: torch.device) -> Tensor:
    """(Σ length,) the item that each row belongs to."""
    return torch.repeat_interleave(torch.arange(len(length_M)), length_M.cpu()).to(device)


def segment_sum(x_PD: Tensor, owner_P: Tensor, items: int) -> Tensor:
    """(P, …) → (items, …), rows of an item added up."""
    return x_PD.new_zeros(items, *x_PD.shape[1:]).index_add(0, owner_P, x_PD)


class MeanPooling(nn.Module):
    """The mean over the rows of every item."""

    def forward(self, x_PD: Tensor, length_M: Tensor) -> Tensor:
        """(ΣP, H) and the rows of every item → (M, H)."""
        total_MD = segment_sum(x_PD, owners(length_M, x_PD.device), len(length_M))
        return total_MD / length_M.to(x_PD.device)[:, None]


class AttentionPooling(nn.Module):
    """One learned query per head over the rows of every item.

    Args:
        hidden_size: H.
        num_heads: Heads; they divide H.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        check_divides(("hidden_size", hidden_size), ("num_heads", num_heads))
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.query = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def parameter_distribution(self, name: str) -> Distribution:
        """Queries are drawn."""
        return Normal(1.0)

    def forward(self, x_PD: Tensor, length_M: Tensor) -> Tensor:
        """(ΣP, H) and the rows of every item → (M, H)."""
        owner_P, items = owners(length_M, x_PD.device), len(length_M)
        k_PHd, v_PHd = self.kv(x_PD).view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        score_PH = (k_PHd * self.query).sum(-1).float() / math.sqrt(self.head_dim)
        index_PH = owner_P[:, None].expand_as(score_PH)
        highest_MH = score_PH.new_full((items, self.num_heads), -torch.inf)
        highest_MH = highest_MH.scatter_reduce(0, index_PH, score_PH.detach(), "amax")
        weight_PH = (score_PH - highest_MH[owner_P]).exp()
        share_PH = weight_PH / segment_sum(weight_PH, owner_P, items)[owner_P]
        pooled_MHd = segment_sum(share_PH.to(v_PHd.dtype)[..., None] * v_PHd, owner_P, items)
        return self.o_proj(pooled_MHd.flatten(1))


class ImageTextEmbeddings(NamedTuple):
    """Embeddings of pairs.

    Attributes:
        image_ND: Of images, of length 1, float32.
        text_ND: Of captions, of length 1, float32.
        scale: t, scalar.
        bias: b, scalar; None = there is none.
    """

    image_ND: Tensor
    text_ND: Tensor
    scale: Tensor
    bias: Tensor | None


class ImageTextModel(nn.Module):
    """Two encoders with a common space.

    Args:
        config: What they are.
    """

    def __init__(self, config: ImageTextConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.vision.hidden_size
        self.vision = build_vision(config.vision)
        self.image_norm = nn.LayerNorm(hidden, 1e-6)
        self.image_pooling: MeanPooling | AttentionPooling = (
            MeanPooling() if config.pooling == "mean" else AttentionPooling(hidden, config.vision.num_heads)
        )
        self.image_projection = nn.Linear(hidden, config.embedding_size, bias=False)
        self.text = TextEncoder(config.text)
        self.text_pooling = MeanPooling()
        self.text_projection = nn.Linear(config.text.hidden_size, config.embedding_size, bias=False)
        # vectors of one entry: FSDP2 divides no scalars
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1)) if config.initial_bias is not None else None

    def parameter_distribution(self, name: str) -> Distribution:
        """Temperature and bias."""
        if name == "log_scale":
            return Constant(math.log(self.config.initial_scale))
        assert self.config.initial_bias is not None
        return Constant(self.config.initial_bias)

    def parallel_plan(self) -> ParallelPlan:
        """Units of both encoders; what joins them belongs to the model's own."""
        vision, text = self.vision.parallel_plan(), self.text.parallel_plan()
        checkpointed = [*vision.checkpointed, *text.checkpointed]
        return ParallelPlan([*vision.units, *text.units], checkpointed=checkpointed)

    def embed_images(self, images: MediaItems) -> Tensor:
        """(N, width) embeddings of images, of length 1."""
        grid_M3 = images.fact_MK.long()
        features_PD = self.image_norm(self.vision(images.values, grid_M3))
        pooled_MD = self.image_pooling(features_PD, patch_counts(grid_M3))
        return F.normalize(self.image_projection(pooled_MD).float(), dim=-1)

    def embed_texts(self, input_ids_T: Tensor, length_M: Tensor) -> Tensor:
        """(N, width) embeddings of texts, of length 1, from their packed tokens."""
        pooled_MD = self.text_pooling(self.text(input_ids_T, length_M), length_M)
        return F.normalize(self.text_projection(pooled_MD).float(), dim=-1)

    def forward(self, images: MediaItems, input_ids_T: Tensor, length_M: Tensor) -> ImageTextEmbeddings:
        """Embeds pairs.

        Args:
            images: One image per caption.
            input_ids_T: (T,) tokens of the captions, one behind the other.
            length_M: (M,) tokens of each caption.

        Raises:
            ValueError: If images and captions differ in number.
        """
        if len(images) != len(length_M):
            raise ValueError(f"{len(images)} images for {len(length_M)} captions: a pair has one of each")
        bias = None if self.bias is None else self.bias.squeeze(0)
        scale = self.log_scale.squeeze(0).exp()
        return ImageTextEmbeddings(
            self.embed_images(images), self.embed_texts(input_ids_T, length_M), scale, bias
        )  # fmt: skip
