"""What Muon and Mousse share: batches of equal matrices, whole matrices of divided parameters, and state that moves.

    gradient → prepare (momentum, whitening) → orthogonalise, all matrices of one shape at once → finish → W

A matrix whose rows FSDP2 has divided has one owner, which holds its state and computes its update: one all-to-all
brings the rows of all matrices of one shape to their owners, one takes the updates back, and while one shape is
computed the next travels. Experts that are whole on a rank stay there. State dicts hold tensors that are divided like
their parameters, whoever owned them, so checkpoints know nothing of the number of ranks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_interns1.optim import elementwise
from lit_interns1.optim.elementwise import BETAS, ElementwiseName, local
from lit_interns1.optim.matrix_layout import Layout, first_entry, ranks_that_share_rows
from lit_interns1.optim.orthogonalization import CoefficientSet, check_coefficients, newton_schulz, polar_factor
from lit_interns1.optim.row_exchange import Pending, RowExchange, balanced_owners
from lit_interns1.training import total_norm

RateAdjustment = Literal["match_rms_adamw", "spectral_norm", "original", "none"]
Polar = Literal["newton_schulz", "svd"]

_ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "spectral_norm": lambda rows, columns: (rows / columns) ** 0.5,
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "none": lambda rows, columns: 1.0,
}
_TOGETHER = 2**25  # numbers on a rank that are computed at once, at most (but at least one parameter)
_IN_FLIGHT = 2  # shapes whose gradients travel while another one is computed, at most


@dataclass(frozen=True)
class Batch:
    """Parameters of one shape, divided over the same ranks."""

    layouts: list[Layout]
    exchange: RowExchange | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all blocks, and columns."""
        return self.layouts[0].blocks * self.layouts[0].rows, self.layouts[0].columns

    @property
    def shared(self) -> bool:
        """Whether nobody owns these matrices."""
        return self.layouts[0].shared

    def gradients(self) -> list[Tensor]:
        """(own rows, columns) of every entry; zeros where a parameter has no gradient."""
        result: list[Tensor] = []
        for layout in self.layouts:
            gradient = layout.parameter.grad
            whole = torch.zeros_like(local(layout.parameter)) if gradient is None else local(gradient)
            result += layout.parts(whole).unbind(0)
        return result


