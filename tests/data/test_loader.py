"""The loader: any ranks and prefetch give the same batches, a small state goes on exactly, shares change without loss."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.config import DataConfig, UserError
from pellucid.data.build import prepare
from pellucid.data.loader import Loader
from pellucid.data.order import CYCLE, make_mixture, mixed_rows
from pellucid.observe.trace import trace
from pellucid.run import train


def configure(folder, rows=(60, 20, 9), **settings) -> DataConfig:
    sources = []
    for name, count in zip("abc", rows, strict=True):
        lines = (json.dumps({"text": f"{name} {n:04} " + "x" * 8}) + "\n" for n in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
        sources.append(str(folder / f"{name}.jsonl"))
    return DataConfig(sources=sources, directory=str(folder / "data"), sequence_length=16, validation_fraction=0,
                      tokenizer={"kind": "bytes"}, **settings)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return prepare(configure(tmp_path_factory.mktemp("loader"))).split("train", seed=3)


def take(loader: Loader, count: int) -> list[torch.Tensor]:
    return [next(loader).tokens_BT for _ in range(count)]


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_prefetch_give_the_same_global_batches(split, ranks, prefetch):
    expected = [split.batch(step, 12).tokens_BT for step in range(5)]
    parts = []
    for rank in range(ranks):
        with Loader(split, 12, rank=rank, world_size=ranks, prefetch=prefetch) as loader:
            parts.append(take(loader, 5))
    for step in range(5):
        assert torch.cat([part[step] for part in parts]).equal(expected[step])


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_state_goes_on_exactly_with_other_ranks(split, before, after):
    with Loader(split, 12, rank=before - 1, world_size=before) as loader:
        take(loader, 7)
        state = json.loads(json.dumps(loader.state()))
    assert len(json.dumps(state)) < 1000
    parts = []
    for rank in range(after):
        with Loader(split, 12, rank=rank, world_size=after) as loader:
            loader.restore(state)
            parts.append(next(loader).tokens_BT)
    assert torch.cat(parts).equal(split.batch(7, 12).tokens_BT)


def test_restoring_ends_what_was_made_ahead(split):
    with Loader(split, 4, prefetch=3) as loader:
        state = loader.state()
        first = take(loader, 6)
        loader.restore(state)
        assert all(a.equal(b) for a, b in zip(take(loader, 6), first, strict=True))
    assert not [t for t in threading.enumerate() if "_work" in t.name]


def test_steps_may_be_asked_for_in_any_order(split):
    with Loader(split, 4) as loader:
        for step in (0, 1, 2, 9, 10, 3, 3):
            assert loader.batch(step).tokens_BT.equal(split.batch(step, 4).tokens_BT)


def test_a_state_of_other_data_seed_or_past_shares_is_refused(split, tmp_path):
    state = Loader(split, 4).state()
    with pytest.raises(UserError, match="the data differ"):
        Loader(prepare(configure(tmp_path, rows=(60, 20, 8))).split("train", 3), 4).restore(state)
    with pytest.raises(UserError, match="seed is 0, the run's is 3"):
        Loader(type(split)((split.reader, split.plan, None), _Parts(split), "train", 0), 4).restore(state)
    with pytest.raises(UserError, match="not a multiple of the 3 processes"):
        Loader(split, 4, world_size=3)


class _Parts:
    """What a Split takes from its dataset."""

    def __init__(self, split):
        self.__dict__ |= {"tokenizer": split.tokenizer, "fingerprint": split.fingerprint, "mixture": []}
        self.config = DataConfig(sources=["a", "b", "c"])


def test_a_fault_while_loading_ahead_reaches_the_one_who_waits(split, monkeypatch):
    with Loader(split, 4) as loader:
        monkeypatch.setattr(type(split), "samples", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(loader, 3)


def test_the_step_does_not_wait_for_batches_made_ahead(split, monkeypatch):
    samples = type(split).samples

    def slow(*arguments):
        time.sleep(0.02)
        return samples(*arguments)

    monkeypatch.setattr(type(split), "samples", slow)
    with Loader(split, 4) as loader:
        next(loader)
        waited = 0.0
        for _ in range(8):
            time.sleep(0.05)  # the step
            began = time.perf_counter()
            next(loader)
            waited += time.perf_counter() - began
    assert waited < 0.08  # without a thread it would be 0.16


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_changing_shares_neither_loses_nor_repeats_a_row(data):
    """Independent of the code: every source must go through all its rows before it gives any row again."""
    rows = np.array(data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)))
    count = data.draw(st.integers(1, 4))
    starts = [0, *sorted(data.draw(st.lists(st.integers(1, 9000), min_size=count - 1, max_size=count - 1, unique=True)))]
    share = st.lists(st.floats(0, 10), min_size=len(rows), max_size=len(rows)).filter(lambda s: sum(s) > 1e-3)
    segments = [(start, data.draw(share)) for start in starts]
    mixture = make_mixture(segments, seed=5)
    found = mixed_rows(np.arange(12_000), rows, mixture, seed=5)
    ends = np.cumsum(rows)
    for source, (first, last) in enumerate(zip(ends - rows, ends, strict=True)):
        mine = found[(found >= first) & (found < last)]
        for start in range(0, len(mine), rows[source]):
            passed = mine[start : start + rows[source]]
            assert len(set(passed.tolist())) == len(passed)
    where = np.searchsorted(ends, found, side="right")
    for (start, shares), stop in zip(segments, [*starts[1:], 12_000], strict=True):
        cycles = (stop - start) // CYCLE * CYCLE
        given_ = np.bincount(where[start : start + cycles], minlength=len(rows)) / max(1, cycles)
        assert np.abs(given_ - np.array(shares) / sum(shares)).max() <= 4 / CYCLE or not cycles
        assert not set(np.flatnonzero(np.array(shares) == 0)) & set(where[start:stop].tolist())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_budget_of_rows_is_given_to_the_last_and_never_exceeded(data):
    """Independent of the code: counts of rows, against budgets, shares and what the same schedule gives without budgets."""
    rows = np.array(data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)))
    budgets = [data.draw(st.one_of(st.none(), st.integers(1, 6000))) for _ in rows]
    second = data.draw(st.integers(1, 9000))
    share = st.lists(st.floats(0.01, 10), min_size=len(rows), max_size=len(rows))
    segments = [(0, data.draw(share)), (second, data.draw(share))]
    mixture = make_mixture(segments, 5, budgets)
    assert (mixture.stop is None) == (None in budgets) and mixture.stop in (None, sum(b or 0 for b in budgets))
    found = mixed_rows(np.arange(mixture.stop or 30_000), rows, mixture, seed=5)
    ends = np.cumsum(rows)
    where = np.searchsorted(ends, found, side="right")
    for source, (budget, first, last) in enumerate(zip(budgets, ends - rows, ends, strict=True)):
        mine = found[where == source]
        assert budget is None or len(mine) == budget or (len(mine) < budget and mixture.stop is None)
        for start in range(0, len(mine), rows[source]):
            passed = mine[start : start + rows[source]]
            assert len(set(passed.tolist())) == len(passed) and passed.min() >= first and passed.max() < last
    free = mixed_rows(np.arange(len(found)), rows, make_mixture(segments, 5), seed=5)
    used_up = [int(np.flatnonzero(where == n)[-1]) for n, b in enumerate(budgets) if b is not None and (where == n).sum() == b]
    same = min([len(found), *(last + 1 for last in used_up)])
    assert (found[:same] == free[:same]).all()  # until the first is used up


def test_epochs_of_a_source_end_and_the_run_is_told_how_far_it_reaches(tmp_path):
    config = configure(tmp_path, rows=(60, 20, 9))
    free = prepare(config)
    config.sources[1].epochs, config.sources[1].weight = 2.5, 6.0
    capped = prepare(config)
    assert capped.reused and capped.fingerprint != free.fingerprint  # nothing is built again
    split, other = capped.split("train", 1), free.split("train", 1)
    sources = split.samples(0, 600 + CYCLE).source_ids_B.numpy()
    after = int(np.flatnonzero(sources == 1)[-1]) + 1
    assert (sources == 1).sum() == 50 and after < 600 and split.steps_in_all(4) is None
    counts = np.bincount(sources[after : after + CYCLE], minlength=3)
    assert abs(counts[2] - CYCLE * 9 / 69) <= 1 and counts.sum() == CYCLE  # the others keep their proportion
    seen = np.bincount(split.samples(0, 600).sample_ids_B)[60:80]
    assert sorted(seen) == [2] * 10 + [3] * 10
    for source in config.sources:
        source.epochs = 2
    split = prepare(config).split("train", 1)
    assert np.bincount(split.samples(0, 178).sample_ids_B).tolist() == [2] * 89
    assert split.steps_in_all(10) == 17
    with pytest.raises(UserError, match="their epochs give 178 rows"):
        split.samples(170, 179)
    with Loader(other, 4) as loader:
        state = loader.state()
    with pytest.raises(UserError, match="the data differ"):
        Loader(split, 4).restore(state)


def test_epochs_under_a_mixture_leave_their_places_to_the_others(tmp_path):
    config = configure(tmp_path, mixture=[{"from_step": 0, "shares": [1, 1, 0]}, {"from_step": 30, "shares": [0, 1, 1]}])
    config.sources[1].epochs = 3
    split = prepare(config).split("train", 1)
    sources = split.samples(0, 600, 10).source_ids_B.numpy()
    last = np.flatnonzero(sources == 1)[-1]
    assert (sources == 1).sum() == 60 and last < 300 and set(sources[last + 1 : 300]) == {0} and set(sources[300:]) == {2}


def test_the_past_does_not_change_when_a_segment_is_added(tmp_path):
    one = {"from_step": 0, "shares": [1, 1, 0]}
    config = configure(tmp_path, mixture=[one])
    before = prepare(config)
    config.mixture = [*config.mixture, type(config.mixture[0])(from_step=30, shares=[0, 0, 1])]
    after = prepare(config)
    assert after.reused and after.directory == before.directory and after.fingerprint == before.fingerprint
    old, new = before.split("train", 1), after.split("train", 1)
    assert new.samples(0, 300, 10).tokens_BT.equal(old.samples(0, 300, 10).tokens_BT)
    assert set(new.batch(30, 10).source_ids_B.tolist()) == {2}
    assert set(old.batch(30, 10).source_ids_B.tolist()) == {0, 1}
    with Loader(old, 10) as loader:
        take(loader, 25)
        state = loader.state()
    Loader(new, 10).restore(state)
    with Loader(new, 10) as loader:
        loader.next_sample = 310
        state = loader.state()
    with pytest.raises(UserError, match="mixture differs for steps already done"):
        Loader(old, 10).restore(state)
    pieces = new.trace(31, 10)
    assert {piece["source_index"] for piece in pieces} == {2}


def test_shares_that_cannot_be_are_sentences(tmp_path):
    config = configure(tmp_path, rows=(60, 20, 0), on_error="skip", mixture=[{"from_step": 0, "shares": [1, 1, 1]}])
    with pytest.raises(UserError, match="source 2 has a share but no rows"):
        prepare(config)
    for mixture in ([{"from_step": 1, "shares": [1, 1, 1]}], [{"shares": [1]}], [{"shares": [0, 0, 0]}],
                    [{"shares": [1, 1, 1]}, {"shares": [1, 1, 2]}]):
        with pytest.raises(ValueError):
            configure(tmp_path, mixture=mixture)


def test_which_steps_saw_a_document(split):
    for document in (0, 17, 88):
        rows = split.rows_of_document(document)
        steps = split.steps_with(rows, 40, 8)
        assert steps == [step for step in range(40) if any(p["document"] == document for p in split.trace(step, 8))]


def test_a_run_resumes_with_other_shares_to_come_and_refuses_other_shares_past(tmp_path, tiny_tables):
    for name in "ab":
        lines = [json.dumps({"text": f"{name} {n} " + "some words " * (n % 5)}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tables = tiny_tables(max_steps=3)
    tables["data"] |= {"sources": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], "directory": str(tmp_path / "data"),
                       "mixture": [{"from_step": 0, "shares": [1, 0]}]}
    train(tables, run_dir=tmp_path / "run")
    assert not [t for t in threading.enumerate() if "_work" in t.name], "the loader's thread has ended with the run"
    tables["training"]["max_steps"] = 5
    past = {**tables, "data": tables["data"] | {"mixture": [{"from_step": 0, "shares": [1, 1]}]}}
    with pytest.raises(UserError, match=r"data.mixture differs for steps already done; change only what comes after step 3"):
        train(past, run_dir=tmp_path / "run", resume=True)
    tables["data"]["mixture"].append({"from_step": 3, "shares": [0, 1]})
    train(tables, run_dir=tmp_path / "run", resume=True)
    for step in range(5):
        sources = {document.source.rpartition("/")[2] for document in trace(tmp_path / "run", step).documents}
        assert sources == {"a.jsonl" if step < 3 else "b.jsonl"}
