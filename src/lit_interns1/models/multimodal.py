"""The whole model: a decoder that sees images, video and signals where their placeholder tokens stand.

    x = embed(ids);   x[ids = placeholder of a kind] ← features of that kind, in order;   decoder(x)

(arXiv 2508.15763 §2; 2603.25040 §2.) Positions are those of plain text for all kinds, unless `mrope_section` says
otherwise (Qwen3-VL). A row without images runs the
encoders on the smallest input there is and adds nothing of it: ranks with and without images then issue the same
collectives, and every parameter has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_interns1.models.config import LanguageModelConfig, config_from_dict
from lit_interns1.models.language_model import LanguageModel, LanguageModelOutput
from lit_interns1.models.time_series import TimeSeriesConfig, TimeSeriesEncoder
from lit_interns1.models.vision import (
    InternVisionConfig,
    NativeVisionConfig,
    VisionConfig,
    build_merger,
    build_vision,
)  # fmt: skip
from lit_interns1.nn.document_attention import restarting_positions
from lit_interns1.nn.media import MediaItems, signals_of
from lit_interns1.nn.parallel_plan import ParallelPlan
from lit_interns1.nn.rotary import RotaryEmbedding, axes_rotary

PARTS = ("language_model", "vision", "projector", "time_series")
"""Names of the parts of a model, for training some of them."""


@dataclass(frozen=True)
class MultimodalConfig:
    """A decoder and its encoders.

    Attributes:
        text: The decoder.
        vision: The image encoder; None = none.
        time_series: The encoder of signals; None = none.
        image_token_id: Placeholder of one vector of an image.
        video_token_id: Of a video.
        time_series_token_id: Of a signal.
        mrope_section: Frequencies that turn with time, height and width inside images (Qwen3-VL); None: positions are
            those of text everywhere, as in Intern-S1 and Intern-S1-Pro.
    """

    text: LanguageModelConfig
    vision: VisionConfig | None = None
    time_series: TimeSeriesConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    time_series_token_id: int | None = None
    mrope_section: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.mrope_section is not None:
            object.__setattr__(self, "mrope_section", tuple(self.mrope_section))
            if self.text.positions.kind != "rope" or sum(self.mrope_section) != self.text.head_dim // 2:
                raise ValueError(
                    f"mrope_section = {self.mrope_section} needs rope positions and must add up to head_dim/2 = "
                    f"{self.text.head_dim // 2}"
                )
        if self.vision is not None and self.image_token_id is None:
            raise ValueError("a model with vision needs image_token_id")
        if self.time_series is not None and self.time_series_token_id is None:
            raise ValueError("a model with time_series needs time_series_token_id")
        ids = list(self.token_ids.values())
        if len(set(ids)) < len(ids):
            raise ValueError(f"placeholders must differ, got {self.token_ids}")
        if wrong := {kind: i for kind, i in self.token_ids.items() if not 0 <= i < self.text.vocab_size}:
            raise ValueError(f"placeholders {wrong} must lie in the vocabulary of {self.text.vocab_size} tokens")

    @property
    def token_ids(self) -> dict[str, int]:
        """Placeholder ids of the kinds that the model takes."""
        found: dict[str, int | None] = {}
        if self.vision is not None:
            found |= {"image": self.image_token_id, "video": self.video_token_id}
        if self.time_series is not None:
            found["time_series"] = self.time_series_token_id
        return {kind: token for kind, token in found.items() if token is not None}


def multimodal_config_from_dict(values: Mapping[str, Any]) -> MultimodalConfig:
    """The config that `dataclasses.asdict` was taken of."""
    given = {**values, "text": config_from_dict(values["text"])}
    if (vision := values["vision"]) is not None:
        given["vision"] = InternVisionConfig(**vision) if "image_size" in vision else NativeVisionConfig(**vision)
    if (signals := values["time_series"]) is not None:
        given["time_series"] = TimeSeriesConfig(**signals)
    return MultimodalConfig(**given)


class MultimodalModel(nn.Module):
    """Decoder and encoders.

    Args:
        config: What they are.
    """

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__()
        self.config = config
        if config.vision is not None:
            self.vision = build_vision(config.vision)
            self.projector = build_merger(config.vision, config.text.hidden_size)
        if config.time_series is not None:
            self.time_series = TimeSeriesEncoder(config.time_series, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)

    @property
    def moe_layers(self) -> list[Any]:
        """The decoder's sparse feed-forward networks in order."""
        return self.language_model.moe_layers

    def parallel_plan(self) -> ParallelPlan:
        """Units of the encoders, then those of the decoder."""
        decoder = self.language_model.parallel_plan()
        units: list[Any] = []
        recomputed: list[nn.Module] = []
        if self.config.vision is not None:
            plan = self.vision.parallel_plan()
            units += [*plan.units, self.projector]
            recomputed += plan.checkpointed
        if self.config.time_series is not None:
            plan = self.time_series.parallel_plan()
            units += plan.units
            recomputed += plan.checkpointed
        return ParallelPlan(
            [*units, *decoder.units], decoder.expert_layers, decoder.float32, checkpointed=recomputed,
            recompute=decoder.recompute,
        )  # fmt: skip

    def features(self, media: Mapping[str, MediaItems]) -> dict[str, list[Tensor]]:
        """Vectors of every item by kind, (tokens, hidden) each.

        Raises:
            ValueError: If the model has no encoder for a kind.
        """
        self._check_kinds(media)
        return self._encode(media)[0]

    def _check_kinds(self, media: Mapping[str, MediaItems]) -> None:
        if unknown := media.keys() - self.config.token_ids.keys():
            raise ValueError(f"this model takes {', '.join(self.config.token_ids) or 'text only'}, got {unknown}")

    def _encode(
        self, media: Mapping[str, MediaItems], idle: torch.device | None = None
    ) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Vectors by kind; and, on the device `idle`, zeros that depend on the encoders which the batch does not use.

        Encoders run in one order whatever there is for them: each gathers its parameters, and ranks must do so in step.
        """
        result: dict[str, list[Tensor]] = {}
        nothing: list[Tensor] = []
        if frames := {kind: media[kind] for kind in ("image", "video") if kind in media}:
            grid_M3 = torch.cat([items.fact_MK for items in frames.values()]).long()
            patches_PC = torch.cat([items.values for items in frames.values()])
            merged = self.projector(self.vision(patches_PC, grid_M3))
            assert self.config.vision is not None
            window = self.config.vision.merge_size**2
            vectors = list(merged.split([int(count) // window for count in grid_M3.prod(1).tolist()]))
            for kind, items in frames.items():
                result[kind], vectors = vectors[: len(items)], vectors[len(items) :]
        elif idle is not None and self.config.vision is not None:
            nothing.append(self.projector(self.vision(*self.vision.smallest_input(idle))).sum() * 0)
        if "time_series" in media:
            result["time_series"] = self.time_series(*signals_of(media["time_series"]))
        elif idle is not None and self.config.time_series is not None:
            nothing.append(self.time_series(*self.time_series.smallest_input(idle))[0].sum() * 0)
        return result, nothing

    def embed(self, input_ids_T: Tensor, media: Mapping[str, MediaItems]) -> Tensor:
        """Embeddings of tokens, with the vectors of images and signals in their places.

        Args:
            input_ids_T: (T,) ids; a placeholder for every vector.
            media: The items, in the order of their placeholders.

        Returns:
            (T, hidden).

        Raises:
            ValueError: If placeholders and vectors differ in number, or the model has no encoder for a kind.
        """
        self._check_kinds(media)
        idle = input_ids_T.device if self.training or dist.is_initialized() else None
        features, nothing = self._encode(media, idle)
        x_TD = self.language_model.embed_tokens(input_ids_T)
        for kind, token in self.config.token_ids.items():
            places = torch.nonzero(input_ids_T == token).flatten()
            vectors = torch.cat(features[kind]) if kind in features else x_TD[:0]
            if len(places) != len(vectors):
                raise ValueError(
                    f"the tokens hold {len(places)} placeholders of the kind {kind} (id {token}), but the "
                    f"{len(media[kind]) if kind in media else 0} items of that kind give {len(vectors)} vectors"
                )
            if len(places):
                x_TD = x_TD.index_copy(0, places, vectors.to(x_TD.dtype))
        for zero in nothing:
            x_TD = x_TD + zero.to(x_TD.dtype)
        return x_TD

    def axes_positions(self, input_ids_T: Tensor, position_ids_T: Tensor, media: Mapping[str, MediaItems]) -> Tensor:
        """Positions in time, height and width, (T, 3): an image of H × W vectors takes max(H, W) positions of text.

        Args:
            input_ids_T: (T,) ids.
            position_ids_T: (T,) places inside the documents.
            media: Images and video; every frame of a video stands alone.
        """
        assert self.config.vision is not None
        merge, device = self.config.vision.merge_size, input_ids_T.device
        saved_T = torch.zeros_like(position_ids_T)
        inside: list[tuple[Tensor, Tensor]] = []
        for kind in ("image", "video"):
            if kind not in media:
                continue
            places = torch.nonzero(input_ids_T == self.config.token_ids[kind]).flatten()
            sides = [(h // merge, w // merge) for t, h, w in media[kind].fact_MK.long().tolist() for _ in range(t)]
            for part, (height, width) in zip(places.split([h * w for h, w in sides]), sides, strict=True):
                saved_T[part[-1]] = len(part) - max(height, width)
                number = torch.arange(len(part), device=device)
                inside.append((part, torch.stack((number * 0, number // width, number % width), dim=1)))
        before_T = saved_T.cumsum(0) - saved_T
        first_T = torch.arange(len(position_ids_T), device=device) - position_ids_T
        position_T = position_ids_T - (before_T - before_T[first_T])
        result_T3 = position_T[:, None].repeat(1, 3)
        for part, offset in inside:
            result_T3[part] = position_T[part[0]] + offset
        return result_T3

    def forward(
        self, input_ids: Tensor, media: Mapping[str, MediaItems] | None = None, *,
        position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, **options: Any,
    ) -> LanguageModelOutput:  # fmt: skip
        """Runs the model.

        Args:
            input_ids: (T,) flat packed tokens, or (B, S) with one document per row.
            media: Images and signals by kind.
            position_ids: As for `LanguageModel`.
            cu_seqlens: As for `LanguageModel`.
            options: Others of `LanguageModel.forward`.

        Raises:
            ValueError: As `embed`.
        """
        media = media or {}
        x_TD = self.embed(input_ids.reshape(-1), media)
        if input_ids.ndim == 2 and cu_seqlens is None:
            rows, length = input_ids.shape
            cu_seqlens = torch.arange(rows + 1, device=input_ids.device, dtype=torch.int32) * length
        if self.config.mrope_section is not None and media.keys() & {"image", "video"}:
            if position_ids is None:
                if cu_seqlens is None:
                    cu_seqlens = torch.tensor([0, input_ids.numel()], device=input_ids.device)
                position_ids = restarting_positions(cu_seqlens)
            position_ids_T3 = self.axes_positions(input_ids.reshape(-1), position_ids.reshape(-1), media)
            embedding = cast(RotaryEmbedding, self.language_model.rotary_emb)
            options["rotary"] = axes_rotary(embedding, position_ids_T3, self.config.mrope_section)
        output = self.language_model(inputs_embeds_TD=x_TD, position_ids=position_ids, cu_seqlens=cu_seqlens, **options)
        if output.logits is not None and input_ids.ndim == 2 and options.get("logits_index") is None:
            output.logits = output.logits.view(*input_ids.shape, -1)
        return output
