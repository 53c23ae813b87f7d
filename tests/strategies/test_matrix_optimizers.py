"""Muon and Mousse on several ranks: the steps of one process, few collectives, and state that moves between layouts."""

from contextlib import nullcontext

import pytest
import torch

from distributed_harness import run_ranks
from sharded_training import whole

STEPS, SAVED = 20, 13  # bases are refreshed at 1, 6, 11, 16: 13 is off that grid
OPTIONS = {
    "muon": ("Muon", {"split_heads": True}),
    "mousse": ("Mousse", {"side": "both", "refresh_every": 5, "elementwise_optimizer": "lion"}),
    "shared": ("Mousse", {"side": "right", "refresh_every": 5, "gram_all_reduce": True}),
    "staggered": ("Mousse", {"side": "auto", "refresh_every": 5, "stagger": True}),
}


def build(world, shard=None, replicate=1, expert=1):
    """A small sparse model, divided; and for one process, as it is."""
    from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig
    from lit_interns1.nn.initialization import initialize_parameters
    from lit_interns1.strategies.parallel_dims import ParallelDims
    from lit_interns1.strategies.parallelize import parallelize

    config = LanguageModelConfig(
        vocab_size=50, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=6,
        moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=10),
    )  # fmt: skip
    model = LanguageModel(config)
    initialize_parameters(model, seed=1, std=0.02)
    if shard is not None:
        dims = ParallelDims(world, shard, replicate, expert)
        parallelize(model, model.parallel_plan(), dims.build_meshes("cpu"), dims)
    return model


def give_gradients(model, step):
    """The same whole gradients for every division; expert 3 has none until step 4, and expert 0 none at step 7."""
    from torch.distributed.tensor import DTensor

    from lit_interns1.checkpoints.whole import local_part

    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        gradient = torch.randn(parameter.shape, generator=generator) * (1 + step % 3)
        if parameter.ndim == 3:
            gradient[3] *= step >= 4
            gradient[0] *= step != 7
        part = local_part(gradient, parameter)
        parameter.grad = (
            DTensor.from_local(
                part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                stride=parameter.stride(),
            ) if isinstance(parameter, DTensor) else part
        )  # fmt: skip


def optimizer_of(model, name):
    from lit_interns1 import optim

    kind, options = OPTIONS[name]
    return getattr(optim, kind)(optim.matrix_groups(model), lr=0.02, **options)


def train(rank, world, layouts, folder=None, resume=False):
    """Parameters after the last step for every layout and optimizer; all-to-alls and other collectives of a step."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.tensor.debug import CommDebugMode

    results = {}
    for label, layout in layouts.items():
        for name in NAMES.get(label, OPTIONS) if world == 4 or folder is None else OPTIONS:
            model = build(world, **layout)
            optimizer = optimizer_of(model, name)
            first = 1
            if resume:
                start = torch.load(f"{folder}/{name}.weights", weights_only=True)
                from lit_interns1.checkpoints.whole import load_whole_weights

                load_whole_weights(model, start)
                state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
                dcp.load(state, checkpoint_id=f"{folder}/{name}")
                set_optimizer_state_dict(model, optimizer, state["optimizer"])
                first = SAVED + 1
            for step in range(first, STEPS + 1):
                give_gradients(model, step)
                with CommDebugMode() if step == STEPS else nullcontext() as mode:
                    optimizer.step()
                if folder is not None and not resume and (label, step) == ("ep2", SAVED):
                    dcp.save(
                        {"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=f"{folder}/{name}"
                    )
                    weights = {n: whole(p) for n, p in model.named_parameters()}
                    if rank == 0:
                        torch.save(weights, f"{folder}/{name}.weights")
                    dist.barrier()
            counts = {str(op): n for op, n in mode.get_comm_counts().items()}
            results[label, name] = ({n: whole(p) for n, p in model.named_parameters()}, counts)
    return results


def check(results, expected):
    for found in results:
        for (label, name), (parameters, _) in found.items():
            for key, value in parameters.items():
                want = expected[None, name][0][key]
                error = float((value - want).norm() / want.norm())
                assert error < 1e-5, (label, name, key, error)


LAYOUTS = {
    1: {"one": {"shard": 1}},
    2: {"ep1": {"shard": 2}, "replicated": {"shard": 1, "replicate": 2}, "ep2": {"shard": 2, "expert": 2}},
    4: {
        "ep1": {"shard": 4}, "ep2": {"shard": 4, "expert": 2}, "ep4": {"shard": 4, "expert": 4},
        "hsdp": {"shard": 2, "replicate": 2, "expert": 2},
    },
}  # fmt: skip
NAMES = {"ep2": ["muon", "shared"], "ep4": ["staggered"], "replicated": ["mousse"]}  # other layouts: all


@pytest.fixture(scope="module")
def expected():
    return run_ranks(train, 1, {None: {}}, timeout=120.0)[0]


def test_one_process_that_is_divided_takes_the_same_steps(expected):
    check(run_ranks(train, 1, {"one": {"shard": 1}}), expected)


def test_any_layout_takes_the_steps_of_one_process_and_continues_those_of_another(expected, tmp_path):
    two = run_ranks(train, 2, LAYOUTS[2], str(tmp_path), timeout=120.0)
    check(two, expected)
    four = run_ranks(train, 4, LAYOUTS[4], timeout=120.0)
    check(four, expected)
    for world, layout in (
        (1, {None: {}}),
        (4, {"hsdp": LAYOUTS[4]["hsdp"]}),
    ):  # written by the last layout of two ranks
        check(run_ranks(train, world, layout, str(tmp_path), True, timeout=120.0), expected)
    # A shape of matrices costs two all-to-alls, experts that are whole on a rank none. Shapes: query, key and value,
    # output, router; with four ranks and no expert parallelism each rank has one whole expert of each stack.
    for results in (two, four):
        for label, layout in LAYOUTS[len(results)].items():
            for name in OPTIONS.keys() & {name for at, name in results[0] if at == label}:
                counts = results[0][label, name][1]
                shards = layout["shard"]
                if shards > 1:
                    shapes = 3 if name == "shared" else 4  # the output projection is the tall one
                    want = {"c10d.alltoall_base_": 2 * shapes} | ({"c10d.allreduce_": 1} if name == "shared" else {})
                    assert counts == want, (label, name)
                else:
                    assert not counts, (label, name, counts)


def test_torchs_muon_needs_many_more_collectives():
    ours, theirs, matrices = run_ranks(collectives, 2)[0]
    assert ours == 2
    assert theirs >= 11 * matrices


def collectives(rank, world):
    """Collectives of a step over equal matrices: ours, torch's, and the number of matrices."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    from lit_interns1.optim import Muon

    mesh, counts = init_device_mesh("cpu", (world,)), []
    for make in (lambda p: Muon(p, lr=0.1), lambda p: torch.optim.Muon(p, lr=0.1)):
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(3)))
        fully_shard(network, mesh=mesh)
        optimizer = make(network.parameters())
        network(torch.randn(5, 12)).square().sum().backward()
        with CommDebugMode() as mode:
            optimizer.step()
        counts.append(mode.get_total_counts())
    return (*counts, 3)
