"""Contrastive losses and retrieval against sums written out in float64, over chunks and over gloo ranks."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_harness import run_ranks
from lit_interns1.objectives.contrastive import SigmoidContrastiveLoss, SoftmaxContrastiveLoss
from lit_interns1.objectives.retrieval_metric import PairRetrieval

KEYS = torch.tensor([5, 7, 5, 9, 7, 5, 2])


def pairs(count=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(3.7, dtype=torch.float64)
    bias = torch.tensor(-1.3, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    return [value.requires_grad_() for value in (unit(x, dim=1), unit(y, dim=1), scale, bias)]


def written_out(kind, x, y, scale, bias, keys):
    """The mean loss, one term at a time, in Python's floats."""
    x, y, t, b = x.tolist(), y.tolist(), scale.item(), bias.item()
    n = len(x)
    s = [[t * sum(p * q for p, q in zip(x[i], y[j], strict=True)) + b for j in range(n)] for i in range(n)]
    right = [[keys[i] == keys[j] for j in range(n)] for i in range(n)]
    total = 0.0
    for i in range(n):
        if kind == "sigmoid":
            for j in range(n):
                z = 1 if right[i][j] else -1
                total += -math.log(1 / (1 + math.exp(-z * s[i][j])))
            continue
        for scores in ([s[i][j] - b for j in range(n)], [s[j][i] - b for j in range(n)]):
            together = math.log(sum(math.exp(score) for score in scores))
            good = [score for score, r in zip(scores, right[i], strict=True) if r]
            total += 0.5 * (together - sum(good) / len(good))
    return total / n


