"""Operations that are called as plain functions where dispatch only costs time: the same numbers, and only there."""

import pytest
import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensorMode

from lit_interns1_kernels.backends import runs_plainly
from lit_interns1_kernels.permute import group_by_expert
from lit_interns1_kernels.rms_norm import rms_norm
from lit_interns1_kernels.rotary import rotary
from lit_interns1_kernels.routed_swiglu import choose_expert_backend, routed_swiglu
from lit_interns1_kernels.routing import route

OPERATIONS = {
    "rms_norm": lambda: rms_norm(torch.ones(5, 8).cumsum(1), torch.arange(8.0)),
    "rotary": lambda: rotary(torch.ones(5, 4, 8).cumsum(0), torch.ones(5, 2, 8), torch.ones(5, 2, 8).cumsum(2)),
    "route": lambda: route(torch.eye(5, 8).cumsum(1), 4, 2, scaling=0.5),
    "group_by_expert": lambda: group_by_expert(torch.tensor([[3, 1], [0, 3]]), 8),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_numbers_with_and_without_dispatch(name, monkeypatch):
    operation = OPERATIONS[name]
    dispatched = operation()  # gradients are on
    monkeypatch.setattr(CustomOpDef, "__call__", lambda *_: pytest.fail("dispatched"))
    with pytest.raises(pytest.fail.Exception, match="dispatched"):
        operation()
    with torch.no_grad():
        plain = operation()
    for ours, wanted in zip(*(x if isinstance(x, tuple) else (x,) for x in (plain, dispatched)), strict=True):
        assert torch.equal(ours, wanted)


def test_only_where_nothing_must_see_the_operation():
    x = torch.ones(2)
    assert not runs_plainly(x)
    with torch.no_grad():
        assert runs_plainly(x, None, torch.nn.Parameter(x))
        assert not runs_plainly(x.to("meta"))
        with FakeTensorMode():
            assert not runs_plainly(torch.ones(2))
            order, _, _ = OPERATIONS["group_by_expert"]()
            assert order.shape == (4,)
    with torch.inference_mode():
        assert runs_plainly(torch.ones(2))


def test_few_rows_without_gradients_go_through_one_product_per_expert():
    x, weight = torch.ones(4, 16), torch.ones(2, 16, 16)
    with torch.no_grad():
        assert choose_expert_backend("auto", x, weight, 100) == "grouped_mm"
        arguments = x, weight, torch.ones(2, 16, 8), torch.tensor([0, 1, 3]), torch.tensor([1, 3], dtype=torch.int32)
        found, wanted = (routed_swiglu(*arguments, torch.ones(3), backend=b) for b in ("auto", "loop"))
    torch.testing.assert_close(found, wanted)
