"""Plans against the real Trainer and strategy on gloo ranks: what each rank holds, and what it hands to collectives."""

import warnings

import pytest
import torch

from distributed_harness import run_ranks
from sharded_training import environment

ROWS, LENGTH, CLIP = 2, 24, 0.05


def make_module(changes):
    from lit_interns1.models import LanguageModelConfig, MoEConfig
    from lit_interns1.modules import LanguageModelModule

    changes = dict(changes)
    moe = {"num_experts": 8, "experts_per_token": 4, "intermediate_size": 16, "router": "grouped", "num_groups": 4,
           "router_gradient": "ste", **changes.pop("moe", {})}  # fmt: skip
    optimizer = changes.pop("optimizer", "adamw")
    config = LanguageModelConfig(
        hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
        moe=MoEConfig(**moe), **{"vocab_size": 64, "num_layers": 3, **changes},
    )  # fmt: skip
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    }[optimizer]
    return LanguageModelModule(config, optimizer=make)


def local_bytes(tensors):
    from lit_interns1.strategies.parallelize import local

    return sum(local(t).numel() * local(t).element_size() for t in tensors)


def measure(rank, world, strategy, changes, accumulation):
    """What one optimizer step of a real run holds and communicates on this rank."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from torch.utils._pytree import tree_leaves

    from lit_interns1.strategies import MoEParallelStrategy
    from lit_interns1.strategies.planning.recorder import StepRecorder
    from lit_interns1.strategies.planning.step import synthetic_batch

    environment(rank, world)
    warnings.filterwarnings("ignore")
    module, result = make_module(changes), {}

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == accumulation:  # the second step: nothing is set up any more
                self.recorder = StepRecorder(pl_module)
                self.recorder.__enter__()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if hasattr(self, "recorder"):
                self.recorder.in_optimizer = True

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx != 2 * accumulation - 1:
                return
            self.recorder.__exit__(None, None, None)
            optimizer = trainer.optimizers[0]
            result["memory"] = {
                "parameters": local_bytes(pl_module.parameters()),
                "gradients": local_bytes(p.grad for p in pl_module.parameters() if p.grad is not None),
                "optimizer state": local_bytes(t for t in tree_leaves(dict(optimizer.state)) if torch.is_tensor(t)),
            }
            result["calls"], result["payload"] = dict(self.recorder.counts.calls), dict(self.recorder.counts.payload)

    trainer = L.Trainer(
        accelerator="cpu", devices=world, max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        accumulate_grad_batches=accumulation, gradient_clip_val=CLIP, log_every_n_steps=1, callbacks=[Record()],
        strategy=MoEParallelStrategy(**strategy), plugins=[TorchElasticEnvironment()],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(rank)
    data = []
    for _ in range(2 * accumulation):
        batch = synthetic_batch(ROWS, LENGTH)
        batch.input_ids = torch.randint(0, 64, (ROWS * LENGTH,), generator=generator)
        data.append(batch)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return result


def measure_all(rank, world, cases):
    return [measure(rank, world, *case) for case in cases]


def plan(world, strategy, changes, accumulation, hardware="h100"):
    from lit_interns1.strategies import MoEParallelStrategy, ParallelDims
    from lit_interns1.strategies.planning import Workload, load_hardware, make_plan

    strategy = MoEParallelStrategy(**strategy)
    workload = Workload(LENGTH, ROWS, ROWS * world * accumulation, CLIP)
    dims = ParallelDims(world, *strategy.sizes)
    return make_plan(make_module(changes), strategy, dims, workload, load_hardware(hardware))


EP2 = {"expert_parallel_size": 2}
CASES = {
    2: [
        ({}, {}, 1),
        (EP2, {}, 2),
        (EP2 | {"activation_checkpointing": True}, {"optimizer": "sgd"}, 1),
        ({**EP2, "compute_dtype": "bfloat16"}, {"dense_layers": (0,), "intermediate_size": 48, "num_layers": 5}, 1),
        ({**EP2, "dispatcher": "exact"}, {"optimizer": "amsgrad", "tie_word_embeddings": True}, 1),
    ],
    4: [
        ({**EP2, "reshard_after_forward": False}, {}, 1),
        ({"expert_parallel_size": 4}, {}, 1),
        ({**EP2, "replicate_size": 2}, {}, 2),
    ],
}


def parts(counts):
    """Without sums, of which the Trainer's callbacks have some too, and what the loops say to one another."""
    return {kind: n for kind, n in counts.items() if kind.purpose not in ("sums", "other")}


def total_sums(counts):
    return sum(n for kind, n in counts.items() if kind.purpose == "sums")