def loss_of(kind, chunk=1024, shared=True):
    return {"softmax": SoftmaxContrastiveLoss, "sigmoid": SigmoidContrastiveLoss}[kind](chunk, shared)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_the_loss_is_the_sum_written_out(kind, shared, chunk):
    x, y, scale, bias = pairs()
    loss, metrics = loss_of(kind, chunk, shared)(x, y, scale, bias, KEYS)
    keys = KEYS.tolist() if shared else list(range(7))
    assert float(loss.mean.detach()) == pytest.approx(written_out(kind, x, y, scale, bias, keys), rel=1e-12)
    assert float(loss.count) == 7
    assert float(metrics["alignment"]) == pytest.approx(float((x * y).sum().detach()), rel=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_gradients_are_the_closed_form(kind, chunk):
    """dL/dS is (softmax − target)/2N of rows and of columns, or −z σ(−z s)/N; the rest is the product rule."""
    x, y, scale, bias = pairs()
    loss, _ = loss_of(kind, chunk)(x, y, scale, bias, KEYS)
    loss.mean.backward()
    with torch.no_grad():
        right = (KEYS[:, None] == KEYS).double()
        s, n = scale * x @ y.T, len(x)
        if kind == "softmax":
            share = right / right.sum(1, keepdim=True)
            slope = (s.softmax(1) - share + s.softmax(0) - share.T) / (2 * n)
        else:
            z = 2 * right - 1
            slope = -z * torch.sigmoid(-z * (s + bias)) / n
        wanted = {"x": scale * slope @ y, "y": scale * slope.T @ x, "scale": (slope * (x @ y.T)).sum()}
    torch.testing.assert_close(x.grad, wanted["x"])
    torch.testing.assert_close(y.grad, wanted["y"])
    torch.testing.assert_close(scale.grad, wanted["scale"])
    if kind == "sigmoid":
        torch.testing.assert_close(bias.grad, slope.sum())


def test_softmax_without_shared_captions_is_two_cross_entropies():
    x, y, scale, _ = pairs()
    loss, _ = SoftmaxContrastiveLoss(shared_captions=False)(x, y, scale, key_N=KEYS)
    target = torch.arange(7)
    scores = scale * x @ y.T
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(loss.mean, (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2)


def test_half_precision_embeddings_are_scored_in_float32():
    x, y, scale, bias = (value.detach().bfloat16() for value in pairs())
    loss, _ = SigmoidContrastiveLoss()(x, y, scale, bias)
    wide, _ = SigmoidContrastiveLoss()(x.float(), y.float(), scale.float(), bias.float())
    assert loss.sum.dtype == torch.float32
    torch.testing.assert_close(loss.sum, wide.sum, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(SigmoidContrastiveLoss()(x, y, scale, bias)[0].sum, wide.sum, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize(("kind", "most"), [("sigmoid", 256), ("softmax", 16 * 64)])
def test_no_matrix_of_all_pairs_exists(kind, most):
    values = pairs(count=64, width=4)
    with Largest() as largest:
        loss, _ = loss_of(kind, chunk=16)(*values)
        loss.sum.backward()
    assert largest.numbers <= most  # 64 × 64 = 4096


SHARES = {1: [11], 3: [5, 0, 6]}


def towers(rank, world):
    """On every rank: the sums of the loss and of the gradients of shared weights, over all ranks; ranks are ragged, and
    one has nothing."""
    import torch.distributed as dist

    torch.manual_seed(0)
    images, captions = (torch.randn(11, 6, dtype=torch.float64) for _ in range(2))
    keys = torch.tensor([1, 2, 3, 1, 5, 6, 2, 8, 9, 5, 1])
    first = sum(SHARES[world][:rank])
    mine = slice(first, first + SHARES[world][rank])
    result = {}
    for kind in ("softmax", "sigmoid"):
        for shared in (False, True):
            weights = [torch.randn(6, 5, dtype=torch.float64).requires_grad_() for _ in range(2)]
            scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
            bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
            x, y = (v[mine] @ w for v, w in zip((images, captions), weights, strict=True))
            x, y = (v / (v.norm(dim=1, keepdim=True) + 1e-9) for v in (x, y))
            loss, _ = loss_of(kind, 3, shared)(x, y, scale, bias, keys[mine])
            loss.sum.backward()
            parts = [loss.sum.detach(), loss.count, *(v.grad for v in (*weights, scale)), bias.grad]
            parts = [torch.zeros((), dtype=torch.float64) if part is None else part.double() for part in parts]
            for part in parts if world > 1 else []:
                dist.all_reduce(part)
            result[kind, shared] = parts
    alone, _ = SigmoidContrastiveLoss()(images[mine, :5], captions[mine, :5], scale, bias, across_ranks=False)
    result["alone"] = float(alone.sum.detach())

    metric = PairRetrieval()
    metric.update(images[mine, :5], captions[mine, :5], keys[mine])
    found = metric.compute()
    result["ranks"] = {name: sorted(found[name].tolist()) for name in ("image_to_text", "text_to_image")}
    result["chance"] = float(found["chance"])
    return result


def test_ranks_together_are_one_process():
    wanted = towers(0, 1)
    results = run_ranks(towers, 3)
    for result in results:
        for case in wanted.keys() - {"alone", "ranks", "chance"}:
            for ours, theirs in zip(result[case], wanted[case], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=str(case))
        assert result["ranks"] == wanted["ranks"]
        assert result["chance"] == pytest.approx(wanted["chance"])
    assert sum(result["alone"] for result in results) < wanted["alone"]  # fewer negatives, and no collective


def test_retrieval_is_that_of_a_sorted_list():
    torch.manual_seed(3)
    x, y = torch.randn(2, 30, 4)
    keys = torch.randint(0, 20, (30,))
    metric = PairRetrieval()
    for part in torch.arange(30).split(7):
        metric.update(x[part], y[part], keys[part])
    found = metric.compute()
    for name, query, candidate in (("image_to_text", x, y), ("text_to_image", y, x)):
        for i in range(30):
            order = (candidate @ query[i]).argsort(descending=True)
            assert int(found[name][i]) == (keys[order] == keys[i]).nonzero()[0].item()
    chance = sum(float((keys == key).sum()) / 30 for key in keys) / 30
    assert float(found["chance"]) == pytest.approx(chance)


def test_embeddings_that_are_all_alike_find_nothing():
    metric = PairRetrieval()
    metric.update(torch.ones(6, 3), torch.ones(6, 3), torch.arange(6))
    assert metric.compute()["image_to_text"].tolist() == [5] * 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SoftmaxContrastiveLoss(0), "chunk_pairs = 0"),
        (lambda: SigmoidContrastiveLoss()(torch.ones(3, 4), torch.ones(2, 4), torch.ones(())), r"\(3, 4\).*\(2, 4\)"),
        (
            lambda: SigmoidContrastiveLoss()(torch.ones(3, 4), torch.ones(3, 4), torch.ones(()), key_N=KEYS),
            r"\(7,\) for 3 pairs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
