"""Optimizers that update in backward against optimizers that do not, and against closed forms, in one process."""

import copy
import gc
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lit_interns1.callbacks import BatchSizeScheduler, GradientNoiseScale, OptimizerChecks, SkipBadSteps, TokenClock
from lit_interns1.callbacks.stability import StabilityDiagnostics
from lit_interns1.models import LanguageModelConfig, MoEConfig
from lit_interns1.modules import LanguageModelModule
from lit_interns1.optim import LOMO, AdaLomo, TabulatedBatch, WarmupStableDecay
from sharded_training import batches


class Tied(nn.Module):
    """Its table is read twice, so it gets its gradient in two parts."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(11, 6, dtype=dtype)
        self.mix = nn.Linear(6, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)

    def forward(self, ids):
        return self.norm(torch.tanh(self.mix(self.table(ids)))) @ self.table.weight.T


def run(model, optimizer, steps=4, after_backward=lambda: None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids, targets = torch.randint(0, 11, (2, 9), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).float(), targets)
        loss.backward()
        after_backward()
        optimizer.step()
    return model


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    model = Tied(dtype)
    return model, copy.deepcopy(model)


def assert_same(model, reference, **tolerance):
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lomo_is_gradient_descent_to_the_last_bit(decay):
    model, reference = pair()
    run(model, LOMO(model.parameters(), lr=0.3, weight_decay=decay))
    run(reference, torch.optim.SGD(reference.parameters(), lr=0.3, weight_decay=decay))
    assert_same(model, reference, **EXACT)


def test_lomo_limits_entries_of_gradients():
    model, reference = pair()
    run(model, LOMO(model.parameters(), lr=0.3, clip_value=0.01))
    clip = lambda: nn.utils.clip_grad_value_(reference.parameters(), 0.01)  # noqa: E731
    run(reference, torch.optim.SGD(reference.parameters(), lr=0.3), after_backward=clip)
    assert_same(model, reference, **EXACT)


def test_adalomo_is_adafactor_fused_into_backward():
    model, reference = pair()
    run(model, AdaLomo(model.parameters(), lr=0.02), steps=6)
    run(reference, torch.optim.Adafactor(reference.parameters(), lr=0.02, eps=(1e-16, 1e-3), weight_decay=0.0), steps=6)
    assert_same(model, reference, rtol=1e-5, atol=1e-6)


def test_weight_decay_of_adalomo_is_relative_to_the_step():
    parameter = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = AdaLomo([parameter], lr=0.1, weight_decay=0.5)
    (parameter * 0.0).sum().backward()
    rate = 0.1 * (25 / 2) ** 0.5
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([[3.0, 4.0]]) * (1 - 0.5 * rate))


def test_the_first_step_of_adalomo_is_a_sign_times_the_size_of_the_weights():
    vector, small = nn.Parameter(torch.tensor([3.0, -4.0])), nn.Parameter(torch.zeros(2))
    optimizer = AdaLomo([vector, small], lr=0.1)
    (vector * torch.tensor([5.0, -1e-3]) + small * torch.tensor([1.0, -1.0])).sum().backward()
    optimizer.step()
    size = 12.5**0.5
    torch.testing.assert_close(vector.detach(), torch.tensor([3.0 - 0.1 * size, -4.0 + 0.1 * size]))
    torch.testing.assert_close(small.detach(), torch.tensor([-1e-4, 1e-4]))  # ε₂ = 1e-3 stands for the size of zeros


def test_experts_of_a_stack_are_matrices_of_their_own():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 4, 5) * torch.tensor([0.1, 1.0, 10.0])[:, None, None])
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    scales = torch.tensor([1e-3, 1.0, 0.0])  # the last expert got no tokens
    ours, theirs = AdaLomo([stack], lr=0.05), torch.optim.Adafactor(apart, lr=0.05, eps=(1e-16, 1e-3), weight_decay=0.0)
    for _ in range(3):
        x = torch.randn(3, 5)
        for tensors in (stack, apart):
            (sum((w @ v).square().sum() * c for w, v, c in zip(tensors, x, scales, strict=True))).backward()
        ours.step()
        theirs.step()
        theirs.zero_grad()
    torch.testing.assert_close(stack.detach(), torch.stack(list(apart)).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["LOMO", "AdaLOMO"])
def test_the_package_pytorch_optimizer_takes_the_same_steps(name):
    package = pytest.importorskip("pytorch_optimizer")
    model, reference = pair()
    ours = {"LOMO": LOMO, "AdaLOMO": AdaLomo}[name](model.parameters(), lr=0.02)
    theirs = getattr(package, name)(reference, lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        ids, targets = torch.randint(0, 11, (2, 9), generator=generator)
        nn.functional.cross_entropy(model(ids), targets).backward()
        ours.step()
        theirs.fused_backward(nn.functional.cross_entropy(reference(ids), targets), lr=0.02)
    assert_same(model, reference, rtol=1e-5, atol=1e-6)


def peak_gradient_bytes(make):
    """The most bytes that gradients hold together, looked at whenever one arrives."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    peak, parameters = 0, list(model.parameters())

    def look(_):
        nonlocal peak
        peak = max(peak, sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(look)  # before the optimizer's
    optimizer = make(parameters)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    return peak


def test_one_gradient_lives_at_a_time():
    assert peak_gradient_bytes(lambda p: torch.optim.AdamW(p)) == 5 * (16 * 16 + 16) * 4
    assert peak_gradient_bytes(lambda p: AdaLomo(p)) == 16 * 16 * 4
    assert peak_gradient_bytes(lambda p: LOMO(p)) == 16 * 16 * 4


def test_the_state_is_two_vectors_per_matrix_and_float32():
    parameter, bias = nn.Parameter(torch.zeros(2, 3, 5, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(7))
    optimizer = AdaLomo([parameter, bias])
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in optimizer.state[parameter].items()}
    assert shapes["exp_avg_sq_row"] == ((2, 3), torch.float32)
    assert shapes["exp_avg_sq_column"] == ((2, 5), torch.float32)
    assert tuple(optimizer.state[bias]["exp_avg_sq"].shape) == (7,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_as_if_nothing_had_happened(dtype):
    model, other = pair(dtype)
    optimizer = AdaLomo(model.parameters(), lr=0.02)
    run(model, optimizer)
    other.load_state_dict(model.state_dict())
    resumed = AdaLomo(other.parameters(), lr=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moments = [t for state in resumed.state.values() for t in state.values()]
    assert {t.dtype for t in moments} == {torch.float32}
    run(model, optimizer)
    run(other, resumed)
    assert_same(other, model, **EXACT)


def test_numbers_of_low_precision_are_updated_in_float32():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = LOMO([parameter], lr=1.0, weight_decay=0.25)
    (parameter * 0.125).sum().backward()
    optimizer.step()
    assert parameter.dtype == torch.bfloat16
    assert parameter.tolist() == [0.625] * 4


def test_a_second_gradient_in_one_step_is_refused():
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = LOMO([parameter], lr=0.1)
    parameter.sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) got a second gradient before step"):
        parameter.sum().backward()
    optimizer.zero_grad()
    parameter.sum().backward()
    optimizer.step()
    parameter.sum().backward()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 0.7))


