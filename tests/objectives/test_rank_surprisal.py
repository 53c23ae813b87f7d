"""Rank-Surprisal Ratio against sorted logits in float64, closed forms, samples of greedy decoding, and over ranks."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_harness import run_ranks
from lit_interns1 import LanguageModel, generate, preset
from lit_interns1.data.packed_batch import PackedBatch
from lit_interns1.nn.head import LanguageModelHead, TokenScores
from lit_interns1.objectives.rank_surprisal import RankSurprisal, RankSurprisalRatio, RatioOfSet, rank_surprisal

V = 331


def reference(logits_TV, labels_T, sample_ids_T, num_samples, max_rank):
    """One token at a time: its place in the sorted logits behind all larger ones."""
    sums = [[0.0, 0.0, 0] for _ in range(num_samples)]
    for logits, label, sample in zip(logits_TV.double().numpy(), labels_T.tolist(), sample_ids_T.tolist(), strict=True):
        if label < 0:
            continue
        place = int(np.searchsorted(np.sort(-logits), -logits[label], side="left"))
        top = logits.max()
        log_normaliser = top + math.log(np.exp(logits - top).sum())
        for column, value in enumerate((min(place + 1, max_rank), log_normaliser - logits[label], 1)):
            sums[sample][column] += value
    return sums


@pytest.mark.parametrize("max_rank", [1, 20, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_sorted_logits(max_rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    head = LanguageModelHead(8, V, chunk_tokens=7).to(dtype)
    head.weight.data = torch.randn(V, 8, generator=generator, dtype=dtype).mul(4).round()  # whole numbers: many ties
    hidden_TD = torch.randn(50, 8, generator=generator, dtype=dtype).mul(2).round()
    labels_T = torch.randint(0, V, (50,), generator=generator)
    labels_T[torch.randperm(50, generator=generator)[:20]] = -100  # several spans in a sample
    sample_ids_T = torch.arange(50) // 13
    found = rank_surprisal(head(hidden_TD, labels_T, rank=True), labels_T, sample_ids_T, 4, max_rank)
    expected = reference(hidden_TD.double() @ head.weight.double().T.detach(), labels_T, sample_ids_T, 4, max_rank)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(torch.stack(list(found), 1).numpy(), expected, rtol=tolerance)
    ratio = [rank / surprisal for rank, surprisal, _ in expected]
    np.testing.assert_allclose(found.ratio_S.numpy(), ratio, rtol=tolerance)


def test_uniform_logits_have_rank_one_and_the_surprisal_of_the_vocabulary() -> None:
    labels_T = torch.tensor([5, -100, 330, 0])
    head = LanguageModelHead(8, V).double()
    head.weight.data.zero_()
    found = rank_surprisal(head(torch.ones(4, 8).double(), labels_T, rank=True), labels_T, torch.zeros(4).long(), 1)
    assert found.mean_rank_S.item() == 1.0
    assert found.mean_surprisal_S.item() == pytest.approx(math.log(V), rel=1e-12)
    assert found.ratio_S.item() == pytest.approx(1 / math.log(V), rel=1e-12)


def test_clipped_ranks() -> None:
    scores = TokenScores(torch.tensor([-0.5, -1.5]), torch.zeros(2), None, torch.tensor([99, 100]))
    labels_T, samples_T = torch.zeros(2).long(), torch.tensor([0, 1])
    assert rank_surprisal(scores, labels_T, samples_T, 2).rank_S.tolist() == [100.0, 100.0]
    assert rank_surprisal(scores, labels_T, samples_T, 2, 101).rank_S.tolist() == [100.0, 101.0]
    assert rank_surprisal(scores, labels_T, samples_T, 2, 1).ratio_S.tolist() == [2.0, pytest.approx(1 / 1.5)]


def test_a_greedy_sample_of_the_model_itself_has_rank_one_everywhere() -> None:
    model = LanguageModel.create(preset("tiny-s1-pro")).eval()
    prompts = [[5, 6, 7], [9], [100, 101]]
    output = generate(model, prompts, max_new_tokens=12, temperature=0)
    documents = []
    for prompt, tokens in zip(prompts, output.token_ids, strict=True):
        ids = torch.tensor(prompt + tokens)
        labels = torch.full_like(ids, -100)
        labels[len(prompt) - 1 : -1] = ids[len(prompt) :]
        documents.append({"input_ids": ids, "labels": labels})
    batch = PackedBatch.from_documents(documents)
    with torch.no_grad():
        scores = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, targets=batch.labels, rank=True).scores
    found = rank_surprisal(scores, batch.labels, batch.sample_id_T, len(prompts))
    assert found.tokens_S.tolist() == [12.0] * 3
    assert found.mean_rank_S.tolist() == [1.0] * 3
    torch.testing.assert_close(
        found.surprisal_S, -torch.stack([logp.sum() for logp in output.log_probs]).double(), rtol=1e-4, atol=1e-4
    )


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest storage that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_no_matrix_of_tokens_by_vocabulary_is_made() -> None:
    tokens, vocabulary = 4_000, 4_096
    head = LanguageModelHead(8, vocabulary, chunk_tokens=64)
    hidden_TD, labels_T = torch.randn(tokens, 8), torch.randint(0, vocabulary, (tokens,))
    with torch.no_grad(), LargestTensor() as watched:
        rank_surprisal(head(hidden_TD, labels_T, rank=True), labels_T, torch.arange(tokens) // 100, 40)
    assert 64 * vocabulary * 4 <= watched.bytes < 100 * vocabulary * 4  # a chunk of logits and no more
    with torch.no_grad(), LargestTensor() as whole:
        F.linear(hidden_TD, head.weight).logsumexp(-1)
    assert whole.bytes == tokens * vocabulary * 4  # what the watch would have seen


def samples(count: int = 30) -> tuple[RankSurprisal, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, 9, (count,), generator=generator).double()
    rank = tokens * (1 + 20 * torch.rand(count, generator=generator).double())
    surprisal = tokens * (0.1 + 3 * torch.rand(count, generator=generator).double())
    return RankSurprisal(rank, surprisal, tokens), torch.randint(0, 3, (count,), generator=generator)


def expected_set(found: RankSurprisal, keep: np.ndarray) -> dict[str, float]:
    keep = keep & (found.tokens_S.numpy() > 0)
    r, s = found.mean_rank_S.numpy()[keep], found.mean_surprisal_S.numpy()[keep]
    ratio = r.mean() / s.mean()
    error = (r - ratio * s).std(ddof=1) / math.sqrt(len(r)) / s.mean()
    return {"ratio": ratio, "mean_rank": r.mean(), "mean_surprisal": s.mean(), "samples": len(r),
            "standard_error": error}  # fmt: skip


def part(found: RankSurprisal, keep: slice) -> RankSurprisal:
    return RankSurprisal(*(column[keep] for column in found))


def on_ranks(rank: int, world_size: int) -> tuple[RatioOfSet, tuple[RatioOfSet, ...]]:
    found, group_S = samples()
    metric = RankSurprisalRatio(4)
    for keep in ([slice(0, 4), slice(4, 21)], [slice(21, 30)], [])[rank]:
        metric.update(part(found, keep), group_S[keep])
    return metric.compute()


def test_ratio_of_means_by_group_and_over_ranks() -> None:
    found, group_S = samples()
    metric = RankSurprisalRatio(4)
    metric.update(found, group_S)
    assert (found.tokens_S == 0).any()  # samples without a response are left out
    for result in [metric.compute(), *run_ranks(on_ranks, 3)]:
        whole, groups = result
        assert whole._asdict() == pytest.approx(expected_set(found, np.ones(30, dtype=bool)), rel=1e-9)
        for number in range(3):
            assert groups[number]._asdict() == pytest.approx(expected_set(found, group_S.numpy() == number), rel=1e-9)
        assert math.isnan(groups[3].ratio)
        assert groups[3].samples == 0


def test_a_ratio_of_means_is_not_a_mean_of_ratios() -> None:
    found = RankSurprisal(torch.tensor([2.0, 60.0]), torch.tensor([4.0, 5.0]), torch.tensor([2.0, 10.0]))
    metric = RankSurprisalRatio()
    metric.update(found)
    whole, groups = metric.compute()
    assert groups == (whole,)
    assert whole.ratio == pytest.approx((1 + 6) / (2 + 0.5))
    assert found.ratio_S.mean() == pytest.approx((0.5 + 12) / 2)


def test_refused() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    scores = TokenScores(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="rank=True"):
        rank_surprisal(scores, one, one, 1)
    with pytest.raises(ValueError, match="max_rank = 0"):
        rank_surprisal(scores._replace(rank_T=one), one, one, 1, 0)
