"""Held-out pairs and sampled molecules before and after preference training, with standard errors.

python configs/studies/dpo/evaluate.py [folder of the runs] [sampled molecules]
"""

import math
import sys
from pathlib import Path

import torch

from lit_interns1.data import PreferenceDataModule
from lit_interns1.data.smiles import is_valid_smiles
from lit_interns1.models import LanguageModel, generate
from lit_interns1.modules.frozen_reference import packed_inputs
from lit_interns1.modules.language_model_module import load_language_model
from lit_interns1.objectives.preference import PreferenceInputs


@torch.no_grad()
def pair_scores(model: LanguageModel, data: PreferenceDataModule) -> torch.Tensor:
    """(2, pairs) log-probabilities of the chosen and the rejected responses."""
    found = []
    for batch in data.val_dataloader():
        inputs = PreferenceInputs.from_fields(batch.token_fields, batch.sample_id_T, batch.labels)
        scores = model(targets=batch.labels, **packed_inputs(batch)).scores
        assert scores is not None
        logp_S = inputs.sample_sums(scores.logp_T)
        found.append(torch.stack([logp_S[inputs.pairs.chosen_P], logp_S[inputs.pairs.rejected_P]]))
    return torch.cat(found, dim=1)


def valid_share(model: LanguageModel, data: PreferenceDataModule, number: int, temperature: float) -> float:
    """Share of sampled molecules that are whole and valid."""
    tokenizer = data.tokenizer
    opening, closing = tokenizer.encode("<SMILES>"), tokenizer.encode("</SMILES>")
    output = generate(
        model, [opening] * number, max_new_tokens=96, temperature=temperature, seed=5,
        stop_ids=[*closing, tokenizer.end_of_text_id],
    )  # fmt: skip
    texts = [
        tokenizer.decode(ids[:-1]) if finished and ids[-1:] == closing else ""
        for ids, finished in zip(output.token_ids, output.finished, strict=True)
    ]
    return sum(is_valid_smiles(text) for text in texts) / number


def share(value: float, number: int) -> str:
    """With its standard error."""
    return f"{100 * value:.1f} ± {100 * math.sqrt(value * (1 - value) / (number - 1)):.1f} %"


def main(folder: Path, number: int) -> None:
    """Prints the table."""
    pairs_of = "bundled:molecule-preferences/test"
    data = PreferenceDataModule(pairs_of, pairs_of, row_length=256)
    data.prepare_data()
    data.setup("validate")
    models = {name: load_language_model(folder / name / "checkpoints" / "last.ckpt") for name in ("pretrain", "dpo")}
    before, after = (pair_scores(model, data) for model in models.values())
    pairs, gain = before.shape[1], after - before
    print("| | before | after |\n|---|---|---|")
    print(f"| chosen response gained more | | {share(float((gain[0] > gain[1]).float().mean()), pairs)} |")
    likelier = (share(float((scores[0] > scores[1]).float().mean()), pairs) for scores in (before, after))
    print(f"| chosen response more likely | {' | '.join(likelier)} |")
    for name, side in (("chosen", 0), ("rejected", 1)):
        means = (f"{float(scores[side].mean()):.2f}" for scores in (before, after))
        print(f"| log-probability of {name} | {' | '.join(means)} |")
    for temperature in (1.0, 0.7):
        values = (share(valid_share(model, data, number, temperature), number) for model in models.values())
        print(f"| valid of {number} sampled, temperature {temperature} | {' | '.join(values)} |", flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dpo"),
        int(sys.argv[2]) if len(sys.argv) > 2 else 1000,
    )