def test_the_closure_of_a_step_may_run_backward():
    parameter = nn.Parameter(torch.ones(2))

    def closure():
        loss = (2 * parameter).sum()
        loss.backward()
        return loss

    optimizer = LOMO([parameter], lr=0.1)
    optimizer.gradient_factor = 0.5
    assert optimizer.step(closure).item() == 4.0
    assert parameter.tolist() == pytest.approx([0.9, 0.9])
    optimizer.step(closure)  # the factor was that of one step
    assert parameter.tolist() == pytest.approx([0.7, 0.7])


def test_the_optimizer_that_was_made_last_updates():
    parameter = nn.Parameter(torch.ones(2))
    first = LOMO([parameter], lr=0.5)
    second = LOMO([parameter], lr=0.1)
    parameter.sum().backward()
    assert parameter.tolist() == pytest.approx([0.9, 0.9])
    assert first.param_groups[0]["lr"] == 0.5
    del second
    gc.collect()
    parameter.sum().backward()
    assert parameter.grad is not None, "nobody is there to take it"
    copied = copy.deepcopy(first)
    copied.param_groups[0]["params"][0].grad = torch.ones(2)
    copied.step()
    assert copied.param_groups[0]["params"][0].tolist() == pytest.approx([0.4, 0.4])


def test_an_operation_that_still_needs_the_old_weight_stops():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = LOMO([parameter], lr=0.1)
    x = torch.ones(2, requires_grad=True)
    first = (x * parameter.detach()).sum()  # its backward reads the weight, and comes last
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + parameter.sum()).backward()
    optimizer.zero_grad()


