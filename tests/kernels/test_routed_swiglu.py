"""The fused routed experts against the plain loop in float64: sizes, skew, precision, threads, tails, tracing."""

import logging
import multiprocessing

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_interns1_kernels import backends, routed_swiglu_cpu
from lit_interns1_kernels.routed_swiglu import (
    check_grouped_mm_sizes,
    choose_expert_backend,
    routed_swiglu,
    routed_swiglu_loop,
)

BALANCED, SKEWED, EMPTY_EDGES, ALL_IN_ONE, NONE = "balanced", "skewed", "empty edges", "all in one", "no rows"


def group_sizes(kind, num_experts, rows):
    if kind == NONE:
        return [0] * num_experts
    if kind == ALL_IN_ONE:
        return [0] * (num_experts - 1) + [rows]
    weights = torch.ones(num_experts)
    if kind == SKEWED:
        weights[1] = 0.7 * num_experts
    if kind == EMPTY_EDGES:
        weights[[0, -1]] = 0.0
    sizes = (weights / weights.sum() * rows).long()
    sizes[1] += rows - sizes.sum()
    return sizes.tolist()


def problem(kind=BALANCED, source=37, hidden=24, inner=20, experts=5, rows=111, dtype=torch.float64, seed=0, tail=0):
    """Arguments of `routed_swiglu`; gradients are wanted where there can be any."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    sizes = group_sizes(kind, experts, rows)
    count = sum(sizes) + tail
    index = torch.randint(0, source, (count,), generator=generator)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return [
        normal(source, hidden),
        normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
        normal(experts, hidden, inner, scale=inner**-0.5),
        index,
        offsets,
        normal(count),
    ]


def run(function, arguments, seed=1, **options):
    """Output and the four gradients."""
    y = function(*arguments, **options)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [arguments[i] for i in (0, 1, 2, 5)], direction)]


def reference(arguments):
    wide = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments]
    return run(routed_swiglu_loop, wide)


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("y", "x", "gate_up", "down", "weight"), actual, expected, strict=False):
        scale = e.norm().clamp(min=1e-30)
        error = (a.double() - e.double()).norm() / scale if e.numel() else torch.zeros(())
        assert torch.isfinite(a).all(), name
        assert error <= tolerance or (a.double() - e.double()).abs().max() <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [BALANCED, SKEWED, EMPTY_EDGES, ALL_IN_ONE, NONE])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fused_equals_the_loop_in_float64(kind, count, threads):
    threads(count)
    for sizes in ({"rows": 111}, {"rows": 1400, "experts": 3}, {"rows": 1}):  # below and above a block of rows
        arguments = problem(kind, **sizes)
        assert_close(run(routed_swiglu, arguments, backend="fused"), reference(arguments), 1e-13)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("units", [True, False])
def test_precision(dtype, tolerance, units, threads, monkeypatch):
    """`units` False: what a processor without products in this dtype does."""
    if not units:
        monkeypatch.setattr(routed_swiglu_cpu, "_has_units_for", lambda dtype: dtype == torch.float32)
    threads(2)
    arguments = problem(SKEWED, rows=2800, experts=3, dtype=dtype)  # several blocks of one expert
    actual = run(routed_swiglu, arguments, backend="fused")
    assert all(a.dtype == dtype for a in actual)
    assert_close(actual, reference(arguments), tolerance)


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["fused", "grouped_mm"])
def test_the_tail_neither_counts_nor_poisons(backend, uninitialised_memory_is_nan):
    arguments = problem(dtype=torch.float32, hidden=32, inner=16, tail=7)
    expected = reference(arguments)
    with torch.no_grad():
        arguments[5][-7:] = float("nan")
    actual = run(routed_swiglu, arguments, backend=backend, has_tail=True)
    expected[4][-7:] = 0.0
    assert_close(actual, expected, 1e-6)


def test_gradients_by_finite_differences():
    arguments = problem(source=5, hidden=4, inner=3, experts=3, rows=9)
    assert torch.autograd.gradcheck(lambda *a: routed_swiglu(*a, backend="fused"), arguments)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_nothing_is_recorded(mode, threads):
    threads(2)
    arguments = problem(rows=300)
    expected = routed_swiglu(*arguments, backend="loop")
    with mode():
        y = routed_swiglu(*arguments, backend="fused")
    assert not y.requires_grad
    assert_close([y], [expected.detach()], 1e-13)


def test_source_rows_without_experts_are_zero():
    arguments = problem(source=50, rows=20)
    y, grad_x, *_ = run(routed_swiglu, arguments, backend="fused")
    unused = torch.ones(50, dtype=torch.bool)
    unused[arguments[3]] = False
    assert unused.any()
    assert (y[unused] == 0).all()
    assert (grad_x[unused] == 0).all()


def test_results_do_not_depend_on_the_run():
    arguments = problem(SKEWED, rows=900, dtype=torch.float32)
    first, second = (run(routed_swiglu, arguments, backend="fused") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_kept_for_backward_is_gate_and_up_alone():
    arguments = problem(rows=111, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routed_swiglu(*arguments, backend="fused")
    given = {a.data_ptr() for a in arguments}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in given] == [(111, 40)]
    with torch.no_grad():
        y = torch.ops.lit_interns1.routed_swiglu(*arguments, False)
    assert y[1].numel() == 0


def test_registered_operations_pass_the_checks_of_torch():
    arguments = problem(rows=60, dtype=torch.float32)
    torch.library.opcheck(torch.ops.lit_interns1.routed_swiglu, (*arguments, True))
    x, gate_up, down, index, offsets, weight = (a.detach() for a in arguments)
    kept = torch.ops.lit_interns1.routed_swiglu(x, gate_up, down, index, offsets, weight, True)[1]
    backward = torch.ops.lit_interns1.routed_swiglu_backward
    torch.library.opcheck(backward, (torch.randn_like(x), x, gate_up, down, index, offsets, weight, kept))


def test_shapes_are_known_without_data():
    real = problem(dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        arguments = [mode.from_tensor(a) for a in real]
        y = routed_swiglu(*arguments)
        assert (y.shape, y.dtype) == ((37, 24), torch.bfloat16)
        gradients = torch.autograd.grad(y.sum(), [arguments[i] for i in (0, 1, 2, 5)])
    assert [g.shape for g in gradients] == [arguments[i].shape for i in (0, 1, 2, 5)]


def test_compiles_without_a_break():
    arguments = problem(dtype=torch.float32)
    compiled = torch.compile(lambda *a: routed_swiglu(*a).square(), backend="aot_eager", fullgraph=True)
    actual, expected = run(compiled, arguments), run(lambda *a: routed_swiglu(*a, backend="fused").square(), arguments)
    assert_close(actual, expected, 1e-6)


def _in_child(connection):
    arguments = problem(rows=700, dtype=torch.float32)
    connection.send([float(t.double().sum()) for t in run(routed_swiglu, arguments, backend="fused")])


def test_runs_in_a_forked_child(threads):
    threads(2)
    expected = [float(t.double().sum()) for t in run(routed_swiglu, problem(rows=700, dtype=torch.float32))]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    torch.set_num_threads(1)  # OpenMP itself does not survive a fork with threads
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(sender,), daemon=True)
    child.start()
    assert receiver.poll(60.0), "the child hangs"
    assert receiver.recv() == pytest.approx(expected, rel=1e-5, abs=1e-3)
    child.join(10.0)


def test_backends_that_cannot_run_are_refused():
    arguments = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match="'triton' is unknown: choose one of auto, fused, grouped_mm, loop"):
        routed_swiglu(*arguments, backend="triton")
    assert "hidden_size = 20 must be a multiple of 8" in check_grouped_mm_sizes(20, 16)
    with pytest.raises(ValueError, match="there is no kernel for xpu"):
        choose_expert_backend("fused", FakeDevice("xpu"), arguments[1], 1)


class FakeDevice:
    """What the choice reads of rows on a device that is not here."""

    def __init__(self, device, dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype

    def element_size(self):
        return self.dtype.itemsize


def test_auto_on_other_devices(monkeypatch):
    weight = torch.empty(2, 32, 16, device="meta")
    assert choose_expert_backend("auto", FakeDevice("xpu"), weight, 8) == "grouped_mm"
    odd = torch.empty(2, 34, 17, device="meta")
    assert choose_expert_backend("auto", FakeDevice("xpu"), odd, 8) == "loop"
    monkeypatch.setattr(backends, "triton_target", lambda device: "sm90")
    assert choose_expert_backend("auto", FakeDevice("cuda:0"), weight, 8) == "fused"
    assert choose_expert_backend("auto", FakeDevice("cuda:0", torch.float64), weight, 8) == "grouped_mm"


def test_short_work_beside_spinning_threads_is_left_to_grouped_mm(monkeypatch, threads):
    threads(2)
    x, weight = torch.empty(4, 64), torch.empty(2, 128, 64)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "30000000000")
    assert choose_expert_backend("auto", x, weight, 100) == "grouped_mm"
    assert choose_expert_backend("auto", x, weight, 10**7) == "fused"
    monkeypatch.setenv("GOMP_SPINCOUNT", "4000")
    assert choose_expert_backend("auto", x, weight, 100) == "fused"


def test_what_computes_is_told_once(caplog):
    backends._reported.clear()
    with caplog.at_level(logging.INFO, logger="lit_interns1_kernels"):
        for _ in range(2):
            routed_swiglu(*problem(), backend="fused")
        routed_swiglu(*problem(), backend="loop")
    assert [r.getMessage() for r in caplog.records] == ["experts: cpu (cpu)", "experts: loop (cpu)"]


def test_converting_for_want_of_units_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    routed_swiglu_cpu._has_units_for.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="lit_interns1_kernels"):
            for _ in range(2):
                routed_swiglu(*problem(dtype=torch.bfloat16), backend="fused")
        assert sum("no bfloat16 units" in r.getMessage() for r in caplog.records) == 1
    finally:
        routed_swiglu_cpu._has_units_for.cache_clear()


@pytest.mark.parametrize("sizes", [[32] * 32, [5, 900, 3, 40, 0, 0, 77], [1] * 100, [0, 0, 2000, 0], [300, 20, 20, 20]])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_cover_every_row_once_and_have_equal_shares(sizes, parts):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    plan = routed_swiglu_cpu._plan(ends, parts, 512)
    rows, owners = [], []
    for part in plan.parts:
        pieces = [part.pieces[i : i + 4] for i in range(0, len(part.pieces), 4)]
        owners.append({expert for expert, *_ in pieces})
        rows.append([r for expert, start, stop, _ in pieces for r in range(start, stop) if start < ends[expert]])
        assert [r for i in range(0, len(part.blocks), 4) for r in range(*part.blocks[i : i + 2])] == rows[-1]
    assert [r for mine in rows for r in mine] == list(range(ends[-1]))
    seen_before = [(n, e) for n, mine in enumerate(owners) for e in mine if any(e in earlier for earlier in owners[:n])]
    assert sorted(plan.shared) == sorted(seen_before)
    # equal up to what a part that ends at an expert's edge gives or takes, and the cost of starting an expert
    assert max(map(len, rows)) <= ends[-1] / parts + 2 * 32 + 8 * len(sizes) / 2
