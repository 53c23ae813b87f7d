"""N-gram models against a direct implementation with dictionaries, hand-computed numbers, and normalisation."""

import itertools
import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from lit_interns1.data.ngram import InterpolatedNGram

START = "<start>"


class DirectModel:
    """Chen & Goodman (1999), written out with tuples: one document start, nothing packed, nothing vectorised."""

    def __init__(self, order, vocab_size, documents, smoothing, weights):
        self.order, self.vocab_size, self.smoothing, self.weights = order, vocab_size, smoothing, weights
        raw = Counter()
        for document in documents:
            symbols = (START, *document)
            for end in range(1, len(symbols)):
                for length in range(1, order + 1):
                    if end - length + 1 >= 0:
                        raw[symbols[end - length + 1 : end + 1]] += 1
        in_front = defaultdict(set)
        for document in documents:
            symbols = (START, *document)
            for end in range(1, len(symbols)):
                for length in range(1, order):
                    if end - length >= 0:
                        in_front[symbols[end - length + 1 : end + 1]].add(symbols[end - length])
        self.count = {}
        for gram, count in raw.items():
            plain = smoothing == "jelinek_mercer" or len(gram) == order or gram[0] == START
            self.count[gram] = count if plain else len(in_front[gram])
        self.discounts = {length: self._discounts(length) for length in range(1, order + 1)}

    def _discounts(self, length):
        times = Counter(count for gram, count in self.count.items() if len(gram) == length)
        result = {1: 0.5, 2: 1.0, 3: 1.5}
        if times[1] and times[2]:
            share = times[1] / (times[1] + 2 * times[2])
            for i in (1, 2, 3):
                if times[i] and times[i + 1]:
                    estimate = i - (i + 1) * share * times[i + 1] / times[i]
                    if 0 < estimate <= i:
                        result[i] = estimate
        return result

    def probability(self, context, word):
        """`context` is the document so far."""
        symbols = ((START, *context))[-(self.order - 1) :] if self.order > 1 else ()
        return self._level(symbols, word)

    def _level(self, context, word):
        lower = self._level(context[1:], word) if context else 1 / self.vocab_size
        counts = {w: self.count[(*context, w)] for w in range(self.vocab_size) if (*context, w) in self.count}
        if not counts:
            return lower
        total, length = sum(counts.values()), len(context) + 1
        if self.smoothing == "jelinek_mercer":
            weight = self.weights[length - 1]
            return weight * counts.get(word, 0) / total + (1 - weight) * lower
        discount = {w: self.discounts[length][min(count, 3)] for w, count in counts.items()}
        return (counts.get(word, 0) - discount.get(word, 0)) / total + sum(discount.values()) / total * lower


def random_documents(seed, vocab_size, number=30, longest=25):
    generator = np.random.default_rng(seed)
    shape = generator.dirichlet(np.full(vocab_size, 0.3), size=vocab_size)
    documents = []
    for _ in range(number):
        document = [int(generator.integers(vocab_size))]
        for _ in range(int(generator.integers(0, longest))):
            document.append(int(generator.choice(vocab_size, p=shape[document[-1]])))
        documents.append(document)
    return documents


