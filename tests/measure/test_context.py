"""Use of context by made models whose use of it is known: a bigram, one that counts, one that copies."""

import math

import numpy as np
import pytest

from pellucid.config import UserError
from pellucid.measure.context import KINDS, NEAR, _kinds, measure_context, useful_tokens

V, T = 64, 128


def documents(count=12, length=700, seed=0):
    rng = np.random.default_rng(seed)
    return [np.concatenate([[2], rng.integers(4, V, length), [2]]) for _ in range(count)]


def measure(model, streams=None, **options):
    settings = {"context": T, "predictions": 200, "copies": 16, **options}
    return measure_context(model, documents() if streams is None else streams, V, **settings).numbers


def bigram(inputs, targets):
    """A loss that depends on the last token and the target only."""
    return 2.0 + ((inputs * 31 + targets * 17) % 7) / 7


def test_a_bigram_model_needs_one_token_of_context():
    found = measure(bigram)
    assert useful_tokens(found["amount"]) == 1
    assert all(row["to_full"]["mean"] == 0 for row in found["amount"])
    for kind in ("near only", "far shuffled", "far foreign"):
        assert found["kinds"][kind]["to_true"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["kinds"]["all shuffled"]["mean"] != found["kinds"]["true"]["mean"], "the last token is another one"
    assert found["drop"]["low"] < 0 < found["drop"]["high"]
    assert found["induction"]["gain"]["low"] < 0.1, "repeated tokens are nothing special to it"


def by_position(inputs, targets):
    """Loss 5 - log2(tokens known) / 2, whatever the tokens."""
    return np.broadcast_to(5 - 0.5 * np.log2(np.arange(1, inputs.shape[1] + 1)), inputs.shape)


def test_loss_by_position_amount_and_drop_of_a_model_that_counts():
    found = measure(by_position)
    for n, row in zip((1, 2, 4, 8, 16, 32, 64, 128), found["amount"], strict=True):
        assert row["tokens"] == n and row["mean"] == pytest.approx(5 - 0.5 * math.log2(n))
        assert row["to_full"]["mean"] == pytest.approx(0.5 * math.log2(T / n))
    curve = dict(zip(found["by_position"]["position"], found["by_position"]["mean"], strict=True))
    assert curve[1.0] == pytest.approx(5.0) and curve[2.0] == pytest.approx(4.5)
    assert useful_tokens(found["amount"]) == T
    assert found["kinds"]["near only"]["to_true"]["mean"] == pytest.approx(0.5 * math.log2(T / NEAR))
    assert found["kinds"]["all foreign"]["to_true"]["mean"] == pytest.approx(0, abs=1e-12)
    early, late = found["drop"]["early"], found["drop"]["late"]
    assert (early, late) == (32, 120)
    mean = lambda at: np.mean([5 - 0.5 * math.log2(p + 1) for p in range(at - 8, min(T, at + 8))])
    assert found["drop"]["mean"] == pytest.approx(mean(late) - mean(early))


def test_the_drop_is_from_the_fiftieth_to_the_five_hundredth_token_where_the_window_allows():
    found = measure(by_position, context=600)
    assert (found["drop"]["early"], found["drop"]["late"]) == (50, 500)
    assert found["drop"]["mean"] == pytest.approx(-0.5 * math.log2(500 / 50), abs=0.01)


@pytest.mark.parametrize("context", [16, 17, 24, 31, 32])
def test_the_early_and_the_late_band_of_a_short_window_share_no_position(context):
    found = measure(by_position, context=context)["drop"]
    early, late = (range(found[at] - found["band"], found[at] + found["band"]) for at in ("early", "late"))
    assert 0 <= early[0] and early[-1] < late[0] and late[-1] < context
    mean = lambda band: np.mean([5 - 0.5 * math.log2(p + 1) for p in band])
    assert found["mean"] == pytest.approx(mean(late) - mean(early))


@pytest.mark.parametrize(("model", "says"), [
    (by_position, "All of the window of 128 tokens is used: every smaller amount tried is clearly worse; with 1 token the loss is 3.5"),
    (bigram, "After 1 token of context more of it makes no difference")])  # fmt: skip
def test_it_says_how_much_of_the_window_is_used(model, says):
    outcome = measure_context(model, documents(), V, context=T, predictions=200, copies=16)
    assert outcome.findings[1].startswith(says)


def copier(inputs, targets):
    """Certain of a token that followed an earlier copy of the last one; else uniform."""
    losses = np.full(inputs.shape, math.log(V - 4))
    for row in range(len(inputs)):
        followers = {}
        for t, (token, target) in enumerate(zip(inputs[row], targets[row], strict=True)):
            if followers.get(token) == target:
                losses[row, t] = 0.0
            if t + 1 < inputs.shape[1]:
                followers[token] = inputs[row, t + 1]
    return losses


def test_a_model_that_copies_gains_nearly_all_on_repeated_random_tokens():
    found = measure(copier, context=32)
    gain = found["induction"]["gain"]
    assert 0.6 * math.log(V - 4) < gain["low"] <= gain["high"] <= math.log(V - 4)
    assert measure(by_position)["induction"]["random"] == pytest.approx(math.log(60))


def test_the_most_that_copying_can_gain_is_all_that_random_tokens_cost_a_trained_model_at_first():
    outcome = measure_context(lambda i, t: 3 * copier(i, t), documents(), V, context=32, predictions=20, copies=16)
    gain, first = (outcome.numbers["induction"][name]["mean"] for name in ("gain", "first"))
    assert math.log(V - 4) < gain <= first and outcome.findings[3].endswith(f" of at most {first:.2f}.")


def test_kinds_of_context_are_what_they_are_called():
    streams = [np.arange(1000 * g, 1000 * g + 400) for g in range(8)]  # a token says its document and place
    random = np.random.default_rng(0)
    owners = np.arange(40) % 8
    true = np.stack([streams[g][at : at + T] for g, at in zip(owners, random.integers(0, 200, 40), strict=True)])
    found = _kinds(true, owners, random)
    assert list(found) == list(KINDS)
    far, near = slice(0, T - NEAR), slice(T - NEAR, T)
    assert (found["near only"] == true[:, near]).all()
    for kind in ("far shuffled", "far foreign"):
        assert (found[kind][:, near] == true[:, near]).all(), "the last tokens stay"
    for kind, part in (("far shuffled", far), ("all shuffled", slice(None))):
        assert (np.sort(found[kind][:, part], 1) == np.sort(true[:, part], 1)).all(), "the same tokens"
        assert (found[kind] != true).any(1).all(), "in another order"
    for kind, part in (("far foreign", far), ("all foreign", slice(None))):
        source = found[kind][:, part] // 1000
        assert (source == source[:, :1]).all() and (source[:, 0] != owners).all(), "one other document"


@pytest.mark.parametrize(("context", "near"), [(16, 8), (31, 15), (32, 16), (100, 16)])
def test_it_says_how_many_tokens_stayed_in_place(context, near):
    outcome = measure_context(by_position, documents(), V, context=context, predictions=20, copies=2)
    assert f"foreign text before the last {near} tokens" in outcome.findings[2]
    assert outcome.settings["near"] == outcome.numbers["near"] == near
    assert outcome.numbers["kinds"]["near only"]["to_true"]["mean"] == pytest.approx(0.5 * math.log2(context / near)), "by its loss"


def test_too_short_documents_are_refused_with_their_number():
    with pytest.raises(UserError, match="0 of 3 documents have more than 128 tokens"):
        measure(bigram, [np.arange(100)] * 3)
