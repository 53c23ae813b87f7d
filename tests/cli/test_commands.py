"""The command line, in process: runs, errors of one line, run directories."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lit_interns1.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "pretrain" / "tiny.yaml"
CACHE = ROOT / ".cache" / "tests"
SMALL = [
    "--model.config.hidden_size=32", "--model.config.num_layers=2", "--model.config.num_heads=2",
    "--model.config.num_kv_heads=1", "--model.config.head_dim=16", "--model.config.moe.num_experts=8",
    "--model.config.moe.intermediate_size=16", "--data.row_length=48", "--data.global_batch_size=4",
    "--data.micro_batch_size=2", "--data.validation_rows=4", "--trainer.val_check_interval=8",
    "--data.sources=[{path: 'bundled:molecules', name: molecules, prefix: '<SMILES>', suffix: '</SMILES>'}]",
    f"--data.cache_dir={CACHE}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def fit(run_dir, *options, steps=8):
    main(
        ["fit", f"--config={CONFIG}", f"--run_dir={run_dir}", *SMALL, f"--clock.max_tokens={steps * 4 * 48}", *options]
    )


def refused(capsys, *args):
    """Status 2 and what stood on standard error."""
    with pytest.raises(SystemExit) as end:
        main(list(args))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        fit(directory, steps=12)
    return directory


def test_a_run_leaves_everything_in_its_directory(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics", "tokenizer.json", "wandb"}
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["model"]["init_args"]["schedule"]["init_args"]["total_tokens"] == config["clock"]["max_tokens"]
    header = (run_dir / "metrics" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/tokens", "optim/lr", "val/loss", "train/balance"} <= set(header)
    assert list((run_dir / "wandb").glob("offline-run-*"))


def test_summary_pictures_text_and_molecules(run_dir, capsys):
    main(["summarize", f"--run_dir={run_dir}", "--num_molecules=3", "--max_new_tokens=8"])
    result = json.loads((run_dir / "summary.json").read_text())
    assert set(result["losses"]) == {"model", "bigram", "3-gram"}
    assert result["losses"]["3-gram"] < result["losses"]["bigram"] < result["losses"]["model"] < 9
    assert result["tokens"] == 12 * 4 * 48
    assert len(result["molecules"]) == 3
    for picture in ("loss", "learning_rate", "expert_load"):
        assert (run_dir / "pictures" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "| bigram |" in capsys.readouterr().out
    # the model's figure is the one that validation logged
    logged = (run_dir / "metrics" / "metrics.csv").read_text().splitlines()
    column = logged[0].split(",").index("val/loss")
    values = [float(row.split(",")[column]) for row in logged[1:] if row.split(",")[column]]
    assert result["losses"]["model"] == pytest.approx(values[-1], rel=1e-5)


def test_generation_from_the_checkpoint(run_dir, capsys):
    args = ["generate", f"--ckpt={run_dir / 'checkpoints' / 'last.ckpt'}", "--prompt=<SMILES>C", "--max_new_tokens=5"]
    main([*args, "--num_samples=2"])
    first = capsys.readouterr().out
    assert first.count("<SMILES>C") == 2
    main([*args, "--num_samples=2"])
    assert capsys.readouterr().out == first
    err = refused(capsys, *args, "--temperature=-1")
    assert "temperature must not be negative (0 = greedy), got -1.0" in err
    assert "tokenizer='nowhere': no such file" in refused(capsys, *args, "--tokenizer=nowhere")


def test_an_existing_run_is_refused_and_continued_only_on_demand(run_dir, capsys):
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "wandb" not in path.parts}
    err = refused(capsys, "fit", f"--config={CONFIG}", f"--run_dir={run_dir}", *SMALL)
    assert f"run directory {run_dir} exists already: continue it with --ckpt_path last" in err
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "wandb" not in path.parts}
    assert after == before


def test_resume_writes_beside_what_is_there_and_reads_on(tmp_path, capsys):
    run_dir = tmp_path / "run"
    fit(run_dir, steps=4)
    metrics = (run_dir / "metrics" / "metrics.csv").read_text()
    fit(run_dir, "--ckpt_path=last", steps=8)
    assert (run_dir / "metrics" / "metrics.csv").read_text() == metrics
    assert (run_dir / "metrics" / "resumed-1" / "metrics.csv").exists()
    assert (run_dir / "config-resumed-1.yaml").exists()
    assert "continuing after step 4" in capsys.readouterr().out
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    # a run that had reached its budget goes on behind the rows it has read, 4 per step
    assert saved["TextDataModule"]["rows"] == 32

    again = ["fit", f"--config={CONFIG}", f"--run_dir={run_dir}", *SMALL, "--ckpt_path=last", "--clock.max_tokens=2000"]
    err = refused(capsys, *again, "--model.config.num_layers=3")
    assert "the checkpoint holds another architecture (saved → present): num_layers: 2 → 3" in err
    err = refused(capsys, *again, "--data.seed=5")
    assert "seed: 1 in the checkpoint, 5 now" in err


def test_validate_and_predict_with_a_checkpoint(run_dir, capsys):
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    args = [f"--config={CONFIG}", f"--run_dir={run_dir}", *SMALL, f"--ckpt_path={checkpoint}"]
    main(["validate", *args])
    assert "val/loss" in capsys.readouterr().out
    main(["test", *args])
    main(["predict", *args])


def test_presets_precisions_and_routers_train(tmp_path):
    data = [option for option in SMALL if option.startswith("--data") or "val_check" in option]
    options = [*data, "--clock.max_tokens=600", "--model.optimizer.fused=false"]
    base = ["fit", f"--config={CONFIG}", *options]
    preset = ["--model.config=tiny-s1-mini", "--model.changes={vocab_size: 4096}"]
    main([*base, f"--run_dir={tmp_path / 'dense'}", *preset, "--trainer.precision=bf16-mixed"])
    main([*base, f"--run_dir={tmp_path / 'bf16'}", *SMALL[:7], "--trainer.precision=bf16-true"])
    sigmoid = ["--model.config.moe.router=sigmoid", "--model.config.moe.router_gradient=topk"]
    checkpointing = "--model.config.activation_checkpointing=block"
    main([*base, f"--run_dir={tmp_path / 'sigmoid'}", *SMALL[:7], *sigmoid, checkpointing])
    state = torch.load(tmp_path / "sigmoid" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    biases = [value for name, value in state.items() if name.endswith("expert_bias")]
    assert len(biases) == 2
    steps = -(-600 // (4 * 48))
    for bias in biases:  # every step moved every bias by ±1e-3 (or not at all at exactly the mean load)
        assert (bias.abs() <= steps * 1e-3 + 1e-9).all()
        assert (bias != 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.config.hiden_size=12"], "unknown option 'hiden_size'; did you mean 'hidden_size'?"),
        (["--data.row_lenght=12"], "unknown option 'row_lenght'; did you mean 'row_length'?"),
        (["--trainer.max_stepz=3"], "unknown option 'trainer.max_stepz'; did you mean 'max_steps'?"),
        (["--modle.seed=3"], "unknown option 'modle.seed'; did you mean 'model'?"),
        (["--clok.max_tokens=3"], "unknown option 'clok.max_tokens'; did you mean 'clock'?"),
        (["--model.optimizer.init_args.lrr=3"], "unknown option 'lrr'; did you mean 'lr'?"),
        (["--model.config.moe.num_groups=3"], "moe.num_experts = 8 must be divisible by moe.num_groups = 3"),
        (
            ["--model.config.moe.experts_per_token=6"],
            "moe.experts_per_token = 6 must be divisible by moe.num_groups = 4",
        ),
        (["--model.config.num_kv_heads=3"], "num_heads = 2 must be divisible by num_kv_heads = 3"),
        (["--model.config.vocab_size=100"], "the model's vocabulary has 100 entries, the tokenizer 4096"),
        (["--model.config=tiny"], "preset 'tiny' is unknown"),
        (["--data.micro_batch_size=3"], "4 rows is not divisible by micro-batch × ranks = 3 × 1 = 3"),
        (["--data.sources=[missing.txt]"], "missing.txt: no such file or directory"),
        (["--data.sources=[EMPTY]"], "the file is empty (0 bytes)"),
        (["--data.sources=[BINARY]"], "UTF-8"),
        (["--data.sources=[NOTEXT]"], "no row has the field text_field='text'; the fields are: body"),
        (["--data.row_length=1000000"], "fewer than global_batch_size=4"),
        (["--data.packing=whole", "--data.row_length=12"], "more than row_length=12, and packing='whole' never cuts"),
        (["--ckpt_path=TRUNCATED"], "cannot be read (truncated, or no checkpoint)"),
        (["--ckpt_path=missing.ckpt"], "missing.ckpt does not exist"),
    ],
)
def test_bad_input_is_one_clear_line_before_training(options, message, tmp_path, capsys, run_dir):
    files = {"EMPTY": b"", "BINARY": b"text \xff\xfe\x00", "NOTEXT": b'{"body": "x"}\n'}
    for name, content in files.items():
        path = tmp_path / f"{name.lower()}{'.jsonl' if name == 'NOTEXT' else '.txt'}"
        path.write_bytes(content)
        options = [option.replace(name, str(path)) for option in options]
    (tmp_path / "truncated.ckpt").write_bytes((run_dir / "checkpoints" / "last.ckpt").read_bytes()[:20000])
    options = [option.replace("TRUNCATED", str(tmp_path / "truncated.ckpt")) for option in options]
    accepted = "--clock.max_tokens=200"  # what should be refused and is not must not train for minutes
    err = refused(capsys, "fit", f"--config={CONFIG}", f"--run_dir={tmp_path / 'run'}", *SMALL, accepted, *options)
    line = next(line for line in err.splitlines() if line.startswith("lit-interns1: error:"))
    assert message in line
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_overview_and_unknown_commands(capsys):
    main(["--help"])
    assert "generate" in capsys.readouterr().out
    assert "unknown command 'fitt'; did you mean 'fit'?" in refused(capsys, "fitt")


def test_import_and_help_are_light():
    code = (
        "import sys, lit_interns1, lit_interns1.cli; lit_interns1.cli.main(['--help']); "
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    started = time.process_time()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert time.process_time() - started < 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:load violation", "ignore:dead experts", "ignore:.* experts got no token")
def test_the_tiny_config_learns(tmp_path):
    options = ["--clock.max_tokens=300000", f"--data.cache_dir={CACHE}"]
    main(["fit", f"--config={CONFIG}", f"--run_dir={tmp_path / 'run'}", *options])
    main(["summarize", f"--run_dir={tmp_path / 'run'}"])
    losses = json.loads((tmp_path / "run" / "summary.json").read_text())["losses"]
    assert losses["model"] < 6.0


def test_configs_can_be_printed_and_follow_overrides(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={CONFIG}", "--clock.max_tokens=777", "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["clock"]["max_tokens"] == 777
    assert printed["model"]["init_args"]["schedule"]["init_args"]["total_tokens"] == 777


def losses(run_dir):
    (path,) = run_dir.glob("metrics/**/*.csv")
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.slow
def test_two_ranks_that_share_experts_learn_as_one_process_does(tmp_path, capsys):
    """The command line starts both ranks itself; the run continues, and `generate` reads its shards."""
    program = [str(Path(sys.executable).with_name("lit-interns1")), "fit", f"--config={CONFIG}"]
    share = f"--config={ROOT / 'configs' / 'strategy' / 'ep2.yaml'}"
    common = [*SMALL, "--trainer.log_every_n_steps=1", "--clock.max_tokens=900"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        subprocess.run([*program, *arguments], env=environment, check=True, timeout=120)

    run(*common, f"--run_dir={tmp_path / 'one'}")
    run(share, *common, f"--run_dir={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "two" / "checkpoints" / "last.ckpt").is_symlink()
    run(share, *common, f"--run_dir={tmp_path / 'two'}", "--clock.max_tokens=1800", "--ckpt_path=last")
    main(["generate", f"--ckpt={tmp_path / 'two' / 'checkpoints' / 'last.ckpt'}", "--prompt=A", "--max_new_tokens=3"])
    assert capsys.readouterr().out.startswith("A")