@pytest.mark.parametrize("smoothing", ["kneser_ney", "jelinek_mercer"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_direct_model(order, smoothing):
    weights = (0.9, 0.8, 0.6, 0.3)[:order]
    train, held_out = random_documents(1, 7), random_documents(2, 7, number=8)
    model = InterpolatedNGram(order, 7, smoothing=smoothing, weights=weights)
    for document in train:
        model.update(np.array(document))
    direct = DirectModel(order, 7, train, smoothing, weights)
    expected = [[math.log(direct.probability(d[:i], w)) for i, w in enumerate(d)] for d in held_out]
    for document, log_probs in zip(held_out, expected):
        np.testing.assert_allclose(model.log_prob(document), log_probs, rtol=1e-12)
    flat = np.concatenate(expected)
    assert model.cross_entropy(held_out) == pytest.approx(-flat.mean(), rel=1e-12)
    assert model.num_tokens == sum(map(len, train))


@pytest.mark.parametrize("smoothing", ["kneser_ney", "jelinek_mercer"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sums_to_one_for_any_context(order, smoothing):
    """Contexts that were seen, that were seen in part, and that were never seen; ids 5 … 7 never occur."""
    model = InterpolatedNGram(order, 8, smoothing=smoothing)
    for document in random_documents(3, 5):
        model.update(document)
    for length in range(4):
        for context in itertools.islice(itertools.product(range(8), repeat=length), 0, None, 3):
            probabilities = model.probabilities(context)
            assert probabilities.shape == (8,)
            assert probabilities.min() > 0
            assert probabilities.sum() == pytest.approx(1, abs=1e-12)
            assert model.log_prob([*context, 6])[-1] == pytest.approx(math.log(probabilities[6]), rel=1e-12)


def test_hand_computed_bigram():
    """One document, a b a b c = 0 1 0 1 2, four ids.

    Bigrams: (start 0) 1, (0 1) 2, (1 0) 1, (1 2) 1, so n_1 = 3, n_2 = 1, n_3 = 0: Y = 3/5, D_1 = 1 − 2·3/5·1/3 = 3/5,
    D_2 = 1 (nothing to estimate it from). Distinct tokens in front: 0: start, 1; 1: 0; 2: 1, so c_1 = 2, 1, 1; n_1 = 2,
    n_2 = 1: Y = 1/2, D_1 = 1 − 2 · 1/2 · 1/2 = 1/2, D_2 = 1. Hence λ() = (1 + 1/2 + 1/2) / 4 = 1/2 and
    p(0) = 1/4 + 1/8, p(1) = p(2) = 1/8 + 1/8, p(3) = 1/8.
    """
    model = InterpolatedNGram(2, 4)
    model.update([0, 1, 0, 1, 2])
    np.testing.assert_allclose(model.probabilities([3]), [3 / 8, 1 / 4, 1 / 4, 1 / 8], rtol=1e-12)  # unseen context
    # After 1: total 2, both discounted by 3/5, λ = 3/5.
    after_1 = [0.2 + 0.6 * 3 / 8, 0.6 / 4, 0.2 + 0.6 / 4, 0.6 / 8]
    np.testing.assert_allclose(model.probabilities([1]), after_1, rtol=1e-12)
    # After 0: total 2, one type of count 2, D_2 = 1, λ = 1/2. At the start: total 1, λ = 3/5.
    np.testing.assert_allclose(model.probabilities([0]), [3 / 16, 1 / 2 + 1 / 8, 1 / 8, 1 / 16], rtol=1e-12)
    np.testing.assert_allclose(model.log_prob([0, 1]), np.log([0.4 + 0.6 * 3 / 8, 5 / 8]), rtol=1e-12)


def test_documents_do_not_share_context():
    """However the same documents are handed over, the model is the same; glued together they are another one."""
    rows = np.random.default_rng(5).integers(0, 6, size=(20, 9))
    by_row, at_once, packed, glued = (InterpolatedNGram(3, 6) for _ in range(4))
    for row in rows:
        by_row.update(row)
        assert np.isfinite(by_row.log_prob(row)).all()  # asking in between does not disturb the counts
    at_once.update(rows)
    packed.update(rows.reshape(-1), cu_seqlens=np.arange(0, 181, 9))
    glued.update(rows.reshape(-1))
    expected = by_row.log_prob(rows)
    assert expected.shape == rows.shape
    np.testing.assert_array_equal(expected, at_once.log_prob(rows))
    np.testing.assert_array_equal(expected, packed.log_prob(rows))
    np.testing.assert_array_equal(expected.reshape(-1), packed.log_prob(rows.reshape(-1), np.arange(0, 181, 9)))
    assert not np.allclose(expected, glued.log_prob(rows))


def test_counting_in_pieces_changes_nothing(monkeypatch):
    ids = np.random.default_rng(6).zipf(1.5, size=(300, 40)) % 50
    whole, pieces = InterpolatedNGram(4, 50), InterpolatedNGram(4, 50)
    whole.update(ids)
    monkeypatch.setattr("lit_interns1.data.ngram._COMPRESS_EVERY", 500)
    for row in ids:
        pieces.update(row)
    np.testing.assert_array_equal(whole.log_prob(ids), pieces.log_prob(ids))


def test_higher_order_learns_more():
    """Token t is the sum of the two before it: a 3-gram predicts it, a bigram cannot."""
    generator, documents = np.random.default_rng(7), []
    for _ in range(200):
        document = list(generator.integers(0, 10, size=2))
        for _ in range(50):
            document.append((document[-1] + document[-2]) % 10)
        documents.append(np.array(document))
    entropy = {}
    for order in (1, 2, 3):
        model = InterpolatedNGram(order, 10)
        for document in documents[:150]:
            model.update(document)
        entropy[order] = model.cross_entropy(documents[150:])
    assert entropy[3] < 0.3 < 1.5 < entropy[2]


def test_largest_keys_do_not_overflow():
    """(vocab_size + 1)^order just below 2^63."""
    vocab_size = 55_107
    model = InterpolatedNGram(4, vocab_size)
    model.update(np.full(30, vocab_size - 1))
    assert model.probabilities([vocab_size - 1] * 3)[-1] > 0.9
    assert model.probabilities([vocab_size - 1] * 3).sum() == pytest.approx(1)


def test_a_million_tokens_take_seconds():
    ids = np.random.default_rng(8).zipf(1.3, size=(1000, 1000)) % 8192
    started = time.perf_counter()
    model = InterpolatedNGram(3, 8192)
    model.update(ids)
    model.cross_entropy([ids[:10]])
    assert time.perf_counter() - started < 10


def test_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="order=5"):
        InterpolatedNGram(5, 10)
    with pytest.raises(ValueError, match="63 bits"):
        InterpolatedNGram(4, 60_000)
    with pytest.raises(ValueError, match="smoothing='laplace'"):
        InterpolatedNGram(2, 10, smoothing="laplace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="order=2 of them"):
        InterpolatedNGram(2, 10, smoothing="jelinek_mercer", weights=(0.5, 0.5, 0.5))
    model = InterpolatedNGram(2, 10)
    with pytest.raises(ValueError, match="seen no tokens"):
        model.log_prob([1])
    model.update(np.zeros(0, dtype=np.int64))
    assert model.num_tokens == 0
    with pytest.raises(ValueError, match="from 3 to 10"):
        model.update([3, 10])
    with pytest.raises(ValueError, match="from -100 to 3"):
        model.update([3, -100])
    with pytest.raises(TypeError, match="float64"):
        model.update([0.5])
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to 3"):
        model.update([1, 2, 3], cu_seqlens=[0, 2])
    with pytest.raises(ValueError, match="decrease"):
        model.update([1, 2, 3], cu_seqlens=[0, 2, 1, 3])
    model.update([1])  # shorter than any context
    assert model.probabilities().sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one token"):
        model.cross_entropy([])
