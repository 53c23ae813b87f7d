"""`lit-interns1 salience` from runs to weights: records, scores, fits, predictions, and what each refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_interns1.cli import main
from lit_interns1.commands.salience import CLOSING_BRACKETS, accuracies, language_model_module, prepared
from lit_interns1.data.recorded_losses import RecordedLosses, load_recorded
from lit_interns1.laws import load_salience
from lit_interns1.objectives.token_accuracy import inside_tags
from lit_interns1.reports import RunDirectory

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "studies" / "salience" / "model.yaml"
MOLECULES = ["CC(=O)Nc1ccc(O)cc1", "CCO", "c1ccccc1C(=O)O", "CN1CCC[C@H]1c1cccnc1"]


def refused(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(["salience", *args])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on mixtures of molecules and code, two checkpoints each."""
    folder = tmp_path_factory.mktemp("salience")
    generator = np.random.default_rng(0)
    (folder / "molecules.txt").write_text("\n".join(generator.choice(MOLECULES, 300)) + "\n")
    names = generator.choice(["f", "g", "(x)"], 300)
    (folder / "code.txt").write_text("\n".join(f"print({name}[{i % 7}]) # {i}" for i, name in enumerate(names)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        for name, first, second in (("chemistry", 6, 1), ("code", 1, 6)):
            main([
                "fit", f"--config={CONFIG}", f"--run_dir={folder / name}", "--clock.max_tokens=1536",
                "--model.config.hidden_size=16", "--model.config.num_layers=1", "--model.config.head_dim=8",
                "--data.row_length=48", "--data.global_batch_size=4", "--data.micro_batch_size=4",
                "--data.validation_fraction=0.4", "--data.validation_rows=8", f"--data.cache_dir={folder / 'cache'}",
                f"--data.sources=[{{path: '{folder}/molecules.txt', lines: true, name: molecules, weight: {first}, "
                f"prefix: '<SMILES>', suffix: '</SMILES>'}}, {{path: '{folder}/code.txt', lines: true, name: code, "
                f"weight: {second}}}]", "--trainer.callbacks.every_n_train_steps=4", "--trainer.val_check_interval=8",
            ])  # fmt: skip
            main(["salience", "record", f"--run_dir={folder / name}"])
            main(["salience", "score", f"--run_dir={folder / name}", "--rows=8"])
    return folder


def test_records_hold_the_validation_loss_and_are_kept(runs, capsys):
    recorded = load_recorded(runs)
    assert [(entry.name, entry.recipe) for entry in recorded] == [
        (f"{recipe}/step000{step}", recipe) for recipe in ("chemistry", "code") for step in (4, 8)
    ]
    for entry, steps in zip(recorded, (4, 8, 4, 8), strict=True):
        assert (steps - 1) * 4 * 48 < entry.tokens <= steps * 4 * 48  # consumed tokens, padding excluded
    validated = RunDirectory(runs / "code").metric("val/loss")
    assert recorded[-1].losses.mean() == pytest.approx(validated.values[validated.steps == 7].item(), rel=1e-6)
    before = {file: file.stat().st_mtime_ns for file in runs.glob("*/salience/*")}
    main(["salience", "record", f"--run_dir={runs / 'code'}"])
    main(["salience", "score", f"--run_dir={runs / 'code'}"])
    assert "everything is recorded" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in runs.glob("*/salience/*")} == before


def test_accuracies_are_those_of_the_largest_logit(runs):
    checkpoint = runs / "chemistry" / "checkpoints" / "step0008.ckpt"
    config = RunDirectory(runs / "chemistry").config()
    recorded = load_recorded(runs)[0].token_ids
    data = prepared(config, validation_rows=16)
    module = language_model_module(checkpoint, "cpu")
    found = {"smiles_accuracy": [], "bracket_accuracy": []}
    with torch.no_grad():
        for batch in data.val_dataloader():
            best = module(batch).logits.argmax(-1).tolist()
            inside = False
            for t, token in enumerate(batch.input_ids.tolist()):
                text = data.tokenizer.token(token)
                inside = ((inside and batch.position_ids[t] > 0) or text == "<SMILES>") and text != "</SMILES>"
                label = int(batch.labels[t])
                if label < 0 or int(batch.token_fields["validation_token_id"][t]) in recorded:
                    continue
                if inside:
                    found["smiles_accuracy"].append(best[t] == label)
                elif CLOSING_BRACKETS & set(data.tokenizer.token(label)):
                    found["bracket_accuracy"].append(best[t] == label)
    expected = {name: sum(values) / len(values) for name, values in found.items()}
    assert accuracies(module, data, recorded, data.tokenizer) == pytest.approx(expected, rel=1e-6)
    scores = json.loads((runs / "chemistry" / "salience" / "scores.json").read_text())
    assert scores["chemistry/step0008"] == pytest.approx(expected, rel=1e-6)


def test_pieces_that_begin_inside_a_tag_are_outside():
    ids = torch.tensor([8, 1, 2, 9, 8, 3, 3, 9, 8, 8])
    lengths = torch.tensor([0, 4, 6, 9, 10], dtype=torch.int32)
    inside = inside_tags(ids, lengths, opening_id=8, closing_id=9)
    assert inside.tolist() == [True, True, True, False, True, True, False, False, False, True]


def test_fit_writes_weights_a_table_and_pictures_and_predicts(runs, tmp_path, capsys):
    names = [entry.name for entry in load_recorded(runs)]
    with (tmp_path / "scores.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["name", "chess"], *zip(names, (0.2, 0.3, 0.5, 0.8), strict=True)])
    main([
        "salience", "fit", f"--losses={runs}", f"--output={tmp_path / 'fit'}", f"--scores=[{tmp_path / 'scores.csv'}]",
    ])  # fmt: skip
    assert "| chess | token weights |" in (table := capsys.readouterr().out)
    assert "| chess | mean loss |" in table
    assert {file.name for file in (tmp_path / "fit").iterdir()} == {
        "weights.safetensors", "evaluation.json", "evaluation.md", "chess.png",
    }  # fmt: skip
    evaluation = json.loads((tmp_path / "fit" / "evaluation.json").read_text())["chess"]
    assert set(evaluation["predictions"]) == set(names)
    assert set(evaluation["recipes"]) == {"chemistry", "code"}

    weights = tmp_path / "fit" / "weights.safetensors"
    main(["salience", "predict", f"--weights={weights}", f"--losses={runs}"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == names
    assert load_salience(weights).token_ids_T.tolist() == load_recorded(runs)[0].token_ids.tolist()
    fitted = [float(row[4]) for row in rows]
    assert fitted == pytest.approx([0.2, 0.3, 0.5, 0.8], abs=0.15)

    main(["salience", "fit", f"--losses={runs}", f"--output={tmp_path / 'own'}"])  # scores that lie beside the records
    assert "| smiles_accuracy | token weights |" in capsys.readouterr().out


def test_what_does_not_belong_together_is_refused(runs, tmp_path, capsys):
    for name, file in (("a", "chemistry/salience/step0004"), ("b", "code/salience/step0004")):
        entry = RecordedLosses.load(runs / f"{file}.safetensors")
        data_hash = "0" * 32 if name == "b" else entry.data_hash
        changed = RecordedLosses(name, name, 0, entry.tokenizer_hash, data_hash, entry.token_ids, entry.losses)
        changed.save(tmp_path / f"{name}.safetensors")
    fit = ("fit", f"--output={tmp_path / 'fit'}")
    assert "differ in their data_hash" in refused(capsys, *fit, f"--losses={tmp_path}")
    (tmp_path / "scores.json").write_text('{"chemistry/step0004": {"chess": 0.5}}')
    scores = f"--scores=[{tmp_path / 'scores.json'}]"
    assert "3 of 4 recorded checkpoints have none" in refused(capsys, *fit, f"--losses={runs}", scores)
    (tmp_path / "scores.json").write_text("[1, 2]")
    assert "is neither {name: {capability: score}} as JSON" in refused(capsys, *fit, f"--losses={runs}", scores)
    assert "holds no recorded losses" in refused(capsys, *fit, f"--losses={tmp_path / 'nothing'}")
    assert "has no checkpoint 'x*'" in refused(capsys, "record", f"--run_dir={runs / 'code'}", "--ckpt=x*")
    assert "cannot be read as recorded losses" in refused(capsys, *fit, f"--losses={tmp_path / 'scores.json'}")
