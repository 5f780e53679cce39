"""Each rule by hand: what it must find, and what only looks like it. The rules as a whole: tests/faults."""

import itertools
import pydoc_data.topics

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pellucid.observe.columns import INDEX
from pellucid.observe.history import Run
from pellucid.observe.rule import RULES
from pellucid.observe.rules import Watch, equal_pairs
from pellucid.observe.store import MISSING, Record, Row
from pellucid.observe.web.feed import never_judges, steps_to_judge

DOCUMENTS = "INSERT INTO document_loss"
WORKING = {"loss": 3.0, "applied": 1, "gradient_norm": 1.0, "clip_factor": 1.0, "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95}


def frame(stream, rows=1, **values):
    """A frame whose other statistics are missing."""
    made = np.full((rows, len(INDEX[stream])), MISSING, dtype=np.float32)
    for name, value in values.items():
        made[:, INDEX[stream][name]] = value
    return made


def names(watch, step, frames, documents=()):
    record = Record(step, frames)
    if documents:
        record.rows.append((DOCUMENTS, [(step, row, 1, tokens, loss, loss) for row, (tokens, loss) in enumerate(documents)]))
    return [event["rule"] for event in watch.judge(record)]


def losses_said(losses, tokens=4096):
    watch = Watch(Run(tokens_per_step=tokens))
    return [names(watch, step, {"run": frame("run", loss=loss, applied=1)}) for step, loss in enumerate(losses)]


def test_a_jump_of_the_loss_is_a_spike_also_while_the_loss_still_falls():
    """The fall from 6 to 3 must not count as spread: with it, a jump by one nat would pass."""
    rng = np.random.default_rng(0)
    falling = 3 + 3 * np.exp(-np.arange(90) / 25) + rng.normal(0, 0.08, 90)
    assert not any(losses_said(falling))
    assert "loss_spike" in losses_said([*falling, 4.1])[-1]


def test_the_noise_of_small_batches_is_no_spike():
    rng = np.random.default_rng(1)
    assert not any("loss_spike" in said for said in losses_said(3 + rng.normal(0, 0.25, 2000)))


def test_a_jump_that_one_hard_row_makes_is_no_spike_in_a_batch_of_few_tokens_and_is_one_among_many():
    rng = np.random.default_rng(2)
    usual = 3.3 + rng.normal(0, 0.05, 60)
    assert losses_said([*usual, 3.8], tokens=8 * 64)[-1] == []
    assert losses_said([*usual, 3.8], tokens=8 * 1024)[-1] == losses_said([*usual, 4.6], tokens=8 * 64)[-1] == ["loss_spike"]


def test_a_smaller_rise_that_stays_is_told_as_well():
    rng = np.random.default_rng(4)
    usual = 3.3 + rng.normal(0, 0.05, 60)
    once, stays = losses_said([*usual, 4.2, *usual[:5]], tokens=512), losses_said([*usual, 4.2, 4.15, 4.2, 4.1], tokens=512)
    assert not any(once)
    assert stays[-2] == ["loss_spike"] and not any(stays[:-2]), "the mean of four that holds three of them"


def context_said(losses, entropy=3.0):
    watch, events = Watch(Run(tokens_per_step=512)), []
    for step, loss in enumerate(losses):
        events += watch.judge(Record(step, {"run": frame("run", loss=loss, applied=1)}), unigram_entropy=entropy)
    return [event["rule"] for event in events]


def test_a_loss_that_stands_at_the_entropy_of_words_is_told_and_one_that_passes_by_or_is_far_above_is_not():
    rng = np.random.default_rng(3)
    steps, noise = np.arange(230), rng.normal(0, 0.05, 230)
    stands = 3.0 + 2.5 * np.exp(-steps / 25) + noise
    passes = 5.5 * np.exp(-steps / 330) + noise  # 3.0 at step 200, 0.4 lower than 40 steps before
    slow = 4.2 + 1.3 * np.exp(-steps / 60) + noise
    assert "context_unused" in context_said(stands)
    assert "context_unused" not in context_said(stands[:200]), "a healthy model may know no more until then"
    assert context_said(passes) == context_said(slow) == []
    assert "context_unused" not in context_said(stands, entropy=3.5), "it knows more than words"


def test_equal_pairs_are_counted_and_their_number_by_chance_is_the_mean_over_all_ways_to_shuffle():
    inputs, targets = np.array([3, 3, 1, 3, 1, 2]), np.array([7, 7, 7, 9, 9, -100])
    twos = list(itertools.combinations(range(5), 2))
    found = lambda order: sum(inputs[i] == inputs[j] and order[i] == order[j] for i, j in twos)
    every = [found(order) for order in itertools.permutations(targets[:5])]
    assert equal_pairs(inputs, targets) == (found(targets), pytest.approx(np.mean(every)), min(4, 4))
    assert equal_pairs(np.array([]), np.array([])) == (0, 0, 0)


def pairs_said(shuffle, loss=3.2, entropy=3.1, steps=40):
    """Python's topics in bytes; `shuffle(rng, targets)` from step 20 on."""
    text = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8).astype(np.int32)
    watch, rng, said = Watch(Run(tokens_per_step=512)), np.random.default_rng(5), []
    for step in range(steps):
        at = rng.integers(0, len(text) - 1, 512)
        inputs, targets = text[at], text[at + 1]
        facts = {"pairs": np.stack([inputs, shuffle(rng, targets) if step >= 20 else targets]), "unigram_entropy": entropy}
        events = watch.judge(Record(step, {"run": frame("run", loss=loss, applied=1)}), **facts)
        said += [(step, event["rule"]) for event in events]
    return said


