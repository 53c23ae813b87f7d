"""`lit-interns1 tokenizer train` and `ratio`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_interns1.cli import main
from lit_interns1.data import load_tokenizer
from lit_interns1.data.dynamic_tokenizer import DynamicTokenizer


def test_train_and_ratio(tmp_path: Path, capsys):
    (tmp_path / "genes.txt").write_text("ATGGCCATTGTA\nATGATGGCCGTA\n" * 20)
    out = tmp_path / "new" / "tokenizer.json"
    genes = str(tmp_path / "genes.txt")
    domains = json.dumps({"SMILES": "bundled:molecules", "XNA": genes, "GENE": genes})
    arguments = ["tokenizer", "train", "--domains", domains, "--documents", "300", "--size", "64", "--out", str(out)]
    main(arguments)
    printed = capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, DynamicTokenizer)
    assert [(domain.name, domain.tags) for domain in tokenizer.domains] == [
        ("SMILES", ("SMILES",)), ("XNA", ("dna", "rna")), ("GENE", ("GENE",)),
    ]  # fmt: skip
    assert f"SMILES: 64 pieces, ids {tokenizer.id_range('SMILES').start} to" in printed
    assert f"for a model {tokenizer.padded_vocab_size}; written to {out}" in printed
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"--out {out} exists already" in capsys.readouterr().err

    (tmp_path / "mixed.txt").write_text("<GENE>ATGGCC</GENE>\nplain\n")
    main(["tokenizer", "ratio", "--tokenizer", str(out), "--source", str(tmp_path / "mixed.txt")])
    rows = {line[:12].strip(): line[12:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["GENE"][0] == "6"
    assert rows["plain text"][0] == str(len("<GENE></GENE>plain"))
    tokens = len(tokenizer.encode("<GENE>ATGGCC</GENE>")) + len(tokenizer.encode("plain"))
    assert rows["all"] == ["24", str(tokens), f"{24 / tokens:.3f}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--domains", '{"SMILES": "bundled:molecules"}', "--size", "3"], "size must be at least"),
        (["--domains", "{}"], "--domains must name at least one domain"),
        (["--domains", '{"x": "none.txt"}'], "none.txt: no such file"),
        (["--domains", '{"x": "bundled:molecules"}', "--documents", "0"], "--documents must be at least 1, got 0"),
    ],
)
def test_refused(tmp_path: Path, capsys, options: list[str], message: str):
    with pytest.raises(SystemExit):
        main(["tokenizer", "train", *options, "--out", str(tmp_path / "out.json")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