@pytest.mark.slow
@pytest.mark.parametrize("world", list(CASES))
def test_a_plan_says_what_real_ranks_hold_and_send(world):
    results = run_ranks(measure_all, world, CASES[world], timeout=180.0)
    for number, case in enumerate(CASES[world]):
        planned = plan(world, *case)
        for rank in range(world):
            real = results[rank][number]
            for name, size in real["memory"].items():
                assert planned.cost.memory[name] == size, (case, rank, name)
            in_plan, in_run = (planned.cost.calls, planned.cost.payload), (real["calls"], real["payload"])
            for found, expected in zip(in_plan, in_run, strict=True):
                assert parts(found) == parts(expected), (case, rank)
            # beside the step: the clock's tokens, what loops say before each further batch (two integers each), and
            # three integers on which ranks agree in every pass of static splits, in recomputation for each layer
            static = case[0].get("expert_parallel_size", 1) > 1 and case[0].get("dispatcher") != "exact"
            recomputed = 3 if case[0].get("activation_checkpointing") else 0
            agreements = (case[2] + recomputed) * static
            more_calls, more_bytes = (total_sums(b) - total_sums(a) for a, b in zip(in_plan, in_run, strict=True))
            assert (more_calls, more_bytes) == (case[2] + agreements, 16 * case[2] + 24 * agreements), (case, rank)


def test_costs_are_linear_in_the_layers(monkeypatch):
    from lit_interns1.strategies.planning import plan as planning

    case = (8, {"expert_parallel_size": 2, "compute_dtype": "bfloat16"}, {"num_layers": 4}, 2)
    by_layers = plan(*case)
    monkeypatch.setattr(planning, "EXACT_LAYERS", 9)
    counted = plan(*case)
    assert (by_layers.basis, counted.basis) == (
        "counted on 1 and 2 layers, linear in the 4 layers",
        "counted on the whole model",
    )
    assert by_layers.cost.calls == counted.cost.calls
    assert by_layers.cost.payload == counted.cost.payload
    assert by_layers.cost.flops == pytest.approx(counted.cost.flops, rel=1e-12)
    for name, size in counted.cost.memory.items():
        if name == "working memory":  # what is gathered ahead may have one more neighbour
            assert size <= 1.25 * by_layers.cost.memory[name]
        else:
            assert by_layers.cost.memory[name] == size, name


def test_plans_of_other_layouts_leave_nothing_behind():
    first = {"expert_parallel_size": 8, "shard_size": 8, "replicate_size": 4}
    second = {"expert_parallel_size": 2, "shard_size": 8, "replicate_size": 4}  # equal meshes, groups with other names
    for strategy in (first, second):
        assert plan(32, strategy, {"num_layers": 1}, 1).fits


def test_flops_are_those_of_the_formula():
    from lit_interns1.models import LanguageModel, flops_per_token

    for moe in ({}, {"router": "topk", "num_groups": 1, "router_gradient": "topk"}):
        cost = plan(2, {}, {"moe": moe}, 1).cost
        with torch.device("meta"):
            model = LanguageModel(make_module({"moe": moe}).config)
        # the formula takes the mean number of tokens attended to; attention's backward is 2.5 forwards instead of 2
        formula = flops_per_token(model, (LENGTH + 1) / 2) * ROWS * LENGTH
        assert cost.flops == pytest.approx(formula, rel=0.03)


def test_products_of_fp8_experts_count_like_others():
    from lit_interns1.nn.moe import LocalDispatcher, RoutedExperts
    from lit_interns1.strategies.planning.recorder import StepRecorder

    flops = {}
    for precision in ("native", "fp8"):
        experts = RoutedExperts(4, 128, 256, backend="fused", precision=precision)
        x = torch.randn(10, 128, requires_grad=True)
        rows = LocalDispatcher(4).dispatch(x, torch.arange(20).view(10, 2) % 4, torch.ones(10, 2))
        with StepRecorder(experts) as recorder:
            experts(rows).sum().backward()
        flops[precision] = recorder.counts.flops
    assert flops["fp8"] == flops["native"] == 3 * 6 * 20 * 128 * 256


