"""`lit-interns1 generate`: continue a prompt with the model of a checkpoint or of a Hugging Face folder.

A whole model (`MultimodalModule`) answers a question instead, about images and signals where some are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_interns1.commands.arguments import appending

if TYPE_CHECKING:
    from lit_interns1.data import TextTokenizer
    from lit_interns1.models import LanguageModel

_REPEATED = ("--image", "--time_series")
"""Options that may be given several times."""


def run(arguments: Sequence[str]) -> None:
    """Parses the arguments of the command; `--image a --image b` means both."""
    from jsonargparse import auto_cli

    repeated = appending(arguments, _REPEATED)
    auto_cli(generate_text, args=repeated, as_positional=False, prog="lit-interns1 generate")


def find_tokenizer(checkpoint: Path, tokenizer: str | None) -> str:
    """The tokenizer to use: the one named, else that of the folder, or the one kept in the checkpoint's run directory.

    Raises:
        FileNotFoundError: If none is named and the run directory holds none.
    """
    from lit_interns1.checkpoints.huggingface import is_pretrained_folder

    if tokenizer is not None:
        return tokenizer
    if is_pretrained_folder(checkpoint):
        return str(checkpoint)
    for directory in (checkpoint.parent, checkpoint.parent.parent):
        if (directory / "tokenizer.json").is_file():
            return str(directory / "tokenizer.json")
    raise FileNotFoundError(f"no tokenizer.json beside {checkpoint} or in its run directory: name one with --tokenizer")


def model_and_tokenizer(
    checkpoint: Path, tokenizer: str | None, device: str = "cpu"
) -> tuple[LanguageModel, TextTokenizer]:
    """The language model of a checkpoint, in eval mode, and its tokenizer; see `find_tokenizer`.

    Raises:
        ValueError: If the tokenizer has more entries than the model's vocabulary.
    """
    from lit_interns1.data import load_tokenizer
    from lit_interns1.modules.language_model_module import load_language_model

    model = load_language_model(checkpoint, device)
    encoder = load_tokenizer(find_tokenizer(checkpoint, tokenizer))
    if encoder.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {encoder.vocab_size} entries, the model's vocabulary only {model.config.vocab_size}"
        )
    return model, encoder


def generate_text(
    ckpt: str,
    prompt: str = "",
    tokenizer: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    num_samples: int = 1,
    seed: int = 0,
    device: str = "cpu",
    image: list[str] | None = None,
    time_series: list[str] | None = None,
    sampling_rate: float | None = None,
) -> None:
    """Continues a prompt and prints the text; a whole model answers it.

    Args:
        ckpt: Checkpoint file, e.g. runs/tiny/checkpoints/last.ckpt, or a Hugging Face folder (config.json and
            safetensors files).
        prompt: Text to continue; empty = start a document.
        tokenizer: tokenizer.json, directory, or bundled:tokenizer; default: the one in the folder or run directory.
        max_new_tokens: Limit of new tokens.
        temperature: Sampling temperature; 0 = greedy.
        top_p: Probability mass of the tokens that are drawn from.
        num_samples: Continuations to print.
        seed: Seed of the random numbers.
        device: Where to compute, e.g. cpu or cuda.
        image: An image file that the prompt asks about; may be given several times.
        time_series: A .npy, .npz, .csv or .wav file that the prompt asks about; may be given several times.
        sampling_rate: Of the time series, in Hz; default: that of a .wav file, else a quarter of the points.
    """
    import sys

    try:
        if num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {num_samples}")
        continuations = continue_prompt(
            Path(ckpt), prompt, tokenizer, max_new_tokens, temperature, top_p, num_samples, seed, device, image or (),
            time_series or (), sampling_rate,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"lit-interns1 generate: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for number, text in enumerate(continuations):
        if num_samples > 1:
            print(f"--- sample {number + 1} ---")
        print(text)


def continue_prompt(
    checkpoint: Path,
    prompt: str,
    tokenizer: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    num_samples: int = 1,
    seed: int = 0,
    device: str = "cpu",
    image: Sequence[str] = (),
    time_series: Sequence[str] = (),
    sampling_rate: float | None = None,
) -> list[str]:
    """Prompt and continuation as text, one per sample, or answers of a whole model; arguments as in `generate_text`."""
    from lit_interns1.checkpoints.huggingface import end_of_text_ids, is_pretrained_folder
    from lit_interns1.commands.multimodal_prompt import check_kinds, is_multimodal
    from lit_interns1.models import generate

    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    if is_multimodal(checkpoint, bool(image or time_series)):
        return _answer(checkpoint, prompt, tokenizer, num_samples, device, image, time_series, sampling_rate, sampling)
    check_kinds(checkpoint, ["image"] * bool(image) + ["time_series"] * bool(time_series), ())
    model, encoder = model_and_tokenizer(checkpoint, tokenizer, device)
    # documents end with the end-of-text token, so it is also what stands before a new one
    ids = encoder.encode(prompt) or [encoder.end_of_text_id]
    stop_ids = [encoder.end_of_text_id]
    if is_pretrained_folder(checkpoint):
        stop_ids += end_of_text_ids(checkpoint)
    output = generate(model, [ids] * num_samples, stop_ids=stop_ids, **sampling)
    return [prompt + encoder.decode(tokens) for tokens in output.token_ids]


def _answer(
    checkpoint: Path, prompt: str, tokenizer: str | None, num_samples: int, device: str, images: Sequence[str],
    time_series: Sequence[str], sampling_rate: float | None, sampling: dict[str, Any],
) -> list[str]:  # fmt: skip
    from lit_interns1.commands.multimodal_prompt import answer, check_kinds, format_of, question
    from lit_interns1.data import load_tokenizer
    from lit_interns1.modules.multimodal_module import load_multimodal_model

    if not (prompt or images or time_series):
        raise ValueError("--prompt: a whole model answers questions; ask one")
    model = load_multimodal_model(checkpoint, device)
    if model.config.mrope_section is not None:
        raise ValueError(
            f"--image: {checkpoint} rotates images by row and column (Qwen3-VL): it can be scored and converted, not "
            "asked here"
        )
    kinds = ["image"] * bool(images) + ["time_series"] * bool(time_series)
    check_kinds(checkpoint, kinds, list(model.config.token_ids))
    form = format_of(checkpoint, model.config, load_tokenizer(find_tokenizer(checkpoint, tokenizer)))
    asked = question(images, time_series, sampling_rate, prompt)
    return answer(model, form, asked, num_samples, **sampling)