def test_rates_of_groups_and_options_out_of_range():
    fast, slow = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = LOMO([{"params": [fast], "lr": 0.5}, {"params": [slow]}], lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())  # puts new groups in the place of the old ones
    optimizer.param_groups[1]["lr"] = 0.2
    (fast + slow).sum().backward()
    assert (fast.item(), slow.item()) == pytest.approx((0.5, 0.8))
    for make, problem in (
        (lambda: LOMO([fast], lr=-1.0), "LOMO.lr must not be negative, got -1.0"),
        (lambda: LOMO([fast], clip_value=0.0), "LOMO.clip_value must be positive or None, got 0.0"),
        (lambda: AdaLomo([fast], weight_decay=-0.1), "AdaLomo.weight_decay must not be negative, got -0.1"),
        (lambda: AdaLomo([fast], decay_rate=0.8), r"AdaLomo.decay_rate must lie in \[-1, 0\), got 0.8"),
        (lambda: AdaLomo([fast], clip_threshold=0.0), "AdaLomo.clip_threshold = 0.0"),
    ):
        with pytest.raises(ValueError, match=problem):
            make()


# -- under Lightning ---------------------------------------------------------------------------------------------------


def tiny(optimizer, experts=True):
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16) if experts else None
    config = LanguageModelConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
        moe=moe,
    )  # fmt: skip
    schedule = WarmupStableDecay(total_tokens=200, warmup_tokens=100, decay_tokens=50)
    return LanguageModelModule(config, optimizer=optimizer, schedule=schedule, seed=3)


def fit(module, callbacks=(), **options):
    warnings.filterwarnings("ignore")
    settings = {"logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=list(callbacks), log_every_n_steps=1, **settings,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(0, 1, 1), batch_size=None))
    return trainer


@pytest.mark.parametrize("experts", [True, False])
def test_losses_as_sums_and_the_schedule_are_those_of_other_optimizers(experts):
    if experts:
        makes = [lambda p: LOMO(p, lr=0.5), lambda p: torch.optim.SGD(p, lr=0.5)]
    else:  # Adafactor would take a stack of experts for one matrix
        adafactor = {"lr": 0.02, "eps": (1e-16, 1e-3), "weight_decay": 0.0}
        makes = [lambda p: AdaLomo(p, lr=0.02), lambda p: torch.optim.Adafactor(p, **adafactor)]
    modules = [tiny(make, experts) for make in makes]
    logged, expected = (fit(module).callback_metrics for module in modules)
    for key in ("train/loss", "optim/lr", "train/tokens"):
        assert float(logged[key]) == pytest.approx(float(expected[key]), rel=1e-5)
    assert_same(*modules, **(EXACT if experts else {"rtol": 1e-4, "atol": 1e-6}))


def test_a_module_that_returns_a_mean_trains_as_with_gradient_descent():
    class Foreign(L.LightningModule):
        def __init__(self, optimizer):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.make = nn.Linear(4, 1), optimizer

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return self.make(self.parameters(), lr=0.1)

    data = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    modules = [Foreign(make) for make in (LOMO, torch.optim.SGD)]
    for module in modules:
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[OptimizerChecks()],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    assert_same(*modules, **EXACT)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"accumulate_grad_batches": 2}, "Trainer.accumulate_grad_batches = 2 must be 1"),
        ({"gradient_clip_val": 0.5}, "Trainer.gradient_clip_val = 0.5 must be null"),
        ({"callbacks": [SkipBadSteps(threshold=1.0)]}, "SkipBadSteps needs the gradients"),
        ({"callbacks": [TokenClock(), GradientNoiseScale()]}, "GradientNoiseScale needs the gradients"),
        ({"callbacks": [StabilityDiagnostics(features=False)]}, "StabilityDiagnostics needs the gradients"),
        (
            {"callbacks": [BatchSizeScheduler(TabulatedBatch([(0, 4)]), unit="rows", micro_batch_rows=4)]},
            "BatchSizeScheduler needs the gradients",
        ),
        (
            {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
            "Trainer.precision = '16-mixed' scales the loss",
        ),
        (
            {"callbacks": [L.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})]},
            "Trainer.accumulate_grad_batches = 1 must be 1, without a GradientAccumulationScheduler",
        ),
    ],
)
def test_what_needs_all_gradients_is_refused_before_training(options, problem):
    module = tiny(lambda p: AdaLomo(p, lr=0.02))
    with pytest.raises(ValueError, match=f"AdaLomo updates in backward: {problem}"):
        fit(module, **options)
    fresh = tiny(lambda p: AdaLomo(p, lr=0.02))
    fresh.configure_model()
    assert_same(module, fresh, **EXACT)
