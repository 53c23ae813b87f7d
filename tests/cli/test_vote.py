"""`lit-interns1 vote`: tables and JSON against sums by hand, and what is refused."""

import json
import math

import pytest

from lit_interns1.cli import main

# question a: two long 7s, two short 8s (right); b: one unreadable answer, x right; c: 5 wrong and short, 6 right
SAMPLES = [
    {"id": "a", "answer": "7", "tokens": 900, "correct": False},
    {"id": "b", "answer": None, "tokens": 4, "correct": False},
    {"id": "a", "answer": 7.0, "tokens": 1100, "correct": False},
    {"id": "a", "answer": " 8", "tokens": 300, "correct": True},
    {"id": "a", "answer": 8, "tokens": [1] * 400, "correct": True},
    {"id": "b", "answer": "x", "length": 40, "correct": 1},
    {"id": "c", "answer": "5", "tokens": 10, "correct": False},
    {"id": "c", "answer": "6", "tokens": 100, "correct": True},
    {"id": "c", "answer": "6", "tokens": 120, "correct": True},
]


def write(path, samples, without=()):
    rows = [{name: value for name, value in sample.items() if name not in without} for sample in samples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(capsys, *options):
    with pytest.raises(SystemExit) as end:
        main(["vote", *map(str, options)])
    assert end.value.code == 2
    return capsys.readouterr().err


def error(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def test_rules_and_pass_at_k_over_several_files(tmp_path, capsys):
    first, second = write(tmp_path / "1.jsonl", SAMPLES[:4]), write(tmp_path / "2.jsonl", SAMPLES[4:])
    main(["vote", f"--data={first}", f"--data={second}", f"--out={tmp_path / 'out' / 'votes.json'}"])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "votes.json").read_text())
    assert (result["questions"], result["samples"], result["without_answer"]) == (3, 9, 1)
    by_question = {
        "pass_at_1": [1 / 2, 1 / 2, 2 / 3],
        "pass_at_2": [1 - 1 / 6, 1.0, 1.0],
        "majority": [0, 1, 1],  # a: a tie goes to what came first
        "shortest": [1, 1, 0],
        "shortest_majority": [1, 1, 0],  # c: 1 / ln 10 = 0.434 > 2 / ln 110 = 0.425
    }
    assert list(result["standard_error"]) == list(by_question)
    for name, values in by_question.items():
        assert result["mean"][name] == pytest.approx(sum(values) / 3), name
        assert result["standard_error"][name] == pytest.approx(error(values)), name
        title = name.replace("pass_at_", "pass@").replace("_", " ")
        assert f"| {title} | {sum(values) / 3:.4f} | {error(values):.4f} |" in printed
    assert result["mean"]["length_right"] == pytest.approx((300 + 400 + 40 + 100 + 120) / 5)
    assert f"| wrong | {(900 + 4 + 1100 + 10) / 4:.1f} |" in printed
    assert result["winners"][0] == {
        "question": "a", "samples": 4, "majority": "7", "shortest": "8", "shortest_majority": "8",
    }  # fmt: skip


def test_chosen_rules_and_ks(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", SAMPLES)
    main(["vote", f"--data={data}", "--rules=shortest", "--ks=2", "--ks=1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["pass@2", "pass@1", "shortest"]


def test_without_right_answers_the_winners_alone(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", SAMPLES, without=["correct"])
    main(["vote", f"--data={data}", f"--out={tmp_path / 'v.json'}"])
    printed = capsys.readouterr().out
    assert "| shortest majority | 0.6667 |" in printed
    assert "pass@" not in printed
    assert "mean" not in json.loads((tmp_path / "v.json").read_text())


def test_without_lengths_only_the_majority(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", SAMPLES, without=["tokens", "length"])
    main(["vote", f"--data={data}"])
    printed = capsys.readouterr().out
    assert "shortest" not in printed
    assert "mean tokens" not in printed
    message = refused(capsys, f"--data={data}", "--rules=majority", "--rules=shortest")
    assert "--rules shortest: the rows have no `tokens` or `length`" in message


def test_one_question_has_no_standard_error(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [{"prompt": [{"role": "user"}], "answer": None, "correct": False}])
    main(["vote", f"--data={data}", f"--out={tmp_path / 'v.json'}"])
    assert "| majority | 0.0000 |  |" in capsys.readouterr().out
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["standard_error"]["majority"] is None
    assert result["winners"][0]["majority"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "line 2: expected `id` or `prompt`, and `answer`"),
        ({"id": 1}, "got id"),
        ({"id": 1, "answer": "1", "tokens": -1, "correct": True}, "got -1"),
        ({"id": 1, "answer": "1", "tokens": True, "correct": True}, "got True"),
        ({"id": 1, "answer": "1", "tokens": 1, "correct": 0.5}, "correct: expected true or false, got 0.5"),
        ({"id": "", "answer": "1", "tokens": 1, "correct": True}, "id: it is empty"),
        ({"id": 1, "answer": "1", "tokens": 1}, "line 2: the row has no `correct`, but others have one"),
        ({"id": 1, "answer": "1", "correct": True}, "line 2: the row has no `length`, but others have one"),
    ],
)
def test_refused_rows(tmp_path, capsys, row, message):
    data = write(tmp_path / "a.jsonl", [SAMPLES[0], row])
    assert message in refused(capsys, f"--data={data}")


def test_refused_options(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", SAMPLES)
    assert "--ks 3: from 1 to 2, the samples of 'b'" in refused(capsys, f"--data={data}", "--ks=3")
    (tmp_path / "there.json").write_text("mine")
    assert "exists already" in refused(capsys, f"--data={data}", f"--out={tmp_path / 'there.json'}")
    assert (tmp_path / "there.json").read_text() == "mine"
    (tmp_path / "empty.jsonl").write_text("")
    assert "there is no row" in refused(capsys, f"--data={tmp_path / 'empty.jsonl'}")
    unknown = write(tmp_path / "b.jsonl", SAMPLES, without=["correct"])
    assert "--ks 1: pass@k needs `correct`" in refused(capsys, f"--data={unknown}", "--ks=1")
