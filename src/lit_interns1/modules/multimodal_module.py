"""Training of a whole model on text with images, video and signals.

The loss is that of the language model, on text only: placeholders carry no label. Stages of the papers train some of
the parts (arXiv 2508.15763 §3; 2603.25040 §3): the projector, then encoder and projector, then all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_interns1.checkpoints import MULTIMODAL_KEY, read_checkpoint
from lit_interns1.checkpoints.huggingface import (
    is_pretrained_folder,
    load_pretrained_multimodal_model,
    multimodal_config_from_pretrained,
)
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.models.config import changed, differing_fields
from lit_interns1.models.multimodal import PARTS, MultimodalConfig, MultimodalModel, multimodal_config_from_dict
from lit_interns1.models.multimodal_presets import multimodal_preset
from lit_interns1.modules.language_model_module import LanguageModelModule, fill_from_checkpoint
from lit_interns1.modules.vision_encoder_module import load_vision_weights
from lit_interns1.nn.moe import BalanceLoss
from lit_interns1.objectives import NextTokenCrossEntropy
from lit_interns1.objectives.answer_accuracy import AnswerAccuracy
from lit_interns1.optim import TokenSchedule


class MultimodalModule(LanguageModelModule):
    """Trains a `MultimodalModel` on packed batches with media.

    Args:
        config: The model's shape, or the name of a preset of whole models; default: that of `init_weights`, else
            "tiny-s1-pro".
        changes: Fields of the preset, or of the folder's config, to change, as in
            `{text: {vocab_size: 4200}, vision: {num_layers: 4}}`.
        train_parts: Which parts are trained: "language_model", "vision", "projector", "time_series" (its own projector
            belongs to "projector"). None = all.
        optimizer: As for `LanguageModelModule`.
        schedule: As for `LanguageModelModule`.
        objective: The loss over token scores; default: cross-entropy in which a sample weighs as the square root of
            its loss tokens.
        balance: As for `LanguageModelModule`.
        seed: Seed of the initial weights.
        decay_embeddings: Also apply weight decay to embeddings.
        init_weights: A Hugging Face folder of a whole model to start from. A `config` that is given as well must
            describe the same network.
        vision_weights: A checkpoint of `VisionEncoderModule` whose image encoder to start from; it goes over
            `init_weights`.

    Logs what `LanguageModelModule` logs, and `val/accuracy`: the share of answers in which every token is the most
    likely one, so that greedy decoding gives the whole answer.

    Raises:
        ValueError: If a part is unknown, or the model does not have it or the encoder that `vision_weights` is for.
    """

    model: MultimodalModel  # type: ignore[assignment]

    def __init__(
        self,
        config: MultimodalConfig | str | None = None,
        changes: dict[str, Any] | None = None,
        train_parts: Sequence[str] | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda parameters: AdamW(
            parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1
        ),
        schedule: TokenSchedule | None = None,
        objective: NextTokenCrossEntropy | None = None,
        balance: BalanceLoss | None = None,
        seed: int = 0,
        decay_embeddings: bool = True,
        init_weights: str | None = None,
        vision_weights: str | None = None,
    ) -> None:
        if changes and isinstance(config, MultimodalConfig):
            raise ValueError(f"changes = {changes} are for presets and folders; write them into the config itself")
        theirs = config is None and init_weights is not None
        if theirs:
            config = multimodal_config_from_pretrained(str(init_weights))
        elif not isinstance(config, MultimodalConfig):
            config = multimodal_preset(config or "tiny-s1-pro")
        self.multimodal_config: MultimodalConfig = changed(config, changes or {})
        super().__init__(
            config=self.multimodal_config.text, optimizer=optimizer, schedule=schedule,
            objective=objective or NextTokenCrossEntropy(sample_weighting="square_root"), balance=balance, seed=seed,
            decay_embeddings=decay_embeddings, init_weights=init_weights,
        )  # fmt: skip
        self._config_is_theirs = theirs
        if vision_weights is not None and self.multimodal_config.vision is None:
            raise ValueError(f"vision_weights = {vision_weights!r} needs a model with vision; this one has none")
        self.vision_weights = vision_weights
        self.answer_accuracy = AnswerAccuracy()
        present = {"language_model"}
        present |= {"vision", "projector"} if self.multimodal_config.vision is not None else set()
        present |= {"time_series", "projector"} if self.multimodal_config.time_series is not None else set()
        self.train_parts = tuple(train_parts) if train_parts is not None else tuple(sorted(present))
        if unknown := set(self.train_parts) - present:
            raise ValueError(
                f"train_parts = {list(self.train_parts)}: this model has no {', '.join(sorted(unknown))}; it has "
                f"{', '.join(part for part in PARTS if part in present)}"
            )
        if not self.train_parts:
            raise ValueError("train_parts = [] trains nothing: name at least one part, or give none for all")

    def build_model(self) -> MultimodalModel:
        """The network; parts that are not trained ask for no gradient."""
        model = MultimodalModel(self.multimodal_config)
        for name, parameter in model.named_parameters():
            if part_of(name) not in self.train_parts:
                parameter.requires_grad_(False)
        return model

    def materialize(self, device: torch.device | str) -> None:
        """Also takes the image encoder of `vision_weights`."""
        super().materialize(device)
        if self.vision_weights is not None and not self.checkpoint_follows:
            load_vision_weights(self.model.vision, self.vision_weights)

    def media_inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """The batch's images and signals."""
        return {"media": batch.media}

    def setup(self, stage: str) -> None:
        """Also compares placeholders and patches of the data with the model's."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "check_model"):
            data.check_model(self.multimodal_config)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """Also counts the right answers."""
        scores = self.token_scores(batch, rank=True)
        assert scores.rank_T is not None
        self.answer_accuracy.update(scores.rank_T, batch.labels, batch.cu_seqlens)
        return self.add_validation_scores(batch, scores)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation loss and the accuracy of answers."""
        super().on_validation_epoch_end()
        self.log("val/accuracy", self.answer_accuracy.compute(), prog_bar=True, sync_dist=True)
        self.answer_accuracy.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configs of the decoder and of the whole model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[MULTIMODAL_KEY] = asdict(self.multimodal_config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture, naming the fields that differ."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(MULTIMODAL_KEY)
        if saved is None:
            raise ValueError(f"the checkpoint has no {MULTIMODAL_KEY!r}: it was not written by MultimodalModule")
        if differences := differing_fields(saved, asdict(self.multimodal_config)):
            raise ValueError("the checkpoint holds another architecture (saved → present): " + "; ".join(differences))


def part_of(name: str) -> str:
    """The part that a parameter of a `MultimodalModel` belongs to."""
    return "projector" if name.startswith("time_series.projector.") else name.split(".")[0]


def load_multimodal_model(path: str | Path, device: torch.device | str = "cpu") -> MultimodalModel:
    """The whole model of a checkpoint (one file or sharded) or a Hugging Face folder, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: As `read_checkpoint`, or if the checkpoint was not written by `MultimodalModule`.
        WeightsError: If it is a Hugging Face folder that cannot be read.
    """
    if is_pretrained_folder(path):
        return load_pretrained_multimodal_model(path, device).eval()
    checkpoint = read_checkpoint(path, device)
    if MULTIMODAL_KEY not in checkpoint:
        raise ValueError(f"checkpoint {path} has no {MULTIMODAL_KEY!r}: it was not written by MultimodalModule")
    with torch.device("meta"):
        model: nn.Module = MultimodalModel(multimodal_config_from_dict(checkpoint[MULTIMODAL_KEY]))
    fill_from_checkpoint(model, path, checkpoint, "model.", device)
    assert isinstance(model, MultimodalModel)
    return model.eval()
