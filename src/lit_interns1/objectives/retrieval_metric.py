"""How often the right caption of an image, or the right image of a caption, is among the first k of all.

    rank(i) = number of wrong candidates j with x_i·y_j ≥ max_{right j} x_i·y_j        R@k = share of i with rank(i) < k

A wrong candidate with the score of the right one counts against it, so embeddings that are all alike find nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_ROWS = 1024


def retrieval_ranks(query_ND: Tensor, candidate_ND: Tensor, key_N: Tensor) -> Tensor:
    """(N,) rank of the best right candidate of every query, 0 = first; candidates of the same key are right."""
    ranks = []
    for query, key in zip(query_ND.split(_ROWS), key_N.split(_ROWS), strict=True):
        score = query @ candidate_ND.T
        right = key[:, None] == key_N
        best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(((score >= best) & ~right).sum(1))
    return torch.cat(ranks) if ranks else key_N


class PairRetrieval(Metric):
    """Collects the embeddings of pairs; its states are those of all ranks together."""

    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]
    key: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("image", "text", "key"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, image_ND: Tensor, text_ND: Tensor, key_N: Tensor) -> None:
        """Adds pairs: embeddings of length 1, and keys that are equal where captions are equal."""
        self.image.append(image_ND.detach().float())
        self.text.append(text_ND.detach().float())
        self.key.append(key_N)

    def compute(self) -> dict[str, Tensor]:
        """`image_to_text` and `text_to_image`: (N,) ranks; `chance`: R@1 of a random order; and all `image`, `text` and
        `key`."""
        image, text, key = (dim_zero_cat(getattr(self, name)) for name in ("image", "text", "key"))
        count_N = torch.unique(key, return_inverse=True, return_counts=True)
        return {
            "image_to_text": retrieval_ranks(image, text, key),
            "text_to_image": retrieval_ranks(text, image, key),
            "chance": (count_N[2][count_N[1]].double() / len(key)).mean(),
            "image": image,
            "text": text,
            "key": key,
        }
