"""`lit-interns1 data rank-surprisal`: scores against sorted logits, tables, selections, and what is refused."""

import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from huggingface_folders import CONFIG, config_values, write_folder, written_tensors
from lit_interns1.checkpoints import CONFIG_KEY
from lit_interns1.cli import main
from lit_interns1.commands.rank_surprisal import best_of_groups, best_share
from lit_interns1.data import load_tokenizer
from lit_interns1.data.tokenizer import BUNDLED_TOKENIZER
from lit_interns1.models import LanguageModel

ROWS = [
    {"prompt": "1 + 1 =", "response": " 2", "source": "short"},
    {"prompt": "1 + 1 =", "response": " two, because one and one are two", "source": "long"},
    {"prompt": "2 + 2 =", "response": " 4", "source": "short"},
    {"prompt": "2 + 2 =", "response": " four: one, two, three, four", "source": "long"},
    {"text": "CC(=O)Nc1ccc(O)cc1", "prompt_id": 9},
]


@pytest.fixture(scope="module")
def model():
    model = LanguageModel.create(replace(CONFIG, vocab_size=4096), seed=4)
    model.lm_head.weight.data *= 40  # ranks and surprisals that differ
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("hub") / "model", written_tensors(model), config_values(model.config))
    shutil.copy(BUNDLED_TOKENIZER, folder / "tokenizer.json")
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def score(folder, *options):
    main(["data", "rank-surprisal", f"--ckpt={folder}", *map(str, options)])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, folder, *options):
    with pytest.raises(SystemExit) as end:
        score(folder, *options)
    assert end.value.code == 2
    return capsys.readouterr().err


def reference(model, row, max_rank):
    """Ranks by sorting, one document at a time, in float64 from the model's logits."""
    tokenizer = load_tokenizer()
    before = tokenizer.encode(row.get("prompt", ""))
    behind = [*tokenizer.encode(row.get("response", row.get("text"))), tokenizer.end_of_text_id]
    ids = torch.tensor(before + behind)
    with torch.no_grad():
        logits = model(ids).logits.double().numpy()
    ranks, surprisals = [], []
    for place in range(max(1, len(before)), len(ids)):
        row_V, target = logits[place - 1], int(ids[place])
        ranks.append(min(1 + np.searchsorted(np.sort(-row_V), -row_V[target]), max_rank))
        surprisals.append(math.log(np.exp(row_V - row_V.max()).sum()) + row_V.max() - row_V[target])
    return float(np.mean(ranks)), float(np.mean(surprisals)), len(ranks)


