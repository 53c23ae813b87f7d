"""Token dispatch through DeepEP's kernels for NVLink and RDMA: the normal, high-throughput form of `deep_ep.Buffer`.

    layout   = get_dispatch_layout(ids)                    what goes where
    dispatch = each token once to every rank that owns any of its experts, with local ids (−1: elsewhere) and weights
    combine  = plain sums of the rows that come back
    backward of dispatch is combine, backward of combine is dispatch, over the same handle

DeepEP (github.com/deepseek-ai/DeepEP) moves bfloat16 rows and needs CUDA devices; its sums run in its own order.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_interns1.nn.moe.dispatch import RoutedRows
from lit_interns1_kernels.permute import group_by_expert


def load_buffer_type() -> Any:
    """`deep_ep.Buffer`.

    Raises:
        ImportError: If DeepEP is not installed, or there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ImportError('dispatcher = "deepep" needs CUDA devices, and there is none: choose "auto" or "exact"')
    try:
        return importlib.import_module("deep_ep").Buffer
    except ImportError as error:
        raise ImportError(
            'dispatcher = "deepep" needs the package deep_ep, which is built from github.com/deepseek-ai/DeepEP: '
            f'install it, or choose "auto" or "exact" ({error})'
        ) from error


class SharedBuffer:
    """DeepEP's communication buffer, one for all layers of a group; it grows with the rows.

    Args:
        group: The ranks that share experts.
        buffer_type: What has the interface of `deep_ep.Buffer`; None: that itself.
    """

    def __init__(self, group: dist.ProcessGroup, buffer_type: Any = None) -> None:
        self.group, self._type = group, buffer_type if buffer_type is not None else load_buffer_type()
        self._buffer: Any = None

    def get(self, row_bytes: int) -> Any:
        """The buffer for rows of so many bytes."""
        ranks = dist.get_world_size(self.group)
        configs = [self._type.get_dispatch_config(ranks), self._type.get_combine_config(ranks)]
        nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
        held = self._buffer
        if held is None or held.num_nvl_bytes < nvlink or held.num_rdma_bytes < rdma:
            self._buffer = self._type(self.group, nvlink, rdma)
        return self._buffer


class _Dispatch(torch.autograd.Function):
    """(T, D), (T, K) weights → what this rank's experts get: rows, weights (0 elsewhere), ids (−1 elsewhere)."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, num_experts: int, buffer: Any, route: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        per_rank, per_node, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(ids_TK, num_experts)
        x_SD, ids_SK, weights_SK, rows_per_expert, handle, _ = buffer.dispatch(
            x_TD, topk_idx=ids_TK, topk_weights=weights_TK, num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_in_rank, num_tokens_per_expert=per_expert,
        )  # fmt: skip
        route.update(handle=handle, buffer=buffer, rows=sum(rows_per_expert))
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(ids_SK)
        return x_SD, weights_SK, ids_SK

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor, gradient_SK: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, _ = ctx.buffer.combine(
            gradient_SD.contiguous(), ctx.handle, topk_weights=gradient_SK.contiguous()
        )
        return x_TD, weights_TK, None, None, None, None


class _Combine(torch.autograd.Function):
    """(S, D) → (T, D), summed."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        y_TD: Tensor = buffer.combine(y_SD.contiguous(), handle)[0]
        return y_TD

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(gradient_TD.contiguous(), handle=ctx.handle)[0], None, None


class DeepEPDispatcher:
    """Experts divided over the ranks of a process group in order, rows moved by DeepEP.

    Args:
        num_experts: E of the whole layer.
        buffer: Shared by the layers of the group.

    Raises:
        ValueError: If the number of ranks does not divide E.
    """

    def __init__(self, num_experts: int, buffer: SharedBuffer) -> None:
        ranks = dist.get_world_size(buffer.group)
        if num_experts % ranks:
            raise ValueError(f"the {num_experts} experts must be divisible by the {ranks} ranks that share them")
        self.num_experts, self.local_experts, self.buffer = num_experts, num_experts // ranks, buffer

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> RoutedRows:
        """See `TokenDispatcher`.

        Raises:
            ValueError: If the rows are not bfloat16.
        """
        if x_TD.dtype != torch.bfloat16:
            raise ValueError(
                f'dispatcher = "deepep" moves bfloat16 rows, got {x_TD.dtype}: set compute_dtype = "bfloat16"'
            )
        route: dict[str, Any] = {}
        buffer = self.buffer.get(x_TD.shape[1] * x_TD.element_size())
        x_SD, weights_SK, ids_SK = _Dispatch.apply(
            x_TD.contiguous(), weights_TK.float(), ids_TK, self.num_experts, buffer, route
        )
        # choices of other ranks' experts are sorted behind the last expert, and cut off
        ids_SK = torch.where(ids_SK < 0, self.local_experts, ids_SK)
        order_R, row_index_R, offsets_E = group_by_expert(ids_SK, self.local_experts + 1)
        order_R, row_index_R = order_R[: route["rows"]], row_index_R[: route["rows"]]
        row_weight_R = weights_SK.flatten().index_select(0, order_R)
        return RoutedRows(x_SD, row_index_R, offsets_E[:-1], row_weight_R, context=(buffer, route["handle"]))

    def combine(self, y_SD: Tensor, context: Any) -> Tensor:
        """Partial sums go back to their tokens and are added by DeepEP."""
        y_TD: Tensor = _Combine.apply(y_SD, *context)
        return y_TD