class MatrixOptimizer(Optimizer):
    """The base of `Muon` and `Mousse`; see there for the options.

    Parameters come in groups from `matrix_groups`, or as they are: then those of two dimensions are matrices, and those
    of three are stacks of them.

    Raises:
        ValueError: For an option out of its range, or a parameter whose columns are divided over ranks.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, nesterov: bool, weight_decay: float,
        adjust_lr: RateAdjustment, coefficients: CoefficientSet, polar: Polar, compute_dtype: torch.dtype | str | None,
        split_heads: bool, elementwise_optimizer: ElementwiseName, elementwise_lr: float | None,
        elementwise_betas: tuple[float, float] | None, elementwise_eps: float, elementwise_clip: float | None,
    ) -> None:  # fmt: skip
        check_coefficients(coefficients)
        for name, value, choices in (
            ("adjust_lr", adjust_lr, tuple(_ADJUSTMENTS)), ("polar", polar, get_args(Polar)),
            ("elementwise_optimizer", elementwise_optimizer, get_args(ElementwiseName)),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        for name, number in (("lr", lr), ("weight_decay", weight_decay), ("elementwise_lr", elementwise_lr or 0.0)):
            if number < 0:
                raise ValueError(f"{name} must not be negative, got {number}")
        if elementwise_clip is not None and elementwise_clip <= 0:
            raise ValueError(f"elementwise_clip must be positive, or None for no clipping, got {elementwise_clip}")
        self.momentum, self.nesterov, self.adjust_lr = momentum, nesterov, adjust_lr
        self.coefficients: CoefficientSet = coefficients
        self.polar, self.compute_dtype = polar, _dtype(compute_dtype)
        self.split_heads = split_heads
        self.elementwise_optimizer: ElementwiseName = elementwise_optimizer
        self.elementwise_betas = tuple(elementwise_betas or BETAS[elementwise_optimizer])
        self.elementwise_eps, self.elementwise_clip = elementwise_eps, elementwise_clip
        super().__init__(_classified(params, elementwise_lr), {"lr": lr, "weight_decay": weight_decay, "steps": 0})
        self._layouts = self._lay_out()
        self._batches = self._form_batches()
        for group in self.param_groups:
            for parameter in group["params"]:
                layout = self._layouts.get(parameter)
                self.state[parameter] = (
                    elementwise.new_state(elementwise_optimizer, parameter)
                    if layout is None
                    else self.new_state(layout)
                )

    # -- what an optimizer decides -------------------------------------------------------------------------------------

    def new_state(self, layout: Layout) -> dict[str, Tensor]:
        """State of a parameter's owned matrices before the first step; (owned, blocks, rows of that tensor, ...)."""
        dtype = torch.float64 if layout.parameter.dtype == torch.float64 else torch.float32
        return {"momentum": torch.zeros(layout.shape, dtype=dtype, device=local(layout.parameter).device)}

    def prepare(
        self, layout: Layout, state: dict[str, Tensor], gradient: Tensor, live: Tensor, step: int
    ) -> Tensor:  # fmt: skip
        """What is orthogonalised; here the gradient with momentum.

        Args:
            layout: Of the parameter.
            state: Of its owned matrices; changed in place.
            gradient: (owned, blocks, rows, columns).
            live: (owned, blocks, 1, 1) False where the whole gradient is zero: that matrix's state must not change.
            step: Number of this step, from 1.
        """
        moment = state["momentum"]
        moment.mul_(choose(live, self.momentum, 1.0, moment.dtype)).add_(gradient)
        return torch.add(gradient, moment, alpha=self.momentum) if self.nesterov else moment

    def finish(self, layout: Layout, state: dict[str, Tensor], orthogonal: Tensor) -> Tensor:
        """The update before the factor for the shape; (owned, blocks, rows, columns)."""
        return orthogonal

    def shares(self, rows: int, columns: int) -> bool:
        """Whether matrices of this shape whose rows are divided get no owner, but go by `start_shared`."""
        return False

    def start_shared(self, batch: Batch) -> Pending:
        """Begins the step of a batch of such matrices: what has to be known of all rows."""
        raise NotImplementedError

    def finish_shared(self, batch: Batch, pending: Pending, step: int) -> list[Tensor]:
        """(own rows, columns) updates of every entry, with the factor for the shape."""
        raise NotImplementedError

    def cost(self, rows: int, columns: int) -> float:
        """Arithmetic of one matrix, in any unit: owners are chosen by it."""
        return 15.0 * rows * columns * min(rows, columns)

    def shape_factor(self, rows: int, columns: int) -> float:
        """By `adjust_lr`."""
        return _ADJUSTMENTS[self.adjust_lr](rows, columns)

    # -- how parameters are divided ------------------------------------------------------------------------------------

    def _lay_out(self) -> dict[Tensor, Layout]:
        """Layouts in the order of the groups. Owners are dealt out over all matrices of one group of ranks."""
        found = []
        costs: dict[Any, list[float]] = defaultdict(list)
        for group in self.param_groups:
            if group["kind"] != "matrix":
                continue
            blocks = group.get("row_blocks", 1) * (group.get("head_blocks", 1) if self.split_heads else 1)
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3) or parameter.shape[-2] % blocks:
                    raise ValueError(
                        f"a matrix parameter has two dimensions, or three for a stack, and rows that divide into "
                        f"{blocks} blocks, got shape {tuple(parameter.shape)}"
                    )
                ranks = ranks_that_share_rows(parameter)
                rows, columns = parameter.shape[-2:]
                stack = local(parameter).shape[0] if parameter.ndim == 3 else 1
                shared = ranks is not None and blocks == 1 and self.shares(rows, columns)
                found.append((parameter, blocks, stack, ranks, shared))
                costs[ranks] += [] if shared else [blocks * self.cost(rows // blocks, columns)] * stack
        owners = {ranks: iter(balanced_owners(c, ranks.size())) for ranks, c in costs.items() if ranks is not None}
        layouts, number = {}, 0
        for parameter, blocks, stack, ranks, shared in found:
            mine = () if ranks is None or shared else tuple(next(owners[ranks]) for _ in range(stack))
            layouts[parameter] = Layout(
                parameter, blocks, parameter.shape[-2] // blocks, parameter.shape[-1], stack, ranks, mine,
                number + first_entry(parameter), shared,
            )  # fmt: skip
            number += parameter.shape[0] if parameter.ndim == 3 else 1
        return layouts

    def _form_batches(self) -> list[Batch]:
        """Parameters of one shape; several batches where one would take too much memory."""
        members: dict[Any, list[list[Layout]]] = defaultdict(lambda: [[]])
        for parameter, layout in self._layouts.items():
            shape = (layout.blocks, layout.rows, layout.columns, parameter.dtype)
            parts = members[layout.group, layout.shared, *shape]
            size = sum(local(other.parameter).numel() for other in parts[-1])
            if parts[-1] and size + local(parameter).numel() > _TOGETHER:
                parts.append([])
            parts[-1].append(layout)
        batches = []
        for (ranks, shared, *_), parts in members.items():
            for layouts in parts:
                owners = [owner for layout in layouts for owner in layout.owners]
                batches.append(Batch(layouts, None if ranks is None or shared else RowExchange(ranks, owners)))
        return batches

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Ranks that share rows of a matrix must take it together.

        Nothing happens if no parameter has a gradient.

        Args:
            closure: Computes the loss and its gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss
        for group in self.param_groups:
            group["steps"] += 1
        self._step_matrices()
        self._step_elementwise()
        return loss

    def _step_matrices(self) -> None:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        waiting = deque(batch for batch in self._batches if batch.exchange is not None)
        arriving: deque[tuple[Batch, Pending]] = deque()
        leaving: deque[tuple[Batch, Pending]] = deque()

        def send() -> None:
            if waiting:
                batch = waiting.popleft()
                assert batch.exchange is not None
                arriving.append((batch, batch.exchange.start_gather(batch.gradients(), batch.shape[0])))

        def receive() -> None:
            batch, pending = leaving.popleft()
            assert batch.exchange is not None
            self._apply(batch, batch.exchange.finish_scatter(pending, *batch.shape), groups)

        sums = [(batch, self.start_shared(batch)) for batch in self._batches if batch.shared]
        for _ in range(_IN_FLIGHT):
            send()
        for batch in self._batches:  # what is whole here is computed while the first gradients travel
            if batch.exchange is None and not batch.shared:
                self._apply(batch, self._updates(batch, torch.stack(batch.gradients()), groups).unbind(0), groups)
        for batch, pending in sums:
            step = groups[id(batch.layouts[0].parameter)]["steps"]
            self._apply(batch, self.finish_shared(batch, pending, step), groups)
        while arriving:
            batch, pending = arriving.popleft()
            assert batch.exchange is not None
            gradients = batch.exchange.finish_gather(pending, *batch.shape)
            send()
            leaving.append((batch, batch.exchange.start_scatter(self._updates(batch, gradients, groups))))
            if len(leaving) > 1:
                receive()
        while leaving:
            receive()

    def _updates(self, batch: Batch, gradients: Tensor, groups: dict[int, dict[str, Any]]) -> Tensor:
        """(owned entries of all layouts, rows of all blocks, columns), with the factor for the shape.

        A matrix without any gradient, such as that of an expert without tokens, does not move, and its state neither.
        """
        first = batch.layouts[0]
        blocks = gradients.view(-1, first.blocks, first.rows, first.columns)
        live = (blocks != 0).any(-1, keepdim=True).any(-2, keepdim=True)
        counts = [layout.owned for layout in batch.layouts]
        prepared = []
        for layout, gradient, alive in zip(batch.layouts, blocks.split(counts), live.split(counts), strict=True):
            state, step = self.state[layout.parameter], groups[id(layout.parameter)]["steps"]
            prepared.append(self.prepare(layout, state, gradient.to(state["momentum"].dtype), alive, step))
        orthogonal = self._orthogonalize(torch.cat(prepared)).split(counts)
        finished = torch.cat([
            self.finish(layout, self.state[layout.parameter], part)
            for layout, part in zip(batch.layouts, orthogonal, strict=True)
        ])  # fmt: skip
        finished.mul_(choose(live, self.shape_factor(first.rows, first.columns), 0.0, finished.dtype))
        return finished.to(gradients.dtype).view(gradients.shape)

    def _orthogonalize(self, matrices: Tensor) -> Tensor:
        if self.polar == "svd" or matrices.numel() == 0:
            return polar_factor(matrices) if matrices.numel() else matrices
        dtype = self.compute_dtype or (torch.bfloat16 if matrices.is_cuda else matrices.dtype)
        return newton_schulz(matrices, self.coefficients, dtype)

    def _apply(self, batch: Batch, updates: Sequence[Tensor], groups: dict[int, dict[str, Any]]) -> None:
        remaining = iter(updates)
        for layout in batch.layouts:
            group = groups[id(layout.parameter)]
            mine = [next(remaining) for _ in range(layout.stack)]
            if layout.parameter.grad is None:
                continue
            weights = layout.weights()
            weights.mul_(1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(list(weights.unbind(0)), mine, alpha=-group["lr"])

    def _step_elementwise(self) -> None:
        groups = [group for group in self.param_groups if group["kind"] == "elementwise"]
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if self.elementwise_clip is not None and gradients:
            scale = (self.elementwise_clip / total_norm(gradients).clamp(min=1e-12)).clamp(max=1.0)
            torch._foreach_mul_([local(g) for g in gradients], scale)
        for group in groups:
            present = [p for p in group["params"] if p.grad is not None]
            if present:
                elementwise.update(
                    self.elementwise_optimizer, present, [p.grad for p in present], [self.state[p] for p in present],
                    group["lr"], group["weight_decay"], (self.elementwise_betas[0], self.elementwise_betas[1]),
                    self.elementwise_eps,
                )  # fmt: skip

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State of matrices as tensors whose rows are divided as those of the parameter. All ranks must call it.

        A tensor of (owned, blocks, rows, ...) becomes one of (stack, blocks · rows, ...), without the stack for a
        parameter of two dimensions.
        """
        result: dict[str, Any] = super().state_dict()
        for number, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            if layout := self._layouts.get(parameter):
                own = self.state[parameter]
                result["state"][number] = {name: layout.to_rows(own[name], name == "momentum") for name in sorted(own)}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, on any number of ranks; all must call it.

        Raises:
            ValueError: If it is the state of other parameters or of another optimizer.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        if len(keys) != len(parameters):
            raise ValueError(f"the state is of {len(keys)} parameters, the optimizer has {len(parameters)}")
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for name in ("kind", "row_blocks", "head_blocks"):
                if mine.get(name) != theirs.get(name):
                    raise ValueError(
                        f"the state is that of another division into matrices: {name} is {theirs.get(name)!r} there "
                        f"and {mine.get(name)!r} here"
                    )
        given = {p: state_dict["state"][key] for key, p in zip(keys, parameters, strict=True) if p in self._layouts}
        own = {parameter: self.state[parameter] for parameter in given}
        for parameter, saved in given.items():
            if saved.keys() != own[parameter].keys():
                raise ValueError(
                    f"the state of a matrix holds {sorted(saved)}, this optimizer's {sorted(own[parameter])}: it was "
                    f"written by another optimizer, or with other options"
                )
        rest = {key: state_dict["state"][key] for key, p in zip(keys, parameters, strict=True) if p not in given}
        super().load_state_dict({**state_dict, "state": rest})
        for parameter, tensors in own.items():
            self.state[parameter] = tensors
            for name in sorted(tensors):
                self._layouts[parameter].take_rows(tensors[name], given[parameter][name], name == "momentum")


def choose(condition: Tensor, value: float, other: float, dtype: torch.dtype) -> Tensor:
    """One of two numbers everywhere, in full precision and without waiting for the device."""
    return torch.full_like(condition, value, dtype=dtype).masked_fill_(~condition, other)


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    names = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    if isinstance(given, str):
        if given not in names:
            raise ValueError(f"compute_dtype must be one of {', '.join(names)}, or None, got {given!r}")
        return names[given]
    return given


def _classified(params: Iterable[Any], elementwise_lr: float | None) -> list[dict[str, Any]]:
    """Groups that all say their kind."""
    given: list[Any] = list(params)
    groups: list[dict[str, Any]] = []
    for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
        members = list(group["params"])
        if "kind" in group:
            groups.append({**group, "params": members})
            continue
        for kind in ("matrix", "elementwise"):
            chosen: list[Any] = [p for p in members if (p.ndim in (2, 3) and min(p.shape) > 1) == (kind == "matrix")]
            if chosen:
                groups.append({**group, "params": chosen, "kind": kind})
    if elementwise_lr is not None:
        for entry in groups:
            if entry["kind"] == "elementwise":
                entry["lr"] = elementwise_lr
    return groups
