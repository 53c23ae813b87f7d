"""The configs of reward models train through the command line."""

import json
from pathlib import Path

import pytest

from documented_keys import undocumented
from lit_interns1.commands.trainer import run as run_command
from lit_interns1.modules.reward_model_module import load_reward_model
from lit_interns1.objectives.policy import TokenRewardLoss
from lit_interns1.objectives.reward import BradleyTerry, PolarPretrainLoss

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "reward"
OPTIONS = [
    "--data.global_batch_size=2", "--data.micro_batch_size=2", "--data.validation_rows=2", "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2",
]  # fmt: skip


def fit(folder, *names, options=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        configs = [f"--config={CONFIGS / name}.yaml" for name in names]
        return run_command(["fit", *configs, f"--run_dir={folder}", *OPTIONS, *options])


def test_configs_train(tmp_path):
    rows = [
        {"prompt": f"prompt {p}", "policy": policy, "trajectory": f" {policy} {p} {turn}"}
        for p in range(12) for policy in ("a", "b") for turn in range(2)
    ]  # fmt: skip
    file = tmp_path / "trajectories.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    pairs = fit(tmp_path / "pairs", "molecules")
    tokens = fit(tmp_path / "tokens", "molecules", "token-rewards")
    start = tmp_path / "pairs" / "checkpoints" / "last.ckpt"
    sources = [f"--data.sources=[{file}]", f"--data.validation_sources=[{file}]"]
    polar = fit(tmp_path / "polar", "polar", options=[f"--model.init_weights={start}", *sources])
    for cli, objective in ((pairs, BradleyTerry), (tokens, TokenRewardLoss), (polar, PolarPretrainLoss)):
        assert type(cli.model.objective) is objective
        assert cli.trainer.global_step == 2
        names = set(cli.trainer.callback_metrics)
        assert {"train/loss", "reward/accuracy", "val/loss", "val/reward/accuracy"} <= names
        assert undocumented(names) == []
    assert polar.model.config == pairs.model.config
    assert load_reward_model(tmp_path / "polar" / "checkpoints" / "last.ckpt").config == pairs.model.config
