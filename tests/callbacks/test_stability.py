"""Diagnostics against weights, gradients and outputs that are looked at by hand; equal on several ranks."""

import warnings

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from distributed_harness import run_ranks
from lit_interns1.callbacks import SkipBadSteps, StabilityDiagnostics, TokenClock
from lit_interns1.callbacks.stability import PARAMETER_CLASSES, class_of
from lit_interns1.models import LanguageModelConfig, MoEConfig
from lit_interns1.modules import LanguageModelModule
from sharded_training import batches, environment


def config(**options):
    moe = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16)
    return LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, moe=moe, **options
    )


class Watch(L.Callback):
    """Keeps what the callback has to find: weights before and after a step, and its gradients."""

    def __init__(self):
        self.before, self.gradients, self.after, self.logged = [], [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before.append({n: p.detach().clone() for n, p in module.named_parameters()})
        self.gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.after.append({n: p.detach().clone() for n, p in module.named_parameters()})
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(module, callbacks, data, tmp_path, **options):
    options = {"devices": 1, **options}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=callbacks,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def test_weights_updates_and_gradients_by_class(tmp_path):
    module = LanguageModelModule(config(), seed=3, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    watch = Watch()
    fit(module, [StabilityDiagnostics(every_n_steps=2), watch], batches(0, 1, 1), tmp_path)
    assert not [key for key in watch.logged[0] if key.startswith("stability/")]
    found = watch.logged[1]
    members = {}
    for name in watch.before[1]:
        members.setdefault(class_of(name, PARAMETER_CLASSES), []).append(name)
    assert set(members) == {
        "embedding", "head", "norm", "router", "attention_q", "attention_k", "attention_v", "attention_o",
        "expert_gate_up", "expert_down",
    }  # fmt: skip
    for label, names in members.items():
        weights, gradients, after = (
            torch.cat([where[1][n].flatten().double() for n in names])
            for where in (watch.before, watch.gradients, watch.after)
        )
        rms = float(weights.square().mean().sqrt())
        change = float((after - weights).square().mean().sqrt())
        assert found[f"stability/weight_rms/{label}"] == pytest.approx(rms, rel=1e-5)
        assert found[f"stability/update_ratio/{label}"] == pytest.approx(change / rms, rel=1e-4)
        assert found[f"stability/grad_norm/{label}"] == pytest.approx(float(gradients.norm()), rel=1e-4)


def test_features_are_compared_with_those_of_the_first_step(tmp_path):
    data = batches(0, 1, 1)
    module = LanguageModelModule(config(), seed=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    module.configure_model()
    with torch.no_grad():
        before = module.model.embed_tokens(data[0].input_ids)
    fit(module, [watch := Watch(), StabilityDiagnostics(every_n_steps=1), last := Watch()], data, tmp_path)
    del watch
    with torch.no_grad():
        after = module.model.embed_tokens(data[0].input_ids)
        log_z = module.token_scores(data[0]).logsumexp_T.mean()
    found = last.logged[-1]
    assert found["stability/activation_rms/embedding"] == pytest.approx(float(after.square().mean().sqrt()), rel=1e-5)
    change = float((after - before).norm() / before.norm())
    assert change > 0
    assert found["stability/feature_change/embedding"] == pytest.approx(change, rel=1e-4)
    assert found["stability/log_z"] == pytest.approx(float(log_z), rel=1e-5)
    assert found["stability/router_logit_max"] > found["stability/router_logit_mean"]
    assert {"block", "feed_forward", "attention_q", "router"} <= {key.split("/")[-1] for key in found}
    assert last.logged[0]["stability/feature_change/block"] < found["stability/feature_change/block"]


def test_a_run_is_the_same_with_it(tmp_path):
    def weights(callbacks):
        module = LanguageModelModule(config(), seed=3)
        fit(module, callbacks, batches(0, 1, 1), tmp_path)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights([]), weights([StabilityDiagnostics(every_n_steps=1)]))


class Slope(L.LightningModule):
    """Logits of a foreign head; the gradient has the size that the batch names."""

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(2, 3, bias=False)

    def forward(self, batch):
        return self.lm_head(batch["input_ids"])

    def training_step(self, batch, batch_idx):
        return self(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_spikes_logits_and_skipped_steps_of_a_foreign_module(tmp_path):
    sizes = [1.0 + 0.1 * (i % 3) for i in range(12)] + [50.0, 1.0]
    data = [{"input_ids": torch.tensor([[size, 0.5]])} for size in sizes]
    module, watch = Slope(), Watch()
    fit(module, [TokenClock(), StabilityDiagnostics(every_n_steps=1), watch], data, tmp_path)
    spikes = [row["stability/grad_spikes"] for row in watch.logged]
    assert spikes == [0.0] * 12 + [1.0, 1.0]
    logits = module(data[0]).detach()
    assert watch.logged[-1]["stability/logit_max"] == pytest.approx(float(logits.max()))
    assert watch.logged[-1]["stability/logit_mean"] == pytest.approx(float(logits.mean()))
    assert watch.logged[-1]["stability/log_z"] == pytest.approx(float(logits.logsumexp(-1).mean()))

    watch = Watch()
    callbacks = [TokenClock(), SkipBadSteps(threshold=10.0), StabilityDiagnostics(every_n_steps=1), watch]
    with pytest.warns(UserWarning, match="skipped"):
        fit(Slope(), callbacks, data, tmp_path)
    assert watch.logged[-1]["stability/grad_spikes"] == 0


def test_bad_options():
    with pytest.raises(ValueError, match=r"StabilityDiagnostics\.every_n_steps must be positive, got 0"):
        StabilityDiagnostics(every_n_steps=0)


def train(rank, world, sizes):
    torch.set_num_threads(1)
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.strategies import MoEParallelStrategy

    environment(rank, world)
    warnings.filterwarnings("ignore")
    results = []
    for size in sizes:
        module = LanguageModelModule(config(), seed=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        trainer = fit(
            module, [StabilityDiagnostics(every_n_steps=1)], batches(rank, world, 1), ".", devices=world,
            strategy=MoEParallelStrategy(**size), plugins=[TorchElasticEnvironment()],
        )  # fmt: skip
        results.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("stability/")})
    return results


def test_sharded_parameters_give_the_numbers_of_one_process():
    one = run_ranks(train, 1, [{}])[0][0]
    sizes = [{"expert_parallel_size": 2}, {"replicate_size": 2}]
    for results in run_ranks(train, 2, sizes):
        for size, found in zip(sizes, results, strict=True):
            assert found.keys() == one.keys()
            for key, value in one.items():
                if key.split("/")[1] in ("weight_rms", "update_ratio", "grad_norm"):
                    assert found[key] == pytest.approx(value, rel=1e-3), (size, key)