@pytest.mark.parametrize(
    ("experts", "choices", "groups", "ranks"), [(8, 2, 1, 4), (8, 4, 2, 4), (8, 2, 2, 2), (12, 4, 2, 3)]
)
def test_visits_of_uniform_routing(experts, choices, groups, ranks):
    from itertools import combinations, product

    from lit_interns1.strategies.planning.uniform_routing import visit_probability

    size = experts // groups
    inside = [list(combinations(range(g * size, (g + 1) * size), choices // groups)) for g in range(groups)]
    sets = [set().union(*parts) for parts in product(*inside)]
    first = set(range(experts // ranks))
    expected = sum(bool(chosen & first) for chosen in sets) / len(sets)
    assert visit_probability(experts, choices, groups, ranks) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ({"shard_size": 8, "replicate_size": 2, "expert_parallel_size": 2}, {"vocab_size": 69}),  # padded
        pytest.param(
            {"expert_parallel_size": 4, "reshard_after_forward": False},
            {"activation_checkpointing": "block"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"compute_dtype": "bfloat16"},
            {"dense_layers": (0, 1), "intermediate_size": 48, "num_layers": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_formulas_of_the_search_are_what_is_counted(strategy, changes):
    from lit_interns1.strategies import MoEParallelStrategy
    from lit_interns1.strategies.planning import Workload
    from lit_interns1.strategies.planning.search import CostModel, Layout

    world = 16
    counted = plan(world, strategy, changes, 2)
    options = MoEParallelStrategy(**strategy)
    model = CostModel(make_module(changes), options, Workload(LENGTH, ROWS, ROWS * world * 2, CLIP))
    checkpointing = changes.get("activation_checkpointing", "none")
    cost = model.cost(Layout(counted.dims, options.reshard_after_forward, checkpointing, ROWS), accumulation=2)
    expected = {kind: size for kind, size in counted.cost.payload.items() if kind.purpose != "sums"}
    all_reduced = {k: v for k, v in cost.payload.items() if k.operation == "all-reduce"}
    assert {k: v for k, v in cost.payload.items() if k not in all_reduced} == {
        k: v for k, v in expected.items() if k.operation != "all-reduce"
    }
    assert sum(all_reduced.values()) == sum(v for k, v in expected.items() if k.operation == "all-reduce")
    assert cost.flops == pytest.approx(counted.cost.flops, rel=1e-9)
    for name in ("parameters", "gradients", "activations", "kept units", "accumulated gradients"):
        assert cost.memory[name] == pytest.approx(counted.cost.memory[name], rel=0.02), name
    assert cost.parameters == counted.cost.parameters


def test_link_times_by_hand():
    from lit_interns1.strategies.planning import Hardware
    from lit_interns1.strategies.planning.bounds import link_seconds
    from lit_interns1.strategies.planning.recorder import Kind

    machine = Hardware("two by four", 1e9, 1e12, 1e12, 4, 10.0, 1.0)
    # eight neighbours: 7/8 of 80 bytes come in; the other node's half is shared by four network ports
    assert link_seconds(Kind("all-gather", "", 8, 1), 80, machine) == pytest.approx((7.0, 10.0))
    assert link_seconds(Kind("all-reduce", "", 8, 1), 80, machine) == pytest.approx((14.0, 20.0))
    # every fourth rank: one on each node
    assert link_seconds(Kind("all-gather", "", 2, 4), 80, machine) == pytest.approx((0.0, 40.0))
    # inside a node, and half of the rows to the other one
    assert link_seconds(Kind("all-to-all", "", 4, 1), 80, machine) == pytest.approx((6.0, 0.0))
    assert link_seconds(Kind("all-to-all", "", 8, 1), 80, machine) == pytest.approx((3.0, 40.0))


def test_hardware_of_a_file(tmp_path):
    from lit_interns1.strategies.planning import load_hardware

    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nmemory: 64e9\nflops: 1e14\nmemory_bandwidth: 2e12\ndevices_per_node: 4\n"
        "node_bandwidth: 1e11\nnetwork_bandwidth: 25e9\n"
    )
    assert load_hardware(str(path)).memory == 64e9
    path.write_text("name: mine\nmemory: 64e9\nspeed: 3\n")
    with pytest.raises(ValueError, match=r"misses flops.* and has unknown speed"):
        load_hardware(str(path))
    with pytest.raises(ValueError, match="neither a file nor one of h100"):
        load_hardware("h900")
    path.write_text(
        "name: mine\nmemory: -1\nflops: 1e14\nmemory_bandwidth: 2e12\ndevices_per_node: 4\n"
        "node_bandwidth: 1e11\nnetwork_bandwidth: 25e9\n"
    )
    with pytest.raises(ValueError, match="memory = -1 must be a positive number"):
        load_hardware(str(path))


def test_gradients_are_summed_over_ranks_once_per_step_however_many_micro_batches():
    def scattered(accumulation):
        calls = plan(2, EP2, {}, accumulation).cost.calls
        return {kind: number for kind, number in calls.items() if kind.operation == "reduce-scatter"}

    assert sum(scattered(1).values()) > 0
    assert scattered(3) == scattered(1)
