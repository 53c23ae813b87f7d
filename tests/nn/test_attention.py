import pytest
import torch

from lit_interns1.nn.document_attention import DocumentAttention
from lit_interns1.nn.kv_cache import CachedAttention, KeyValueCache

LENGTHS = {
    "mixed": [3, 70, 1, 40, 0, 64, 2, 65, 33],
    "equal": [16, 16, 16],
    "one": [45],
    "many short": [5, 9, 2, 30, 31, 1, 8, 8, 12, 4] * 3,
}


def oracle(q, k, v, lengths, causal=True):
    """Softmax attention document by document in float64, written out."""
    q, k, v = q.double(), k.double(), v.double()
    share = q.shape[1] // k.shape[1]
    outputs, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        for_heads = []
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // share].T / q.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            for_heads.append(scores.softmax(-1) @ v[rows, head // share])
        outputs.append(torch.stack(for_heads, 1))
        start += n
    return torch.cat(outputs)


def random_qkv(tokens, heads=4, kv_heads=2, d=16):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, d, generator=generator) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "flex", "dense"])
@pytest.mark.parametrize("case", LENGTHS)
def test_values_and_gradients_equal_documents_written_out(backend, case, causal):
    lengths = LENGTHS[case]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    leaves = random_qkv(sum(lengths))
    ours = [x.clone().requires_grad_() for x in leaves]
    reference = [x.clone().requires_grad_() for x in leaves]
    attend = DocumentAttention(boundaries, backend, causal)
    expected = oracle(*reference, lengths, causal)
    if backend == "flex":
        with pytest.raises(ValueError, match="no backward pass on CPUs"):
            attend(0, *ours)
        torch.testing.assert_close(attend(0, *leaves).double(), expected.detach(), atol=2e-5, rtol=1e-4)
        return
    y = attend(0, *ours)
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-4)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    expected.backward(upstream.double())
    for left, right in zip(ours, reference, strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=2e-5, rtol=1e-4)


def test_no_tokens_and_wrong_boundaries():
    assert DocumentAttention(torch.tensor([0]))(0, *random_qkv(0)).shape == (0, 4, 16)
    with pytest.raises(ValueError, match="never decrease"):
        DocumentAttention(torch.tensor([0, 5, 3]))
    with pytest.raises(ValueError, match="covers 5 tokens, the input has 7"):
        DocumentAttention(torch.tensor([0, 5]))(0, *random_qkv(7))
    with pytest.raises(ValueError, match="backend 'flash' is unknown"):
        DocumentAttention(torch.tensor([0, 5]), "flash")


def test_cached_steps_equal_attention_at_once():
    totals = [9, 4, 11]  # two sequences start and decode, a third one joins while they go on
    steps = [(0, [6, 1]), (2, []), (2, [10]), (3, [])]  # sequences that decode, lengths of the prompts behind them
    q, k, v = random_qkv(sum(totals))
    sequences = [x.split(totals) for x in (q, k, v)]
    cache = KeyValueCache(1, num_slots=4, max_length=12)
    done, pieces = [0, 0, 0], [[], [], []]
    for decoding, prompts in steps:
        new = [1] * decoding + prompts
        past = torch.tensor(done[:decoding], dtype=torch.int64)
        slots = [(decoding + i, length) for i, length in enumerate(prompts)]
        attend = CachedAttention(cache, past, max(done[:decoding], default=0), slots)
        assert attend.position_ids_T.tolist() == [p for s, n in enumerate(new) for p in range(done[s], done[s] + n)]
        flat = [torch.cat([x[s][done[s] : done[s] + n] for s, n in enumerate(new)]) for x in sequences]
        for s, piece in enumerate(attend(0, *flat).split(new)):
            pieces[s].append(piece)
            done[s] += new[s]
    assert done == totals
    for piece, expected in zip(pieces, oracle(q, k, v, totals).split(totals), strict=True):
        torch.testing.assert_close(torch.cat(piece).double(), expected, atol=2e-5, rtol=1e-4)
    cache.copy(2, [3, 0], 7)
    for whole, rows in ((cache.keys[0], k), (cache.values[0], v)):
        third = rows.split(totals)[2].transpose(0, 1)
        assert torch.equal(whole[3, :, :7], third[:, :7])
        assert torch.equal(whole[0, :, :7], third[:, :7])
        assert torch.equal(whole[2, :, :11], third)
    with pytest.raises(ValueError, match="13 tokens does not fit into a cache of 12"):
        CachedAttention(cache, torch.tensor([9, 4, 12]), 12)
    with pytest.raises(ValueError, match="14 tokens does not fit into a cache of 12"):
        CachedAttention(cache, torch.tensor([9]), 9, [(1, 14)])
