"""The router monitor under the real Trainer: against counts of recorded choices, on several ranks, on transformers."""

import csv
import time
import warnings
from dataclasses import replace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader

from distributed_harness import run_ranks
from lit_interns1.callbacks import RouterAlerts, RouterLoadMonitor, TokenClock
from lit_interns1.callbacks.load_history import LoadHistory
from lit_interns1.callbacks.router_alerts import AlertState
from lit_interns1.callbacks.router_counter import RouterCounter
from lit_interns1.models import LanguageModelConfig, MoEConfig
from lit_interns1.modules import LanguageModelModule
from lit_interns1.nn.moe.router_load import ROUTER_METRICS
from sharded_training import batches, environment
from wandb_history import history, records

QUIET = RouterAlerts(dead_experts=False, max_violation=None)


def config(layers=2, **moe):
    moe = {"num_experts": 8, "experts_per_token": 2, "intermediate_size": 16, **moe}
    checkpointing = moe.pop("activation_checkpointing", "none")
    return LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=layers, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(**moe), activation_checkpointing=checkpointing,
    )  # fmt: skip


class Recording(LanguageModelModule):
    """Keeps the choices of every training pass: the oracle of the counts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = []

    def forward(self, batch, targets=None, **options):
        output = super().forward(batch, targets, record_routing=True, **options)
        if self.training:
            self.passes.append(output.routing.stacked()[batch.sample_id_T >= 0])
        return output


def counts_of(ids_TLK, experts=8):
    return torch.stack([torch.bincount(ids_TK.flatten().long(), minlength=experts) for ids_TK in ids_TLK.unbind(1)])


def trainer_of(tmp_path, callbacks, **options):
    options = {"devices": 1, "max_epochs": 1, "logger": False, **options}
    return L.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, log_every_n_steps=1, default_root_dir=tmp_path, callbacks=callbacks, **options,
    )  # fmt: skip


def loader(data):
    return DataLoader(data, batch_size=None)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def logged(tmp_path):
    """Values by step and key, rows of one step together."""
    found = {}
    with open(tmp_path / "csv" / "metrics.csv") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["step"]), {}).update({k: float(v) for k, v in row.items() if v != ""})
    return found


def csv_logger(tmp_path):
    return CSVLogger(str(tmp_path), name="csv", version="")


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_counts_equal_those_of_recorded_choices(tmp_path, checkpointing):
    module = Recording(config(activation_checkpointing=checkpointing), optimizer=sgd, seed=3)
    monitor = RouterLoadMonitor(every_n_steps=1, alerts=QUIET, layer_metrics=["max_violation", "cv"], max_layers=1)
    trainer = trainer_of(tmp_path, [monitor], accumulate_grad_batches=2, logger=csv_logger(tmp_path))
    trainer.fit(module, loader(batches(0, 1, 2)))

    rows = logged(tmp_path)
    assert len(module.passes) == 6
    with np.load(tmp_path / "metrics/expert_load.npz") as saved:
        loads = saved["load"]
    for step in range(3):
        micro = [counts_of(ids).double() for ids in module.passes[2 * step : 2 * step + 2]]
        counts = sum(micro)
        np.testing.assert_allclose(loads[step], (counts / counts.sum(-1, keepdim=True)).numpy(), rtol=1e-6)
        violation = counts.amax(-1) / counts.mean(-1) - 1
        of_micro = torch.stack([c.amax(-1) / c.mean(-1) - 1 for c in micro]).mean(0)
        row = rows[step]
        assert row["router/all/max_violation_mean"] == pytest.approx(float(violation.mean()), rel=1e-6)
        assert row["router/all/max_violation_max"] == pytest.approx(float(violation.max()), rel=1e-6)
        assert row["router/all/max_violation_step_mean"] == row["router/all/max_violation_mean"]
        assert row["router/all/max_violation_micro_batch_mean"] == pytest.approx(float(of_micro.mean()), rel=1e-6)
        assert row["router/layer_0/max_violation"] == pytest.approx(float(violation[0]), rel=1e-6)
        assert row["router/all/z_mean"] == pytest.approx(row["train/router_z"] / 2, rel=0.2)
        assert "router/layer_1/cv" not in row
    entropy = rows[0]["router/all/routing_entropy_mean"]
    assert 0 < entropy <= np.log(8) + 1e-6
    assert rows[0]["router/all/top_probability_mean"] >= 1 / 8


def test_a_window_adds_up_steps_and_scopes_differ(tmp_path):
    module = Recording(config(), optimizer=sgd, seed=3)
    monitor = RouterLoadMonitor(every_n_steps=3, alerts=None, capacity_factor=1.0)
    trainer_of(tmp_path, [monitor], logger=csv_logger(tmp_path)).fit(module, loader(batches(0, 1, 1)))
    rows = logged(tmp_path)
    assert not [key for step in (0, 1) for key in rows[step] if key.startswith("router/")]
    steps = [counts_of(ids).double() for ids in module.passes]
    total = sum(steps)
    row = rows[2]
    assert row["router/all/max_violation_mean"] == pytest.approx(float((total.amax(-1) / total.mean(-1) - 1).mean()))
    last = steps[-1]
    assert row["router/all/max_violation_step_mean"] == pytest.approx(float((last.amax(-1) / last.mean(-1) - 1).mean()))
    excess = (total - total.mean(-1, keepdim=True).ceil()).clamp(min=0).sum(-1) / total.sum(-1)
    assert row["router/all/drop_rate_mean"] == pytest.approx(float(excess.mean()))
    names = {key.split("/")[2].rsplit("_", 1)[0] for key in row if key.startswith("router/all/")}
    assert names <= set(ROUTER_METRICS)


class Replaying(Recording):
    """Sends every token to the experts 0 and 1."""

    def forward(self, batch, targets=None, **options):
        ids = torch.arange(2, dtype=torch.int16).expand(batch.input_ids.numel(), 2, 2)
        batch = replace(batch, token_fields={**batch.token_fields, "routed_experts": ids})
        return LanguageModelModule.forward(self, batch, targets, **options)


GROUPED = {"router": "grouped", "num_groups": 2}


def test_replayed_choices_are_counted_as_used_and_may_fill_groups_unevenly(tmp_path):
    module = Replaying(config(**GROUPED), optimizer=sgd, seed=3)
    monitor = RouterLoadMonitor(every_n_steps=1, alerts=QUIET)
    trainer_of(tmp_path, [monitor], logger=csv_logger(tmp_path)).fit(module, loader(batches(0, 1, 1)))
    row = logged(tmp_path)[0]
    assert row["router/all/max_violation_mean"] == pytest.approx(3.0)
    assert row["router/all/dead_experts_max"] == 6
    assert row["router/all/group_max_violation_max"] == pytest.approx(1.0)


def test_a_grouped_router_that_fills_groups_unevenly_is_an_error(tmp_path):
    def broken(monitor):
        module = LanguageModelModule(config(**GROUPED), optimizer=sgd, seed=3)
        module.configure_model()
        router = module.model.moe_layers[1].router
        decide = router.decide

        def one_group(logits, replay):
            weights, _, probabilities = decide(logits, replay)
            return weights, torch.arange(2).expand(len(logits), 2), probabilities

        router.decide = one_group
        trainer_of(tmp_path, [monitor]).fit(module, loader(batches(0, 1, 1)))

    with pytest.raises(RuntimeError, match=r"router of layer 1 gave its groups \[\d+, 0\] tokens"):
        broken(RouterLoadMonitor(every_n_steps=1, alerts=None))
    with pytest.warns(UserWarning, match="all must get the same"):
        broken(RouterLoadMonitor(every_n_steps=1, alerts=None, group_imbalance="alert"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*all must get the same")
        broken(RouterLoadMonitor(every_n_steps=1, alerts=None, group_imbalance="ignore"))


def train_on(rank, world, folder, cases):
    torch.set_num_threads(1)
    from pathlib import Path

    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.strategies import MoEParallelStrategy

    environment(rank, world)
    warnings.filterwarnings("ignore")
    found = []
    for number, (sizes, moe) in enumerate(cases):
        path = Path(folder) / f"{world}-{number}"
        module = LanguageModelModule(config(**moe), optimizer=sgd, seed=3)
        monitor = RouterLoadMonitor(
            every_n_steps=1, alerts=None, expert_parallel_size=2, drift_every=1, probe="train", max_layers=1,
        )  # fmt: skip
        trainer = trainer_of(
            path, [monitor], devices=world, strategy=MoEParallelStrategy(**sizes), plugins=[TorchElasticEnvironment()],
            logger=csv_logger(path),
        )  # fmt: skip
        trainer.fit(module, loader(batches(rank, world, 1)))
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("router/")}
        torch.distributed.barrier()  # rank 0 writes the file
        with np.load(path / "metrics/expert_load.npz") as saved:
            found.append((saved["load"], values))
    return found


def test_every_layout_sees_what_one_process_sees(tmp_path):
    cases = [({}, {}), ({"expert_parallel_size": 2}, {"router": "sigmoid"}), ({"expert_parallel_size": 2}, GROUPED)]
    checkpointed = ({"expert_parallel_size": 2, "activation_checkpointing": True}, {})
    one = run_ranks(train_on, 1, str(tmp_path), [({}, moe) for _, moe in cases])[0]
    two = run_ranks(train_on, 2, str(tmp_path), [*cases, checkpointed])
    four = run_ranks(train_on, 4, str(tmp_path), [({"expert_parallel_size": 4}, moe) for _, moe in cases])
    per_rank = ("max_violation_micro_batch", "logit_mean")
    for ranks in (two, four):
        for results in ranks:
            for (load, values), (wanted_load, wanted) in zip(results, [*one, one[0]], strict=False):
                np.testing.assert_allclose(load, wanted_load, atol=0.003)  # near-ties may fall otherwise
                assert values.keys() == wanted.keys()
                for key, value in values.items():
                    if not any(name in key for name in per_rank):
                        assert value == pytest.approx(wanted[key], rel=0.02, abs=0.02), key
                assert values == results[0][1] or values.keys() == wanted.keys()
        assert all(rank[2][1] == ranks[0][2][1] for rank in ranks), "ranks agree"
    grouped = one[2][1]
    assert grouped["router/all/group_max_violation_max"] == 0 == grouped["router/all/rank_max_violation_max"]
    assert one[1][1]["router/all/bias_max_max"] == pytest.approx(3e-3, rel=0.4)


class Foreign(L.LightningModule):
    """A transformers model in a module of somebody else."""

    def __init__(self, checkpointing=False):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        self.model = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8, num_experts_per_tok=2,
                output_router_logits=True,
            )
        )  # fmt: skip
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.choices = []

    def training_step(self, batch, batch_idx):
        output = self.model(**batch, labels=batch["input_ids"])
        kept = batch["attention_mask"].flatten().bool()
        self.choices.append(torch.stack([z.topk(2).indices[kept] for z in output.router_logits], 1))
        return output.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformers_model_in_a_foreign_module(tmp_path, checkpointing):
    module = Foreign(checkpointing)
    generator = torch.Generator().manual_seed(1)
    data = []
    for length in (9, 12, 5):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, length:] = 0
        data.append({"input_ids": torch.randint(0, 64, (2, 12), generator=generator), "attention_mask": mask})
    monitor = RouterLoadMonitor(every_n_steps=3, alerts=None)
    trainer_of(tmp_path, [TokenClock(), monitor], logger=csv_logger(tmp_path)).fit(module, loader(data))
    counts = sum(counts_of(ids) for ids in module.choices).double()
    with np.load(tmp_path / "metrics/expert_load.npz") as saved:
        np.testing.assert_allclose(saved["load"][0], counts / counts.sum(-1, keepdim=True), rtol=1e-6)
    row = logged(tmp_path)[2]
    assert row["router/all/max_violation_mean"] == pytest.approx(
        float((counts.amax(-1) / counts.mean(-1) - 1).mean()), rel=1e-6
    )
    assert "router/all/logit_max_max" in row

    wrong = RouterLoadMonitor(every_n_steps=1, token_mask=lambda batch: torch.ones(3))
    with pytest.raises(ValueError, match=r"mask has 3 entries, but the router .*mlp\.gate saw 24 tokens"):
        trainer_of(tmp_path, [TokenClock(), wrong]).fit(Foreign(), loader(data))


def test_recomputation_in_backward_is_not_counted_again():
    module = Foreign(checkpointing=True).train()
    counter = RouterCounter()
    counter.listen(module)
    batch = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    module.training_step(batch, 0).backward()
    counter.stop()
    assert torch.equal(counter.take(), counts_of(module.choices[0]).float())


def test_dead_experts_are_reported_once_and_a_step_without_a_window_reads_nothing(tmp_path):
    monitor = RouterLoadMonitor(every_n_steps=1, alerts=RouterAlerts(after_logs=2, max_violation=None))
    with pytest.warns(UserWarning, match="12 of 16 experts got no token in 2 windows: layer 0 expert 2") as seen:
        trainer_of(tmp_path, [monitor]).fit(Replaying(config(), optimizer=sgd, seed=3), loader(batches(0, 1, 1)))
    assert len([w for w in seen if "no token" in str(w.message)]) == 1


def test_alerts_wait_for_several_windows_and_repeat_rarely():
    limits = RouterAlerts(dead_experts=False, max_violation=1.0, z=200.0, after_logs=2, repeat_after_logs=3)
    state, fine = AlertState(), torch.tensor([True, True])

    def check(violation, z=1.0, finite=fine):
        metrics = {"max_violation": torch.tensor([0.0, violation]), "z": torch.tensor([z, 1.0])}
        return set(state.check(limits, torch.ones(2, 4), metrics, finite))

    assert [check(v) for v in (2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 2.0)] == [
        set(), {"load violation"}, set(), set(), {"load violation"}, set(), set()
    ]  # fmt: skip
    assert check(0.0, z=201.0) == {"router z"}
    assert check(0.0, finite=torch.tensor([True, False])) == {"router not finite"}
    with pytest.raises(ValueError, match=r"RouterAlerts\.z must be positive or null, got -1"):
        RouterAlerts(z=-1)


def test_drift_leaves_no_trace_and_grows_from_zero(tmp_path):
    def fit(**options):
        module = Recording(config(), optimizer=sgd, seed=3)
        monitor = RouterLoadMonitor(every_n_steps=1, alerts=None, **options)
        trainer = trainer_of(tmp_path, [monitor], logger=csv_logger(tmp_path))
        torch.manual_seed(5)
        trainer.fit(module, loader(batches(0, 1, 1)))
        return module, torch.rand(1), logged(tmp_path)

    plain, random, _ = fit()
    probed, random_too, rows = fit(drift_every=1, probe="train")
    assert torch.equal(random, random_too)
    for a, b in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(probed.passes) == 3
    drifts = [row.get("router/all/drift_mean") for row in rows.values()]
    assert drifts[0] is None
    assert 0 < drifts[1] < 1
    with pytest.raises(RuntimeError, match="probe_forward"):
        fit(drift_every=1, probe=lambda: torch.zeros(3, 1), probe_forward=lambda module, batch: module(batch, 1, 2, 3))


def test_validation_is_one_window(tmp_path):
    module = Recording(config(), optimizer=sgd, seed=3)
    monitor = RouterLoadMonitor(every_n_steps=1, alerts=None, validation=True)
    trainer = trainer_of(tmp_path, [monitor], logger=csv_logger(tmp_path))
    trainer.validate(module, loader(batches(0, 1, 1)))
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    ids = []
    for batch in batches(0, 1, 1):
        ids.append(module(batch).routing.stacked()[batch.sample_id_T >= 0])
    counts = counts_of(torch.cat(ids)).double()
    expected = float((counts.amax(-1) / counts.mean(-1) - 1).mean())
    assert found["router/val/max_violation_mean"] == pytest.approx(expected, rel=1e-6)
    assert "router/val/max_violation_step_mean" not in found


def test_an_unfinished_window_is_resumed(tmp_path):
    data = batches(0, 1, 1)

    def fit(folder, steps, checkpoint=None):
        module = LanguageModelModule(config(), optimizer=sgd, seed=3)
        monitor = RouterLoadMonitor(every_n_steps=3, alerts=None)
        trainer = trainer_of(folder, [monitor], max_steps=steps, logger=csv_logger(folder), max_epochs=-1)
        rest = data if checkpoint is None else [data[2]] * 3  # a plain loader begins anew
        trainer.fit(module, loader(rest), ckpt_path=checkpoint, weights_only=True)
        if checkpoint is None:
            trainer.save_checkpoint(folder / "saved.ckpt")
        return folder

    whole = logged(fit(tmp_path / "whole", 3))
    fit(tmp_path / "parts", 2)
    (tmp_path / "parts" / "csv" / "metrics.csv").unlink()
    resumed = logged(fit(tmp_path / "parts", 3, tmp_path / "parts" / "saved.ckpt"))
    for key, value in whole[2].items():
        if key.startswith("router/"):
            assert resumed[2][key] == pytest.approx(value, rel=1e-6), key


def test_history_is_bounded_and_read_back(tmp_path):
    history = LoadHistory(max_points=4)
    for n in range(13):
        history.add(n + 1, np.array([[n, 20.0 - n]]))
    assert history.windows_per_point == 8 or len(history.tokens) < 4
    history.write(tmp_path / "load.npz")
    again = LoadHistory(max_points=4)
    again.read(tmp_path / "load.npz", until=10**9)
    assert again.tokens == history.tokens
    assert again.windows_per_point == history.windows_per_point
    np.testing.assert_array_equal(again.loads, history.loads)
    size = history.windows_per_point
    for point, tokens in enumerate(history.tokens):
        assert tokens == (point + 1) * size
        assert history.loads[point][0, 0] == pytest.approx(np.mean(np.arange(point * size, (point + 1) * size)))


def test_wandb_gets_heat_map_table_and_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=str(tmp_path), offline=True)
    monitor = RouterLoadMonitor(every_n_steps=1, alerts=RouterAlerts(after_logs=1, max_violation=0.01), heatmap_every=2)
    with pytest.warns(UserWarning, match="load violation: 2 layers"):
        trainer_of(tmp_path, [monitor], logger=logger).fit(
            LanguageModelModule(config(), optimizer=sgd, seed=3), loader(batches(0, 1, 1))
        )
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(200):  # W&B's own process may still be writing
        if any(record.WhichOneof("record_type") == "exit" for record in records(file)):
            break
        time.sleep(0.05)
    rows = history(file)
    assert len([row for row in rows if "router/all/max_violation_mean" in row]) == 3
    assert len([row for row in rows if any(key.startswith("router/heatmap") for key in row)]) == 1
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/router/heatmap*.png"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/router/expert_load*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, r"RouterLoadMonitor\.every_n_steps must be at least 1, got 0"),
        ({"layer_metrics": ["maxvio"]}, r"\['maxvio'\] are unknown"),
        ({"group_imbalance": "warn"}, "'warn' must be error, alert or ignore"),
        ({"max_points": 3}, "max_points must be even"),
        ({"probe": "test"}, r"RouterLoadMonitor\.probe = 'test' must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RouterLoadMonitor(**options)
