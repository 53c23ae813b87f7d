"""Mousse: Muon in the eigenbases of Shampoo's preconditioners (arXiv 2603.09697).

    L ← β L + (1 − β) G Gᵀ,   R ← β R + (1 − β) Gᵀ G;    L ≈ Q_L Λ_L Q_Lᵀ,  R ≈ Q_R Λ_R Q_Rᵀ   every T steps
    Y = Λ_L^−α Q_Lᵀ M Q_R Λ_R^−α;    O = polar(Y);    Z = Q_L Λ_L^−α O Λ_R^−α Q_Rᵀ;    ΔW ∝ ‖O‖ Z / ‖Z‖

The same powers stand on both sides of the polar factor. α = 1/4 is what the theory asks for, 1/8 (spectral tempering)
what works better; 0 is Muon. As in the authors' code, means are scaled to mean eigenvalue 1, which also takes away that
they start at zero. Batches, stacks of experts, sides by shape, staggered refreshing and all that concerns several ranks
are this kit's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.optim.eigenbases import refresh
from lit_interns1.optim.elementwise import ElementwiseName
from lit_interns1.optim.matrix_layout import Layout
from lit_interns1.optim.matrix_optimizer import Batch, MatrixOptimizer, Polar, RateAdjustment, choose
from lit_interns1.optim.orthogonalization import CoefficientSet, factor_from_gram
from lit_interns1.optim.row_exchange import Pending

Side = Literal["both", "left", "right", "smaller", "auto"]


class Mousse(MatrixOptimizer):
    """Mousse for matrices and stacks of experts, AdamW or Lion for everything else.

    Memory per A × B matrix in float32: Muon's A B, and 2 A² for the left and 2 B² for the right side. Preconditioners
    are float32 whatever the parameters are (float64 with float64 parameters). See `Muon` for groups and for several
    ranks. A matrix whose gradient is zero only decays; an expert that has had no tokens yet is not preconditioned.

    Args:
        params: Parameter groups of `matrix_groups`, or parameters: those of two and three dimensions are matrices then.
        lr: η. (The authors use 0.06 with `adjust_lr="spectral_norm"` at 160M parameters.)
        momentum: μ.
        nesterov: Look one step ahead; the authors do not.
        weight_decay: λ, decoupled.
        side: Which sides are preconditioned: "both"; "left" (rows) or "right" (columns); "smaller" of the two;
            "auto": both, but only the smaller where one is more than twice the other.
        alpha: α, 0 to 1/4.
        beta: β of the preconditioners.
        eps: ε on their eigenvalues, whose mean is 1.
        refresh_every: T. Bases are computed at steps 1, 1 + T, 1 + 2T, …
        stagger: Refresh matrix j at steps t with (t + j) mod T = 1 instead (all of them at step 1), so that no step
            pays for all.
        graft: Give the update the norm that the polar factor had.
        max_precondition_size: Sides above this size are not preconditioned.
        gram_all_reduce: Where only the right side is preconditioned and rows ≥ columns, let every rank keep its rows
            and add up GᵀG and UᵀU (U: the momentum) instead of giving the matrix to an owner: one all-reduce of 2 B²
            in float64 per shape in place of two all-to-alls of A B, for which every rank computes the basis. Pays for
            matrices that are many times as tall as wide.
        adjust_lr: See `Muon`.
        coefficients: Of the Newton–Schulz iteration; see `newton_schulz`.
        polar: "newton_schulz", or "svd" for the exact polar factor (slow).
        compute_dtype: What Newton–Schulz computes with; None: bfloat16 on GPUs, the type of the momentum on CPUs.
        split_heads: Take the heads of query, key and value projections one by one.
        elementwise_optimizer: For the parameters that are no matrices: "adamw" or "lion" (the authors' choice).
        elementwise_lr: Their rate; None: `lr`.
        elementwise_betas: Their β₁, β₂; None: (0.9, 0.95) for AdamW, (0.9, 0.99) for Lion.
        elementwise_eps: ε of AdamW.
        elementwise_clip: Limit the norm of their gradients; see `Muon`.

    Raises:
        ValueError: For an option out of its range; for a parameter that is divided over ranks by columns.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.1,
        side: Side = "auto",
        alpha: float = 0.125,
        beta: float = 0.95,
        eps: float = 1e-5,
        refresh_every: int = 10,
        stagger: bool = False,
        graft: bool = True,
        max_precondition_size: int = 8192,
        gram_all_reduce: bool = False,
        adjust_lr: RateAdjustment = "match_rms_adamw",
        coefficients: CoefficientSet = "dion",
        polar: Polar = "newton_schulz",
        compute_dtype: torch.dtype | str | None = None,
        split_heads: bool = False,
        elementwise_optimizer: ElementwiseName = "adamw",
        elementwise_lr: float | None = None,
        elementwise_betas: tuple[float, float] | None = None,
        elementwise_eps: float = 1e-8,
        elementwise_clip: float | None = None,
    ) -> None:
        if side not in get_args(Side):
            raise ValueError(f"side must be one of {', '.join(get_args(Side))}, got {side!r}")
        if not 0 <= alpha <= 0.25:
            raise ValueError(f"alpha must lie in [0, 0.25], got {alpha}")
        if not 0 <= beta < 1 or eps <= 0:
            raise ValueError(f"beta must lie in [0, 1) and eps be positive, got {beta} and {eps}")
        if refresh_every < 1 or max_precondition_size < 1:
            raise ValueError(
                f"refresh_every and max_precondition_size must be at least 1, got {refresh_every} and "
                f"{max_precondition_size}"
            )
        self.side, self.alpha, self.beta, self.eps = side, alpha, beta, eps
        self.refresh_every, self.stagger, self.graft = refresh_every, stagger, graft
        self.max_precondition_size, self.gram_all_reduce = max_precondition_size, gram_all_reduce
        super().__init__(
            params, lr, momentum, nesterov, weight_decay, adjust_lr, coefficients, polar, compute_dtype, split_heads,
            elementwise_optimizer, elementwise_lr, elementwise_betas, elementwise_eps, elementwise_clip,
        )  # fmt: skip

    def sides(self, rows: int, columns: int) -> dict[str, int]:
        """The sides of a matrix that are preconditioned, "left" or "right" or both or none, and their sizes."""
        side = self.side
        if side == "auto":
            side = "both" if max(rows, columns) <= 2 * min(rows, columns) else "smaller"
        if side == "smaller":
            side = "left" if rows <= columns else "right"
        sizes = {"left": rows, "right": columns}
        wanted = sizes if side == "both" else {side: sizes[side]}
        return {name: size for name, size in wanted.items() if size <= self.max_precondition_size}

    def cost(self, rows: int, columns: int) -> float:
        """Also the decomposition, about 20 d³ every T steps, and the changes of basis."""
        sizes = self.sides(rows, columns).values()
        return super().cost(rows, columns) + sum(20 * d**3 / self.refresh_every + 6 * rows * columns * d for d in sizes)

    def new_state(self, layout: Layout) -> dict[str, Tensor]:
        """Momentum; per side the mean, its basis (at first the identity) and eigenvalues."""
        state = super().new_state(layout)
        front = (layout.owned, layout.blocks)
        for name, size in self.sides(layout.rows, layout.columns).items():
            state[name] = state["momentum"].new_zeros(*front, size, size)
            state[f"{name}_basis"] = torch.eye(size).to(state[name]).repeat(*front, 1, 1)
            state[f"{name}_values"] = state["momentum"].new_ones(*front, size)
        return state

    def prepare(self, layout: Layout, state: dict[str, Tensor], gradient: Tensor, live: Tensor, step: int) -> Tensor:
        """Momentum in the eigenbases, whitened."""
        result = super().prepare(layout, state, gradient, live, step)
        sides = self.sides(layout.rows, layout.columns)
        if not sides or not layout.owned:
            return result
        due = self._due(layout, step)
        for name in sides:
            outer = gradient @ gradient.mT if name == "left" else gradient.mT @ gradient
            self._learn(state, name, outer, live, due)
            result = self._turned(state, name, result, into=True)
        return result

    def finish(self, layout: Layout, state: dict[str, Tensor], orthogonal: Tensor) -> Tensor:
        """Back from the eigenbases, with the same powers again."""
        result = orthogonal
        sides = self.sides(layout.rows, layout.columns)
        for name in sides:
            result = self._turned(state, name, result, into=False)
        if self.graft and sides:
            norms = [torch.linalg.matrix_norm(x, keepdim=True) for x in (orthogonal, result)]
            result = result * (norms[0] / norms[1].clamp(min=1e-30))
        return result

    # -- rows that stay where they are -------------------------------------------------------------------------------

    def shares(self, rows: int, columns: int) -> bool:
        """With `gram_all_reduce`, tall matrices that are preconditioned on the right only."""
        return self.gram_all_reduce and rows >= columns and list(self.sides(rows, columns)) == ["right"]

    def start_shared(self, batch: Batch) -> Pending:
        """Sums over all rows: GᵀG and UᵀU of every matrix, (matrices, 2, columns, columns) float64."""
        grams = []
        for _, gradient, moment in self._shared_parts(batch):
            direction = self._direction(gradient, moment)
            grams.append(torch.stack([_gram(gradient), _gram(direction)], dim=1))
        summed = torch.cat(grams)
        work = dist.all_reduce(summed, group=batch.layouts[0].group, async_op=True)
        return Pending(summed, summed, work)

    def finish_shared(self, batch: Batch, pending: Pending, step: int) -> list[Tensor]:
        """U_r (W T Wᵀ) with W = Q_R Λ_R^−α: what `prepare` and `finish` do, as one factor from the right."""
        first, updates = batch.layouts[0], []
        reduced = pending.wait().split([layout.stack for layout in batch.layouts])
        for (layout, gradient, moment), grams in zip(self._shared_parts(batch), reduced, strict=True):
            of_gradient, of_direction = grams.unbind(1)
            live = (of_gradient.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)[:, None, None]
            direction = self._direction(gradient, moment)
            moment.copy_(torch.where(live, moment * self.momentum + gradient, moment))
            state = self.state[layout.parameter]
            due = self._due(layout, step)
            self._learn(state, "right", of_gradient[:, None].to(moment.dtype), live[..., None], due)
            basis, values = state["right_basis"][:, 0].double(), state["right_values"][:, 0].double()
            turn = basis * values.pow(-self.alpha)[:, None, :]
            whitened = turn.mT @ of_direction @ turn
            factor = factor_from_gram(whitened, None if self.polar == "svd" else self.coefficients)
            total = turn @ factor @ turn.mT
            if self.graft:
                squares = factor.mT @ whitened @ factor  # OᵀO
                before, after = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (squares, turn @ squares @ turn.mT))
                total = total * (before / after.clamp(min=1e-60)).sqrt()[:, None, None]
            total = total * choose(live, self.shape_factor(first.rows, first.columns), 0.0, total.dtype)
            updates += (direction @ total.to(direction.dtype)).to(gradient.dtype).unbind(0)
        return updates

    def _shared_parts(self, batch: Batch) -> Iterator[tuple[Layout, Tensor, Tensor]]:
        """Layouts with (stack, own rows, columns) gradient and momentum."""
        gradients = iter(batch.gradients())
        for layout in batch.layouts:
            gradient = torch.stack([next(gradients) for _ in range(layout.stack)])
            moment = self.state[layout.parameter]["momentum"][:, 0]
            yield layout, gradient.to(moment.dtype), moment

    def _direction(self, gradient: Tensor, moment: Tensor) -> Tensor:
        """U after this step's gradient, momentum being what it was before."""
        following = moment * self.momentum + gradient
        return torch.add(gradient, following, alpha=self.momentum) if self.nesterov else following

    # -- preconditioners ---------------------------------------------------------------------------------------------

    def _learn(self, state: dict[str, Tensor], name: str, outer: Tensor, live: Tensor, due: list[int]) -> None:
        """Takes G Gᵀ or GᵀG into the mean of one side, and computes bases that are due."""
        mean = state[name]
        mean.lerp_(outer, choose(live, 1 - self.beta, 0.0, mean.dtype))
        if due:
            means, bases, values = (
                x.view(-1, *x.shape[2:]) for x in (mean, state[f"{name}_basis"], state[f"{name}_values"])
            )
            refresh(means, bases, values, due, self.eps)

    def _due(self, layout: Layout, step: int) -> list[int]:
        """Which matrices' bases are computed in this step."""
        phase = 1 % self.refresh_every
        if self.stagger and step > 1:
            entries = [e for e, n in enumerate(layout.numbers) if (step + n) % self.refresh_every == phase]
        else:
            entries = list(range(layout.owned)) if step % self.refresh_every == phase else []
        return [entry * layout.blocks + block for entry in entries for block in range(layout.blocks)]

    def _turned(self, state: dict[str, Tensor], name: str, matrices: Tensor, into: bool) -> Tensor:
        """Into or out of the eigenbasis of one side, with λ^−α there."""
        basis, powers = state[f"{name}_basis"], state[f"{name}_values"].pow(-self.alpha)
        if name == "left":
            return (basis.mT @ matrices) * powers[..., None] if into else basis @ (matrices * powers[..., None])
        return (matrices @ basis) * powers[..., None, :] if into else (matrices * powers[..., None, :]) @ basis.mT


def _gram(matrices: Tensor) -> Tensor:
    return matrices.double().mT @ matrices.double()
