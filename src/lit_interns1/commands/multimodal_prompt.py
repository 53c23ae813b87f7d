"""Questions about images and signals to the model of a checkpoint: the prompt is one turn of a user, in ChatML.

    <|im_start|>user ⏎ images, signals, text <|im_end|> ⏎ <|im_start|>assistant ⏎      →  the answer

Images and signals are cut as in training: the run directory's `config.yaml` says how. Without it, sizes follow from the
model, and limits are the processors' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_interns1.data.conversation_rows import ConversationFormat
    from lit_interns1.data.conversations import Conversation
    from lit_interns1.models.multimodal import MultimodalConfig, MultimodalModel


def is_multimodal(checkpoint: Path, with_media: bool) -> bool:
    """Whether the whole model is needed: of a checkpoint of `MultimodalModule`, or of a Hugging Face folder with
    encoders that is asked about images or signals."""
    from lit_interns1.checkpoints import MULTIMODAL_KEY, read_checkpoint
    from lit_interns1.checkpoints.huggingface import is_pretrained_folder
    from lit_interns1.checkpoints.huggingface.config import read_pretrained_config

    if is_pretrained_folder(checkpoint):
        return with_media and bool(read_pretrained_config(checkpoint).layout.encoders)
    return MULTIMODAL_KEY in read_checkpoint(checkpoint)


def readers_of(checkpoint: Path, config: MultimodalConfig) -> tuple[Any, Any]:
    """How images and signals are read: as the run that wrote the checkpoint did, else as the model's sizes say.

    Returns:
        `Visuals` or None, and a `TimeSeriesProcessor`.

    Raises:
        ValueError: If the run directory's config cannot be understood.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from lit_interns1.data.conversation_data_module import ConversationDataModule
    from lit_interns1.data.media import TimeSeriesProcessor

    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if not (folder / "config.yaml").is_file():
            continue
        data = (yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}).get("data") or {}
        if not str(data.get("class_path", "")).endswith("ConversationDataModule"):
            break
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(ConversationDataModule, "data")
        try:
            module = parser.instantiate_classes(parser.parse_object({"data": data})).data
        except (ArgumentError, ValueError) as error:
            raise ValueError(f"{folder / 'config.yaml'}: data cannot be read ({error})") from error
        return module.visuals, module.signals
    return _visuals_by_size(config), TimeSeriesProcessor()


def _visuals_by_size(config: MultimodalConfig) -> Any:
    from lit_interns1.data.conversation_media import NativeVisuals, TiledVisuals
    from lit_interns1.data.media import NativeImageProcessor, NativeVideoProcessor, TileProcessor
    from lit_interns1.models.vision import NativeVisionConfig

    vision = config.vision
    if vision is None:
        return None
    if isinstance(vision, NativeVisionConfig):
        sizes = vision.patch_size, vision.merge_size, vision.temporal_patch_size
        return NativeVisuals(NativeImageProcessor(*sizes), NativeVideoProcessor(*sizes))
    return TiledVisuals(TileProcessor(vision.image_size), vision.patch_size, vision.merge_size)


def question(images: Sequence[str], time_series: Sequence[str], sampling_rate: float | None, text: str) -> Conversation:
    """One turn of a user: images, then signals, then text."""
    from lit_interns1.data.conversations import Conversation, Message, Part

    parts = [Part("image", path, None, f"--image {path}") for path in images]
    parts += [Part("time_series", path, sampling_rate, f"--time_series {path}") for path in time_series]
    parts += [Part("text", text, None, "--prompt")] if text else []
    return Conversation((Message("user", tuple(parts)),), "the question")


def format_of(checkpoint: Path, config: MultimodalConfig, tokenizer: Any) -> ConversationFormat:
    """How a question becomes tokens and items for a model.

    Raises:
        ValueError: If the tokenizer has not the model's placeholders.
    """
    from lit_interns1.data.conversation_rows import ConversationFormat
    from lit_interns1.data.media_tokens import STYLES

    fitting = [tokens for tokens in STYLES.values() if tokens.of_model(tokenizer, config.token_ids)]
    if not fitting:
        found = {
            name: tokenizer.tokenizer.token_to_id(name)
            for tokens in STYLES.values()
            for name in tokens.placeholders.values()
        }
        raise ValueError(
            f"the model's placeholders {config.token_ids} are not those of the tokenizer, {found}: name the tokenizer "
            "of the run with --tokenizer"
        )
    visuals, signals = readers_of(checkpoint, config)
    return ConversationFormat(tokenizer, fitting[0], visuals, signals)


def check_kinds(checkpoint: Path, kinds: Sequence[str], taken: Sequence[str]) -> None:
    """Raises ValueError if a model does not take a kind of media, naming the option."""
    encoders = {"image": "vision", "time_series": "time-series"}
    for kind in kinds:
        if kind not in taken:
            raise ValueError(
                f"--{kind}: the model of {checkpoint} has no {encoders[kind]} encoder; it takes "
                f"{', '.join(['text', *taken])}"
            )


def answer(
    model: MultimodalModel, form: ConversationFormat, asked: Conversation, num_samples: int = 1, **options: Any
) -> list[str]:
    """Answers of a model to a conversation.

    Args:
        model: The model.
        form: How the conversation becomes tokens and items.
        asked: Ends with a question.
        num_samples: How many answers.
        options: Of `models.generate`.

    Raises:
        ValueError: If media cannot be read.
    """
    import torch

    from lit_interns1.data.media_tokens import token_id
    from lit_interns1.models import generate
    from lit_interns1.nn.media import MediaItems

    device = model.language_model.embed_tokens.weight.device
    found: dict[str, list[Any]] = {}
    for kind, item in form.items(asked):
        found.setdefault(kind, []).append(item)
    media = {
        kind: MediaItems.of([item.values for item in items], [item.facts for item in items]).map(
            lambda values: values.to(device)
        )
        for kind, items in found.items()
    }
    ids = torch.tensor(form.render(asked, prompt=True).ids, device=device)
    with torch.no_grad():
        prompt_TD = model.embed(ids, media)
    stop_ids = [token_id(form.tokenizer, form.tokens.turn_end), form.tokenizer.end_of_text_id]
    output = generate(model.language_model, prompt_embeds=[prompt_TD] * num_samples, stop_ids=stop_ids, **options)
    return [form.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in output.token_ids]
