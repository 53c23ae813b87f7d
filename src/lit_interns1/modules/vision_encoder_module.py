"""Contrastive pre-training of an image encoder on pairs of an image and a caption.

    image, caption → unit embeddings x, y → softmax (CLIP) or sigmoid (SigLIP) loss over the pairs of all ranks

The encoders of the papers were trained so before they met a language model (Intern-S1-Pro: arXiv 2603.25040 §2.3). The
loss is a `SummedLoss` whose count is the pairs: the optimizer step is that of one process with the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from lit_interns1.checkpoints import load_sharded, read_checkpoint
from lit_interns1.checkpoints.whole import load_whole_weights
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.models.config import changed, differing_fields
from lit_interns1.models.image_text import ImageTextConfig, ImageTextEmbeddings, ImageTextModel, Pooling
from lit_interns1.models.multimodal_presets import multimodal_preset
from lit_interns1.models.text_encoder import TextEncoderConfig
from lit_interns1.models.vision import VisionConfig, VisionEncoder
from lit_interns1.modules.counted_module import CountedModule
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.media import MediaItems
from lit_interns1.objectives.contrastive import ContrastiveLoss, SigmoidContrastiveLoss
from lit_interns1.objectives.retrieval_metric import PairRetrieval
from lit_interns1.optim import TokenSchedule
from lit_interns1.strategies.parallelize import local
from lit_interns1.training import SummedLoss, WindowMeans

IMAGE_TEXT_KEY = "image_text_config"
"""Where a checkpoint holds the config of an `ImageTextModel`, as plain values."""


class VisionEncoderModule(CountedModule):
    """Trains an `ImageTextModel` on packed captions with one image each.

    Args:
        vision: The image encoder's shape, or the name of a preset of whole models, whose encoder is taken; default
            "tiny-s1-pro".
        vision_changes: Fields of the preset's encoder to change, as in `{num_layers: 4}`.
        text: The text encoder's shape.
        embedding_size: Width of the common space.
        pooling: How patches become one vector: "mean" or "attention".
        loss: `SigmoidContrastiveLoss` (the default) or `SoftmaxContrastiveLoss`.
        pairs_per_pass: Encode this many pairs at a time, and again in backward: activations of only so many are in
            memory, and the loss is still that of all pairs. None = all at once.
        optimizer: As for `LanguageModelModule`.
        schedule: Factor on the rate as a function of consumed tokens (of captions); None = constant.
        seed: Seed of the initial weights.
        decay_embeddings: Also apply weight decay to embeddings.

    Logs `train/loss` (per pair), `train/alignment` (mean x·y of pairs), `train/temperature` (1/t), `train/logit_bias`
    (b, if there is one); of all validation pairs as one batch `val/loss`, `val/image_to_text/recall_at_1` and `_5`,
    `val/text_to_image/recall_at_1` and `_5`, and `val/retrieval_chance`, what a random order would reach at 1.

    Raises:
        ValueError: If an option is out of its range.
    """

    model: ImageTextModel
    """The network; it exists once Lightning (or you) called `configure_model`."""

    def __init__(
        self,
        vision: VisionConfig | str = "tiny-s1-pro",
        vision_changes: dict[str, Any] | None = None,
        text: TextEncoderConfig | None = None,
        embedding_size: int = 64,
        pooling: Pooling = "attention",
        loss: ContrastiveLoss | None = None,
        pairs_per_pass: int | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda parameters: AdamW(
            parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
        ),
        schedule: TokenSchedule | None = None,
        seed: int = 0,
        decay_embeddings: bool = True,
    ) -> None:
        super().__init__(optimizer, schedule, decay_embeddings, seed)
        if isinstance(vision, str):
            named = multimodal_preset(vision).vision
            assert named is not None
            vision = changed(named, vision_changes or {})
        elif vision_changes:
            raise ValueError(f"vision_changes = {vision_changes} are for presets; write them into the config itself")
        if pairs_per_pass is not None and pairs_per_pass < 1:
            raise ValueError(f"pairs_per_pass = {pairs_per_pass} must be at least 1")
        self.loss = loss or SigmoidContrastiveLoss()
        self.config = ImageTextConfig(
            vision, text or TextEncoderConfig(), embedding_size, pooling, self.loss.initial_scale,
            self.loss.initial_bias, self.loss.max_scale,
        )  # fmt: skip
        self.pairs_per_pass = pairs_per_pass
        self.retrieval = PairRetrieval()
        self._means = WindowMeans()
        self._scale_bias: tuple[Tensor, Tensor | None] | None = None

    # -- building ----------------------------------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        """Image encoder and text tower; on the meta device, if that is the default."""
        return ImageTextModel(self.config)

    def materialize(self, device: torch.device | str) -> None:
        """Fills in the initial weights; they do not depend on how the model is divided."""
        materialize(self.model, device=device, seed=self.seed, std=self.config.vision.initializer_range)

    def setup(self, stage: str) -> None:
        """Compares vocabulary and patches of the data with the model's, and refuses accumulation."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "check_vocabulary"):
            data.check_vocabulary(self.config.text.vocab_size)
        if hasattr(data, "check_vision"):
            data.check_vision(self.config.vision)
        self._check_accumulation()

    def _check_accumulation(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches = {self.trainer.accumulate_grad_batches}: a contrastive loss compares all "
                "pairs of a step, so they cannot come in parts; give each rank all of its pairs at once, and save "
                "memory with pairs_per_pass"
            )

    # -- steps -------------------------------------------------------------------------------------------------------

    def forward(self, batch: PackedBatch) -> ImageTextEmbeddings:
        """Embeddings of a batch's pairs, in `pairs_per_pass` at a time.

        Raises:
            ValueError: If the batch has other media than one image per caption.
        """
        if batch.media.keys() != {"image"}:
            raise ValueError(
                f"a batch of pairs has images and no other media, got {', '.join(batch.media) or 'no media'}"
            )
        real_T = batch.sample_id_T >= 0
        ids_T, length_M = batch.input_ids[real_T], torch.bincount(batch.sample_id_T[real_T])
        images, size = batch.media["image"], self.pairs_per_pass or max(len(length_M), 1)
        if len(length_M) <= size or len(images) != len(length_M):
            return self.model(images, ids_T, length_M)
        parts = []
        texts = zip(ids_T.split([int(part.sum()) for part in length_M.split(size)]), length_M.split(size), strict=True)
        for number, (ids, lengths) in enumerate(texts):
            of_part = _pairs_of(images, number * size, number * size + len(lengths))
            if torch.is_grad_enabled():
                output = checkpoint(self.model, of_part, ids, lengths, use_reentrant=False)
            else:
                output = self.model(of_part, ids, lengths)
            parts.append(output)
        image_ND, text_ND = (torch.cat(vectors) for vectors in zip(*(part[:2] for part in parts), strict=True))
        return ImageTextEmbeddings(image_ND, text_ND, parts[0].scale, parts[0].bias)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> SummedLoss:  # type: ignore[override]
        """The contrastive loss of this rank's pairs against those of all ranks."""
        self._check_accumulation()
        x = self(batch)
        loss, sums = self.loss(x.image_ND, x.text_ND, x.scale, x.bias, caption_keys(batch))
        values = {"train/loss": loss.mean, "train/temperature": 1 / x.scale}
        values["train/alignment"] = sums["alignment"] / loss.count
        if x.bias is not None:
            values["train/logit_bias"] = x.bias
        self._means.add(values, loss.count)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the means over ranks."""
        for name, value in self._means.reduce().items():
            self.log(name, value, prog_bar=name == "train/loss")

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Also holds t below its limit."""
        super().optimizer_step(*arguments, **options)
        with torch.no_grad():
            local(self.model.log_scale).clamp_(max=math.log(self.config.max_scale))

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Collects embeddings. A rank without pairs computes the smallest one, to join the collectives."""
        if batch.media:
            x = self(batch)
            keys = caption_keys(batch)
            if keys is None:
                raise ValueError("validation counts equal captions as right and needs the token field caption_key")
        else:
            device = batch.input_ids.device
            patches, grid = self.model.vision.smallest_input(device)
            ids, lengths = (torch.ones(1, dtype=torch.int64, device=device) for _ in range(2))
            x = self.model(MediaItems.of([patches], grid.tolist()), ids, lengths)
            x = ImageTextEmbeddings(x.image_ND[:0], x.text_ND[:0], x.scale, x.bias)
            keys = ids[:0]
        self._scale_bias = x.scale, x.bias
        self.retrieval.update(x.image_ND, x.text_ND, keys)

    def on_validation_epoch_end(self) -> None:
        """Logs the loss and the retrieval of all validation pairs, of all ranks, as one batch."""
        found = self.retrieval.compute()
        self.retrieval.reset()
        assert self._scale_bias is not None
        loss, _ = self.loss(found["image"], found["text"], *self._scale_bias, found["key"], across_ranks=False)
        values = {"val/loss": loss.mean, "val/retrieval_chance": found["chance"].float()}
        for way in ("image_to_text", "text_to_image"):
            for k in (1, 5):
                values[f"val/{way}/recall_at_{k}"] = (found[way] < k).float().mean()
        for name, value in values.items():
            shown = name in ("val/loss", "val/image_to_text/recall_at_1")
            self.log(name, value, prog_bar=shown, sync_dist=True)  # the metric has collected over ranks already

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings of images and captions, (N, width) each."""
        x = self(batch)
        return {"image": x.image_ND, "text": x.text_ND}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the model's config."""
        checkpoint[IMAGE_TEXT_KEY] = asdict(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture, naming the fields that differ."""
        saved = checkpoint.get(IMAGE_TEXT_KEY)
        if saved is None:
            raise ValueError(f"the checkpoint has no {IMAGE_TEXT_KEY!r}: it was not written by VisionEncoderModule")
        if differences := differing_fields(saved, asdict(self.config)):
            raise ValueError("the checkpoint holds another architecture (saved → present): " + "; ".join(differences))


def caption_keys(batch: PackedBatch) -> Tensor | None:
    """(N,) numbers of the captions, equal where captions are equal; None if the batch has none."""
    if "caption_key" not in batch.token_fields:
        return None
    real_T = batch.sample_id_T >= 0
    first = torch.nonzero(batch.position_ids[real_T] == 0).flatten()
    return batch.token_fields["caption_key"][real_T][first]


def _pairs_of(images: MediaItems, first: int, last: int) -> MediaItems:
    """Items first … last − 1."""
    start, stop = int(images.length_M[:first].sum()), int(images.length_M[:last].sum())
    return MediaItems(
        images.values[start:stop], images.length_M[first:last], images.fact_MK[first:last], images.row_M[first:last]
    )


def load_vision_weights(vision: VisionEncoder, path: str | Path) -> None:
    """Fills an image encoder, divided over ranks or whole, with that of a checkpoint of `VisionEncoderModule`.

    Args:
        vision: What to fill, on a real device.
        path: The checkpoint, one file or sharded.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: As `read_checkpoint`, if the checkpoint was not written by `VisionEncoderModule`, or if the encoder
            has another shape.
    """
    checkpoint = read_checkpoint(path)
    if IMAGE_TEXT_KEY not in checkpoint:
        raise ValueError(f"checkpoint {path} has no {IMAGE_TEXT_KEY!r}: it was not written by VisionEncoderModule")
    if differences := differing_fields(checkpoint[IMAGE_TEXT_KEY]["vision"], asdict(vision.config)):
        raise ValueError(f"checkpoint {path} holds another image encoder (saved → present): " + "; ".join(differences))
    prefix = "model.vision."
    if Path(path).is_dir():
        own = vision.state_dict()
        load_sharded({"state_dict": {prefix + name: tensor for name, tensor in own.items()}}, path)
        return
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    load_whole_weights(vision, weights)
