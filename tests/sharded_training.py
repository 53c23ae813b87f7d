"""What tests of sharded training share: one global batch dealt out to any number of ranks."""

import os

import torch
from torch.distributed.tensor import DTensor

ROWS, LENGTH, STEPS = 4, 24, 3


def batches(rank, world, accumulation):
    """Rows of the global batch, dealt out; rows have different numbers of documents and of tokens that count."""
    from lit_interns1.data import PackedBatch

    generator = torch.Generator().manual_seed(5)
    result = []
    for _ in range(STEPS):
        rows = []
        for row in range(ROWS):
            used = LENGTH - 5 * row  # the rest is padding
            ids, labels = (torch.randint(0, 64, (used,), generator=generator) for _ in range(2))
            labels[: 3 * row] = -100  # ranks do not count in proportion to their tokens
            cut = 3 + 2 * row
            documents = [
                {"input_ids": ids[:cut], "labels": labels[:cut]},
                {"input_ids": ids[cut:], "labels": labels[cut:]},
            ]
            rows.append(PackedBatch.from_documents(documents, row_length=LENGTH))
        per_batch = ROWS // (world * accumulation)
        for micro in range(accumulation):
            first = (micro * world + rank) * per_batch
            result.append(PackedBatch.concatenate(rows[first : first + per_batch]))
    return result


def environment(rank, world):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def sparse_network(layers):
    """A network of sparse layers that knows nothing of the kit's strategy, with weights."""
    from torch import nn

    from lit_interns1.nn.initialization import initialize_parameters
    from lit_interns1.nn.moe import MoEFeedForward, RoutedExperts, TopKRouter

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                MoEFeedForward(TopKRouter(16, 4, 2), RoutedExperts(4, 16, 8)) for _ in range(layers)
            )
            self.out = nn.Linear(16, 1)
            initialize_parameters(self, std=0.3)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)[0]
            return self.out(x).squeeze(-1)

    return Network()
