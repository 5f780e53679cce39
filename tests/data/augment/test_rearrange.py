"""Fill-in-the-middle, span masking, token masking: nothing is lost, and the shares are as set."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.data.augment.outcome import words
from pellucid.data.augment.rearrange import fill_in_the_middle, span_masking
from pellucid.data.augment.token_masking import mask_tokens

PRE, SUF, MID = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


def stream(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def unfill(text: str) -> str:
    prefix, rest = text.removeprefix(PRE).split(SUF)
    suffix, middle = rest.split(MID)
    return middle + suffix if text.startswith(PRE + SUF) and not prefix else prefix + middle + suffix


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=80), seed=st.integers(0, 2**32), spm=st.sampled_from([0.0, 1.0]))
def test_fill_in_the_middle_only_rearranges(text, seed, spm):
    outcome = fill_in_the_middle(text, stream(seed), 1.0, spm)
    assert outcome.changed and outcome.text.startswith(PRE + SUF) >= bool(spm)
    assert unfill(outcome.text) == text
    assert fill_in_the_middle(text, stream(seed), 0.0, spm).text == text


def test_fill_in_the_middle_touches_its_share_and_cuts_everywhere():
    text = "0123456789"
    made = [fill_in_the_middle(text, stream(seed), 0.5, 0.5) for seed in range(4000)]
    share = sum(o.changed for o in made) / 4000
    assert abs(share - 0.5) < 4 * (0.25 / 4000) ** 0.5
    spm = sum(o.text.startswith(PRE + SUF) for o in made if o.changed) / sum(o.changed for o in made)
    assert abs(spm - 0.55) < 0.05  # half, and PSM with an empty prefix (1/11 or so of the others) looks the same
    psm = [fill_in_the_middle(text, stream(seed), 1.0, 0.0).text for seed in range(500)]
    assert {len(t.split(SUF)[0]) - len(PRE) for t in psm} == set(range(11))


@pytest.mark.parametrize("text", [f"a {PRE} b", f"{MID}", "x <|mask_0|> y"])
def test_a_text_that_holds_a_sentinel_is_left_alone_and_counted(text):
    augment = span_masking if "mask_" in text else fill_in_the_middle
    outcome = augment(text, stream(), 0.9)
    assert outcome.text == text and outcome.rejected == {"holds a sentinel": 1}


def unmask(text: str, spans: int) -> str:
    for number in reversed(range(spans)):
        mark = f"<|mask_{number}|>"
        text, span = text.rsplit(mark, 1)
        text = text.replace(mark, span)
    return text


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab é,.\n'", max_size=120), seed=st.integers(0, 2**32), rate=st.floats(0, 0.9))
def test_span_masking_moves_words_and_loses_none(text, seed, rate):
    outcome = span_masking(text, stream(seed), rate)
    assert unmask(outcome.text, outcome.changed) == text
    assert rate or outcome.text == text


@pytest.mark.parametrize("rate, mean", [(0.15, 3.0), (0.3, 5.0), (0.5, 3.0)])
def test_span_masking_hides_its_share_in_spans_of_the_mean_length(rate, mean):
    text = " ".join(["word"] * 40000)
    outcome = span_masking(text, stream(7), rate, mean)
    tail = outcome.text[outcome.text.rindex("<|mask_0|>") :]
    hidden = [len(words(part)) for part in re.split(r"<\|mask_\d+\|>", tail)[1:]]
    assert len(hidden) == outcome.changed
    assert sum(hidden) / 40000 == pytest.approx(rate, rel=0.06)  # 4000+ spans: 1.5 % standard error and less
    assert np.mean(hidden) == pytest.approx(mean, rel=0.06)


def test_token_masking_keeps_shape_padding_and_document_starts_and_its_rate():
    B, T, eos = 8, 4096, 2
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 500, (B, T))
    tokens[:, ::64] = eos
    segments = np.ones((B, T), dtype=np.int32)
    tokens[:, -100:], segments[:, -100:] = 0, 0
    samples = np.arange(B)
    before = tokens.copy()
    options = dict(rate=0.1, seed=5, eos_token_id=eos)
    noised = mask_tokens(tokens, segments, samples, **options)
    assert (tokens == before).all() and (noised[segments == 0] == 0).all() and (noised[before == eos] == eos).all()
    free = (segments > 0) & (before != eos)
    share = (noised != before)[free].mean()
    assert abs(share - 0.1 * (1 - 1 / 64)) < 0.01  # one source in 64 is an eos, which leaves the token
    for row in range(B):  # a row's result depends on its number, not on its place in the batch
        alone = mask_tokens(tokens[row : row + 1], segments[row : row + 1], samples[row : row + 1], **options)
        assert (alone[0] == noised[row]).all()
    assert (mask_tokens(tokens, segments, samples + B, **options) != noised).any()
    assert (mask_tokens(tokens, segments, samples, **options | {"rate": 0.0}) == before).all()