def test_scores_are_those_of_sorted_logits(model, folder, data, tmp_path, capsys):
    out = tmp_path / "new" / "scores.jsonl"
    score(folder, f"--data={data}", f"--out={out}", "--batch_tokens=20", "--max_rank=4096")
    found = read(out)
    means: dict[str, list[tuple[float, float]]] = {}
    for number, (row, score_row) in enumerate(zip(ROWS, found, strict=True), start=1):
        rank, surprisal, tokens = reference(model, row, 4096)
        source = row.get("source", str(data))
        assert (score_row["file"], score_row["line"], score_row["source"]) == (str(data), number, source)
        assert score_row["tokens"] == tokens
        assert score_row["mean_rank"] == pytest.approx(rank, rel=1e-12)
        assert score_row["mean_surprisal"] == pytest.approx(surprisal, rel=1e-4)
        assert score_row["ratio"] == pytest.approx(rank / surprisal, rel=1e-4)
        means.setdefault(source, []).append((rank, surprisal))
    assert len({score_row["ratio"] for score_row in found}) == len(ROWS)
    table = {
        cells[0]: [float(cell) for cell in cells[1:]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ") and not line.startswith("| source")
        for cells in [[cell.strip() for cell in line.strip("| ").split("|")]]
    }
    assert list(table)[-1] == "all"
    ratios = {name: np.mean(pairs, 0)[0] / np.mean(pairs, 0)[1] for name, pairs in means.items()}
    assert list(table)[:-1] == sorted(ratios, key=ratios.__getitem__)
    for name, ratio in ratios.items():
        assert table[name][0] == len(means[name])
        assert table[name][3] == pytest.approx(ratio, abs=1e-3)

    score(folder, f"--data={data}", f"--out={tmp_path / 'clipped.jsonl'}")
    clipped = [row["mean_rank"] for row in read(tmp_path / "clipped.jsonl")]
    assert clipped == pytest.approx([reference(model, row, 100)[0] for row in ROWS])
    assert all(low < row["mean_rank"] for low, row in zip(clipped, found, strict=True))


def test_a_checkpoint_of_a_run_is_a_student(model, folder, data, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, CONFIG_KEY: asdict(model.config)}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    shutil.copy(BUNDLED_TOKENIZER, tmp_path / "run" / "tokenizer.json")
    score(tmp_path / "run" / "checkpoints" / "last.ckpt", f"--data={data}", f"--out={tmp_path / 'a.jsonl'}")
    score(folder, f"--data={data}", f"--out={tmp_path / 'b.jsonl'}")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_the_best_rows_stay_as_they_stand_in_the_data(folder, tmp_path):
    lines = [json.dumps(row, separators=(",", " : ")) for row in ROWS[:4]]
    for name, part in (("a", lines[:3]), ("b", lines[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    both = [f"--data={tmp_path / 'a.jsonl'}", f"--data={tmp_path / 'b.jsonl'}"]
    score(folder, *both, f"--out={tmp_path / 's.jsonl'}", f"--selected={tmp_path / 'per.jsonl'}", "--best_per=prompt")
    ratios = [row["ratio"] for row in read(tmp_path / "s.jsonl")]
    best = [min((0, 1), key=ratios.__getitem__), min((2, 3), key=ratios.__getitem__)]
    assert (tmp_path / "per.jsonl").read_text().splitlines() == [lines[index] for index in best]
    score(folder, *both, f"--selected={tmp_path / 'half.jsonl'}", "--keep=0.5")
    half = sorted(sorted(range(4), key=ratios.__getitem__)[:2])
    assert (tmp_path / "half.jsonl").read_text().splitlines() == [lines[index] for index in half]


def test_chat_puts_prompts_into_turns(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    turns = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": " 2"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    for name, options in (("a", ["--chat=true"]), ("b", []), ("a", [])):
        score(folder, f"--data={tmp_path / name}.jsonl", f"--out={tmp_path / name}{len(options)}", *options)
    chat, messages, plain = (read(tmp_path / name)[0] for name in ("a1", "b0", "a0"))
    assert chat["ratio"] == messages["ratio"] != plain["ratio"]
    assert chat["tokens"] == plain["tokens"] == 3


def test_selections():
    ratios = [3.0, 1.0, 2.0, 1.0, 9.0]
    assert best_share(ratios, 0.4) == [1, 3]
    assert best_share(ratios, 0.2) == [1]
    assert best_share(ratios, 0.01) == [1]
    assert best_share(ratios, 1.0) == [0, 1, 2, 3, 4]
    assert best_share([1.0] * 30, 0.1) == [0, 1, 2]  # 0.1 · 30 is a little more than 3
    assert best_of_groups(ratios, ["a", "b", "a", "b", "c"]) == [1, 2, 4]


def test_a_part_of_bundled_data(folder, tmp_path, capsys):
    score(folder, "--data=bundled:molecules", "--data=bundled:shakespeare", "--limit=3", "--max_length=32",
          "--overlong=cut", f"--selected={tmp_path / 'kept.jsonl'}", "--keep=0.5")  # fmt: skip
    printed = capsys.readouterr().out
    assert "| bundled:molecules | 3 |" in printed
    assert f"3 of 6 rows → {tmp_path / 'kept.jsonl'}" in printed
    assert all(set(row) == {"text"} for row in read(tmp_path / "kept.jsonl"))
    score(folder, "--data=bundled:shakespeare", "--data=bundled:molecules", "--limit=3", "--max_length=60",
          "--overlong=skip")  # fmt: skip
    assert "3 of 6 rows are longer than 60 tokens and left out" in capsys.readouterr().err


def test_refused(folder, data, tmp_path, capsys):
    (tmp_path / "there.jsonl").write_text("mine")
    there, new = tmp_path / "there.jsonl", tmp_path / "new.jsonl"
    for options, message in (
        ([f"--out={there}"], f"--out {there} exists already"),
        ([f"--selected={there}", "--keep=0.5"], f"--selected {there} exists already"),
        (["--keep=0.5"], "got --keep, and --selected None"),
        ([f"--selected={new}"], "got neither, and --selected"),
        ([f"--selected={new}", "--keep=0.5", "--best_per=prompt"], "got --keep, --best_per"),
        ([f"--selected={new}", "--keep=1.5"], "--keep 1.5 must lie in (0, 1]"),
        ([f"--selected={new}", f"--out={new}", "--keep=0.5"], "are the same file"),
        ([f"--selected={new}", "--best_per=prompt"], "line 5: --best_per prompt: the row has no such field"),
        (["--batch_tokens=0"], "--batch_tokens 0 must be at least 1"),
        (["--max_rank=0"], "--max_rank 0 must be at least 1"),
        (["--limit=0"], "--limit 0 must be at least 1"),
        (["--max_length=8"], "line 2: 14 tokens; max_length = 8"),
        (["--max_length=2", "--overlong=skip"], "no row has at most 2 tokens"),
    ):
        assert message in refused(capsys, folder, f"--data={data}", *options), options
    assert "no such file" in refused(capsys, folder, "--data=missing.txt").lower()
    assert "no such file" in refused(capsys, folder, "--data=missing.jsonl").lower()
    assert there.read_text() == "mine"
    assert not new.exists()
