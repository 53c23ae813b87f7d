"""`lit-interns1 generate`: continue a prompt with the model of a checkpoint or of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path


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
) -> None:
    """Continues a prompt and prints the text.

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
    """
    import sys

    try:
        if num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {num_samples}")
        continuations = continue_prompt(
            Path(ckpt), prompt, tokenizer, max_new_tokens, temperature, top_p, num_samples, seed, device
        )
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
) -> list[str]:
    """Prompt and continuation as text, one per sample; arguments as in `generate_text`."""
    from lit_interns1.checkpoints.huggingface import end_of_text_ids, is_pretrained_folder
    from lit_interns1.data import load_tokenizer
    from lit_interns1.models import generate
    from lit_interns1.modules.language_model_module import load_language_model

    model = load_language_model(checkpoint, device)
    encoder = load_tokenizer(find_tokenizer(checkpoint, tokenizer))
    if encoder.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {encoder.vocab_size} entries, the model's vocabulary only {model.config.vocab_size}"
        )
    # documents end with the end-of-text token, so it is also what stands before a new one
    ids = encoder.encode(prompt) or [encoder.end_of_text_id]
    stop_ids = [encoder.end_of_text_id]
    if is_pretrained_folder(checkpoint):
        stop_ids += end_of_text_ids(checkpoint)
    output = generate(
        model, [ids] * num_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        stop_ids=stop_ids, seed=seed,
    )  # fmt: skip
    return [prompt + encoder.decode(tokens) for tokens in output.token_ids]
