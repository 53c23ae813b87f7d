"""An optimizer over networks, with the parameter groups that its kind asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_interns1.optim.matrix_groups import matrix_groups
from lit_interns1.optim.matrix_optimizer import MatrixOptimizer
from lit_interns1.optim.parameter_groups import weight_decay_groups


def build_optimizer(
    make: Callable[[Iterable[Any]], Optimizer], *networks: nn.Module, decay_embeddings: bool = True
) -> Optimizer:
    """Calls `make` with `weight_decay_groups` of the networks, or with `matrix_groups` if it makes a `MatrixOptimizer`.

    Args:
        make: Makes an optimizer from parameter groups.
        networks: No group holds parameters of two.
        decay_embeddings: Also decay embedding tables.
    """
    groups = [group for network in networks for group in weight_decay_groups(network, decay_embeddings)]
    optimizer = make(groups)
    if isinstance(optimizer, MatrixOptimizer):
        optimizer.state.clear()  # its memory is not needed twice
        optimizer = make([group for network in networks for group in matrix_groups(network, decay_embeddings)])
    return optimizer