def test_targets_that_follow_from_nothing_are_told_within_8_steps_and_real_text_is_not():
    ((step, rule),) = pairs_said(lambda rng, targets: rng.permutation(targets))
    assert rule == "unrelated_targets" and 20 < step <= 28
    assert pairs_said(lambda rng, targets: targets) == []
    assert pairs_said(lambda rng, targets: rng.permutation(targets), loss=2.5) == [], "something is learnt all the same"
    assert pairs_said(lambda rng, targets: np.arange(512)) == [], "no two targets alike: nothing can be told"


def test_a_source_that_is_nearly_one_token_is_not_called_unrelated():
    """Where a token makes up nine tenths, equal places are so many that no pairing has 1.25 times those of chance."""
    rng, watch, said = np.random.default_rng(0), Watch(Run(tokens_per_step=512)), []
    for step in range(40):
        text = np.where(rng.random(513) < 0.93, 7, rng.integers(8, 60, 513)).astype(np.int32)
        facts = {"pairs": np.stack([text[:-1], text[1:]]), "unigram_entropy": 0.5}
        said += watch.judge(Record(step, {"run": frame("run", loss=0.5, applied=1)}), **facts)
    assert said == []


def repeats_said(rows_of_step, rows_per_epoch, steps):
    watch = Watch(Run(rows_per_epoch=rows_per_epoch))
    records = (watch.judge(Record(step, {"run": frame("run", loss=3.0, applied=1)}), row_hashes=rows_of_step(step))
               for step in range(steps))  # fmt: skip
    return [event["rule"] for events in records for event in events]


