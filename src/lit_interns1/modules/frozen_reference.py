"""A frozen second network beside the one that is trained: the reference π_ref of preference and policy objectives.

    log π_ref(y_t | x, y_<t)   for the labels of a batch, without gradient

It is a child of the LightningModule beside `model`, so a strategy divides it as it divides `model`, and checkpoints
hold it: a resumed run compares with the same reference. The optimizer never sees it, it is always in eval mode, and its
routers choose for themselves (routing that is replayed belongs to the trained network).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.nn.head import TokenScores
from lit_interns1.nn.initialization import allocate
from lit_interns1.nn.parallel_plan import HasParallelPlan, ParallelPlan, default_plan


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """What a language model's forward takes of a packed batch; without targets, routing and media."""
    padded = batch.num_tokens < batch.input_ids.numel()
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "token_mask_T": batch.sample_id_T >= 0 if padded else None,
    }


def add_reference(module: Any, network: nn.Module, offload: bool = False) -> None:
    """Puts a frozen network beside the `model` of a LightningModule, as `reference`.

    Args:
        module: The LightningModule; call this in `build_beside`.
        network: On the meta device, if that is the default.
        offload: See `FrozenReference`.
    """
    module.reference = FrozenReference(network, offload)
    names = [name for name, _ in [*module.reference.named_parameters(), *module.reference.named_buffers()]]
    # DDP would broadcast its buffers before every step, also when they are on the host
    module._ddp_params_and_buffers_to_ignore = [f"reference.{name}" for name in names]


def copy_weights(reference: FrozenReference, model: nn.Module, device: torch.device | str) -> None:
    """Gives a reference the weights that the trained network has now; both are divided in the same way.

    Args:
        reference: May be on the meta device.
        model: A network of the same shape.
        device: Where a reference on the meta device goes.
    """
    allocate(reference.network, device)
    reference.network.load_state_dict(model.state_dict())


class FrozenReference(nn.Module):
    """Holds a network that is never trained.

    Args:
        network: The network, such as a `LanguageModel`, on any device; give it weights after a strategy has divided it.
        offload: Keep it in the memory of the host, and bring it to the device for each use: saves its memory on a GPU
            between uses, and costs two copies per use.
    """

    stands_beside = True
    """It is no part of what is trained (see `models.trained_parts`)."""

    def __init__(self, network: nn.Module, offload: bool = False) -> None:
        super().__init__()
        self.network, self.offload = network.requires_grad_(False).eval(), offload
        self.training = False

    def train(self, mode: bool = True) -> FrozenReference:
        """Does nothing: it is always in eval mode."""
        return self

    def parallel_plan(self) -> ParallelPlan:
        """That of the network."""
        return self.network.parallel_plan() if isinstance(self.network, HasParallelPlan) else default_plan(self.network)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Runs the network, without gradient."""
        with torch.no_grad():
            return self.network(*inputs, **options)

    def reference_scores(self, batch: PackedBatch, **options: Any) -> TokenScores:
        """Scores of the batch's labels, (T,) each, without gradient.

        Args:
            batch: Packed rows, on the device that is computed on.
            options: As of the network's forward: `temperature`, `entropy`, `rank`.
        """
        home = self._device()
        if self.offload and home != batch.device:
            self.to(batch.device)
        media = {"media": batch.media} if batch.media else {}
        scores: TokenScores = self(targets=batch.labels, **packed_inputs(batch), **media, **options).scores
        if self.offload and self._device().type != "cpu":
            self.to("cpu")
        return scores

    def _device(self) -> torch.device:
        return next(self.network.parameters()).device
