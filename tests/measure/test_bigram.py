"""The bigram baseline against a table computed word for word from its definition."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from pellucid.measure.bigram import DISCOUNT, bigram_loss


def streams(split):
    """Every document as [eos] + text + [eos], from the documents themselves, not from rows."""
    for index in range(len(split.reader.starts)):
        yield [split.tokenizer.eos_token_id, *split.document(index)["token_ids"]]


def brute_force(train, held_out, V):
    """Interpolated Kneser-Ney with one discount, in the words of Chen & Goodman (1998, equation 4.34)."""
    counts, following = Counter(), defaultdict(set)
    for stream in streams(train):
        for a, b in pairwise(stream):
            counts[a, b] += 1
            following[a].add(b)
    preceding = Counter(b for _, b in counts)
    unseen = 1e-2  # what a token that never occurred counts as
    whole = sum(preceding.values()) + unseen * V
    totals = Counter()
    for (a, _), n in counts.items():
        totals[a] += n
    nats, tokens = 0.0, 0
    for stream in streams(held_out):
        for a, b in pairwise(stream):
            continuation = (preceding[b] + unseen) / whole
            if totals[a]:
                discounted = max(counts[a, b] - DISCOUNT, 0.0) / totals[a]
                p = discounted + DISCOUNT * len(following[a]) / totals[a] * continuation
            else:
                p = continuation
            nats, tokens = nats - math.log(p), tokens + 1
    return nats / tokens


def test_bigram_loss_equals_its_definition(tiny_run):
    data = tiny_run.dataset()
    expected = brute_force(data.train, data.validation, data.tokenizer.vocab_size)
    assert bigram_loss(data.train, data.validation) == pytest.approx(expected, rel=1e-12)
    own = brute_force(data.train, data.train, data.tokenizer.vocab_size)
    assert bigram_loss(data.train, data.train) == pytest.approx(own, rel=1e-12)
    assert own < expected < math.log(data.tokenizer.vocab_size)


class Pairs:
    """A split of one row whose predictions are given."""

    def __init__(self, pairs, vocab_size):
        self.pairs, self.tokenizer = pairs, type("T", (), {"vocab_size": vocab_size})

    def __len__(self):
        return 1

    def rows(self, start, stop):
        import torch

        before, after = torch.tensor(self.pairs).T
        return type("B", (), {"tokens_BT": before[None], "targets_BT": after[None]})


def test_probabilities_of_every_context_sum_to_one():
    V = 7
    train = Pairs([(0, 1), (0, 1), (0, 2), (1, 2), (2, 0), (5, 5)], V)
    for context in range(V):
        total = sum(math.exp(-bigram_loss(train, Pairs([(context, token)], V))) for token in range(V))
        assert total == pytest.approx(1.0, abs=1e-12)