def test_rows_that_come_again_are_told_and_those_of_the_next_epoch_are_not():
    rng = np.random.default_rng(1)
    order = np.concatenate([rng.permutation(400) for _ in range(4)])
    assert repeats_said(lambda step: order[4 * step : 4 * step + 4].tolist(), 400, 400) == []
    assert repeats_said(lambda step: [1, 2, 3, 4], 400, 30) == ["repeated_data"]
    doubled = rng.permutation(np.tile(np.arange(200), 2))
    for rows in (doubled, np.concatenate([order[:800], doubled])):  # in the first epoch; in the third
        assert "repeated_data" in repeats_said(lambda step, rows=rows: rows[4 * step : 4 * step + 4].tolist(), 400, len(rows) // 4)


def documents_said(series, vocab_size=260):
    """series: for each step, its loss and its documents (tokens, loss)."""
    watch = Watch(Run(vocab_size=vocab_size, tokens_per_step=512))
    return [names(watch, step, {"run": frame("run", loss=loss)}, documents) for step, (loss, documents) in enumerate(series)]


def test_a_document_worse_than_guessing_is_told_and_a_hard_or_short_one_is_not():
    usual = [(3.0, [(64, 3.2 + 0.1 * (n % 4)), (9, 5.0)]) for n in range(30)]
    assert not any(documents_said(usual))
    assert "bad_document" in documents_said([*usual, (3.2, [(64, 5.8)])])[-1]
    assert documents_said([*usual, (3.2, [(64, 4.6)])])[-1] == [], "hard, not hopeless"
    harder = [*usual, (3.0, [(64, 4.1)])]
    assert documents_said([*harder, (3.2, [(64, 5.58)])])[-1] == [], "as hard as guessing (ln 260 is 5.56): real text has that"
    assert documents_said([*harder, (3.2, [(64, 5.7)])])[-1] == ["bad_document"]
    once = [*usual, (3.0, [(64, 4.9)])]  # an excess of 15.2; noise beside it has 20
    assert not any(documents_said(once))
    assert documents_said([*once, (3.2, [(64, 5.7)])])[-1] == ["bad_document"]
    assert documents_said([*usual, (3.2, [(9, 5.9)])])[-1] == [], "nine tokens prove little"
    assert "bad_document" in documents_said([*usual, (3.2, [(64, 6.2)])], vocab_size=100_000)[-1], "guessing would be 11.5"
    assert documents_said([*usual, (6.0, [(64, 6.5)])])[-1] == ["loss_spike"], "where all are bad, it is not the document"


def impossible(sizes, betas=(0.9, 0.95)):
    watch = Watch(Run(param_rows=[Row("a"), Row("all")]))
    run = frame("run", beta1=betas[0], beta2=betas[1], loss=3, applied=1)
    return "impossible_step" in names(watch, 0, {"run": run, "param": frame("param", 2, adam_rms=sizes)})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.8, 0.9)]))
def test_no_gradients_whatever_make_adams_step_impossible(gradients, betas):
    """torch's own Adam gives the moments."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=betas, eps=1e-30)
    for gradient in gradients:
        before, weight.grad = weight.item(), torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert not impossible(abs(weight.item() - before), betas)


def test_a_second_moment_far_too_small_makes_an_impossible_step_of_one_tensor():
    assert impossible([1.4, 0.3]) and not impossible([1.1, 0.3]) and not impossible(MISSING)
    assert not impossible([5.0, 5.0], (0.9, 0.999)) and impossible([8.0, 8.0], (0.9, 0.999))


def evaluations_said(rows):
    """rows: held-out loss, gap, tokens."""
    watch = Watch(Run())
    frames = [frame("evaluation", loss=loss, gap=gap, tokens=tokens) for loss, gap, tokens in rows]
    return [names(watch, 20 * n, {"evaluation": made}) for n, made in enumerate(frames)]


def test_overfitting_is_a_held_out_loss_that_rises_or_stands_while_the_training_loss_falls():
    rising = [(3.0, 0.1, 512), (2.5, 0.2, 512), (2.45, 0.3, 512), (2.5, 0.5, 512), (2.55, 0.7, 512)]
    assert evaluations_said(rising) == [[], [], [], [], ["overfitting"]]
    standing = [(2.2, 0.3, 512), (2.21, 0.5, 512), (2.2, 0.7, 512), (2.21, 0.9, 512), (2.2, 1.1, 512)]
    assert evaluations_said(standing) == [[], [], [], [], ["overfitting"]]
    converged = [(2.2, 0.1, 512)] * 8
    assert not any(evaluations_said(converged))


def test_the_last_evaluation_on_all_rows_is_not_compared_with_those_on_a_few():
    assert not any(evaluations_said([(3.0, 0.1, 512), (2.5, 0.1, 512), (2.4, 0.1, 512), (2.7, 0.4, 9000)]))


@pytest.mark.parametrize("lately, said", [(3.6, True), (2.6, False)])
def test_an_expert_that_is_losing_its_excess_of_tokens_is_left_to_the_balance_loss(lately, said):
    watch, found = Watch(Run(param_rows=[Row("all")])), []
    for step in range(120):
        load = np.array([3.6 if step < 75 else lately, *[(8 - 3.6) / 7] * 7])
        found += names(watch, step, {"router": frame("router", 8, load=load, idle_steps=0)})
    assert ("overloaded_expert" in found) is said


def routers_said(used, experts=8):
    """used: share of experts effectively in use, for each step. Steps at which a collapse was told."""
    watch, found = Watch(Run(experts=experts)), []
    for step, share in enumerate(used):
        found += [step] * ("router_collapse" in names(watch, step, {"layer": frame("layer", load_entropy=share)}))
    return found


def test_a_router_that_begins_uneven_may_settle_and_a_collapse_is_told_from_the_start_or_later():
    settling = [*np.linspace(0.7, 0.38, 40), *np.linspace(0.38, 0.6, 50), *[0.6] * 60]
    assert routers_said(settling) == []
    assert routers_said([0.25] * 60) == [19], "two of eight experts: all that a token takes, and no other"
    assert 45 < routers_said([0.8] * 45 + [0.25] * 50)[0] <= 65
    assert routers_said([0.8] * 120 + [0.4] * 50) != [] == routers_said([0.8] * 40 + [0.4] * 40 + [0.8] * 70)
    slower = [*np.linspace(0.7, 0.38, 90), *np.linspace(0.38, 0.6, 60)]
    assert routers_said(slower) == [], "at step 100 it stands below the limit, and recovers"
    assert routers_said([*slower[:100], *[slower[99]] * 50])[0] <= 120, "it does not go on recovering"
    assert routers_said([0.62] * 150, experts=4) == [] and routers_said([0.5] * 60, experts=4) == [19]


def test_one_long_wait_is_no_starvation():
    def said(seconds):
        watch = Watch(Run())
        return [rule for step, data in enumerate(seconds)
                for rule in names(watch, step, {"run": frame("run", loss=3, data_seconds=data, step_seconds=data + 0.1)})]  # fmt: skip

    assert "data_starvation" not in said([0.001] * 15 + [9.0] + [0.001] * 10)
    assert "data_starvation" in said([0.001] * 15 + [0.1] * 20)


@pytest.mark.parametrize(("name", "stream", "values"), [
    ("gradient_vanishing", "run", {"gradient_norm": 1e-9}),
    ("clipping_always", "run", {"clip_factor": 0.01}),
    ("data_starvation", "run", {"data_seconds": 1.0, "step_seconds": 1.0}),
    ("router_collapse", "layer", {"load_entropy": 0.25}),
    ("learning_rate_high", "param", {"update_ratio": 0.5}),
    ("learning_rate_low", "param", {"update_ratio": 1e-9}),
    ("frozen_tensor", "param", {"gradient_norm": 1.0, "update_norm": [0.0, 1.0]}),
    ("stale_moments", "param", {"staleness": 9.0}),
    ("impossible_step", "param", {"adam_rms": 99.0}),
    ("swallowed_updates", "param", {"unmoved": 0.9}),
])  # fmt: skip
def test_a_rule_speaks_after_the_steps_that_it_says_it_takes(name, stream, values):
    """Those of parameters see a frame in eight, in the worst case the eighth."""
    (rule,) = [rule for rule in RULES if rule.name == name]
    watch, said = Watch(Run(param_rows=[Row("a"), Row("all")])), []
    for step in range(rule.steps + 8):
        frames = {"run": frame("run", **WORKING | (values if stream == "run" else {}))}
        if stream == "layer" or (stream == "param" and step % 8 == 7):
            frames[stream] = frame(stream, 2 if stream == "param" else 1, **values)
        said.append(name in names(watch, step, frames))
    first = said.index(True) + 1
    assert first == rule.steps if stream != "param" else rule.steps - 8 < first <= rule.steps


def test_overfitting_takes_three_evaluations_and_a_low_rate_the_warmup():
    config = {"schedule": {"warmup_steps": 50}, "training": {"evaluate_every": 200}}
    steps = {rule.name: steps_to_judge(rule, config, looks=True) for rule in RULES}
    without = {rule.name: never_judges(rule, config, looks=False) for rule in RULES}
    assert without.pop("overfitting") == "this run holds no text out" and not any(without.values())
    assert steps["overfitting"] == 400 and steps["learning_rate_low"] == 50 + 29 and steps["non_finite"] == 1


def test_a_document_after_documents_without_any_excess():
    assert "bad_document" in documents_said([*[(3.0, [(64, 3.0)])] * 30, (3.2, [(64, 6.0)])])[-1]
