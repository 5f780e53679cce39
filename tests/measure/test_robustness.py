"""Robustness: verdicts on results whose truth is known, both yes and no; and texts that are what they are called."""

import json

import numpy as np
import pytest

from pellucid.config import UserError, make_config
from pellucid.data.build import prepare
from pellucid.measure.plan import Job, Plan
from pellucid.measure.robustness import robustness_jobs, robustness_outcome

FACTS = {"unavailable": {}, "vendi": {}, "unique_tokens": {1000: 1000}}
SEEDS, DOCUMENTS, TOKENS = 3, 40, 100.0


def made(shifts, noise=0.02, seed=0):
    """(jobs, results): held-out nats per document of each arm, its mean loss moved by shifts[arm]."""
    random = np.random.default_rng(seed)
    hard = random.normal(3.0, 0.5, DOCUMENTS)  # documents differ much more than arms do: only pairing shows the difference
    jobs, results = [], {}
    for arm, shift in {"off": 0.0, **shifts}.items():
        for s in range(SEEDS):
            job = Job(f"{arm}-{s}", "", {"about": {"arm": arm, "amount": 1000, "seed": s}})
            loss = hard + shift + random.normal(0, noise, DOCUMENTS)
            jobs.append(job)
            results[job.name] = {"documents": {"nats": (loss * TOKENS).tolist(), "tokens": [TOKENS] * DOCUMENTS}, "tokens": 5000,
                                 "train": 2.0, "curve": [{"step": 5, "train": 2.5, "held_out": 3.1},
                                                         {"step": 10, "train": 2.0, "held_out": 3.0}]}  # fmt: skip
    return jobs, results


def verdicts(*arguments, **options):
    outcome = robustness_outcome(*made(*arguments, **options), FACTS)
    return {row["arm"]: row["verdict"] for row in outcome.numbers["augmentation"]}, outcome


def test_it_says_helps_harms_and_nothing_shown():
    found, outcome = verdicts({"synonyms": -0.05, "back-translation": 0.05, "bpe-dropout": 0.0})
    assert found == {"synonyms": "helps", "back-translation": "harms", "bpe-dropout": "no difference shown"}
    row = outcome.numbers["augmentation"][0]
    assert row["low"] < -0.05 < row["high"] and row["high"] - row["low"] < 0.05, "0.4 if documents were not paired"


def test_a_difference_of_zero_is_rarely_called_one():
    wrong = sum(verdicts({"synonyms": 0.0}, noise=0.3, seed=seed)[0]["synonyms"] != "no difference shown" for seed in range(40))
    assert wrong <= 6, "at 5 % more than six of forty happen once in 200 times"


def test_gap_is_held_out_minus_training_loss():
    _, outcome = verdicts({})
    (gap,) = outcome.numbers["gaps"]
    assert gap["gap"]["mean"] == pytest.approx(gap["held_out"]["mean"] - 2.0) and gap["epochs"] == 5.0
    assert [point["epochs"] for point in gap["curve"]] == [2.5, 5.0]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_curves_are_joined_by_step(seed):
    """Where the record of a run that an earlier version resumed lacks the points before the stop."""
    jobs, results = made({})
    _, whole = verdicts({})
    del results[f"off-{seed}"]["curve"][0]
    outcome = robustness_outcome(jobs, results, FACTS)
    assert outcome.numbers["gaps"][0]["curve"] == whole.numbers["gaps"][0]["curve"][1:]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Half the documents of one kind of words, half of twelve other kinds."""
    folder, random = tmp_path_factory.mktemp("topics"), np.random.default_rng(0)
    rows = []
    for number in range(240):
        topic = 0 if number < 120 else 1 + number % 12
        words = [f"t{topic}w{random.integers(30)}" for _ in range(20)]
        rows.append(json.dumps({"text": " ".join(words), "topic": topic}))
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    base = make_config({
        "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_experts": 2},
        "data": {"sources": [str(folder / "corpus.jsonl")], "sequence_length": 32, "validation_fraction": 0.3,
                 "tokenizer": {"vocab_size": 300}, "directory": str(folder / "data")},
        "training": {"batch_size": 4, "precision": "fp32"}})  # fmt: skip
    return base, prepare(base.data)


def topics(folder, name):
    texts = [json.loads(line)["text"] for line in (folder / "texts" / f"{name}.jsonl").read_text().splitlines()]
    return [text.split("w")[0] for text in texts], texts


def test_texts_are_what_they_are_called_and_the_plan_runs(corpus, tmp_path):
    base, dataset = corpus
    jobs, facts = robustness_jobs(base, dataset, tmp_path, amounts=[1500, 4000], tokens=640, arms=["bpe-dropout"], seeds=2, versions=2)
    names = [job.name for job in jobs]
    assert len(names) == len(set(names)) == 2 * 2 * 2 + 2 * 2
    small, large, held_out = (set(topics(tmp_path, name)[1]) for name in ("train-1500", "train-4000", "held-out"))
    assert small < large and not large & held_out, "more text is the same and more; what is held out is in none"
    for seed in (0, 1):
        narrow, varied = (topics(tmp_path, f"{kind}-1500-{seed}")[0] for kind in ("narrow", "varied"))
        assert max(map(narrow.count, narrow)) > max(map(varied.count, varied)), "one kind of words prevails"
        score = lambda kind, seed=seed: facts["vendi"][f"{kind}-{seed}"]
        assert score("narrow")["score"] / score("narrow")["documents"] < score("varied")["score"] / score("varied")["documents"]
    outcome = robustness_outcome(jobs, Plan(jobs, tmp_path).run(), facts)
    assert {row["arm"] for row in outcome.numbers["augmentation"]} == {"bpe-dropout"}
    assert outcome.numbers["narrow_minus_varied"]["amount"] == 1500 and outcome.numbers["trained_tokens"] > 500
    for gap, texts in zip(outcome.numbers["gaps"], (small, large), strict=True):
        unique = sum(len(dataset.tokenizer.encode(text)) + 1 for text in texts)  # the last document goes beyond what was asked for
        assert unique > gap["amount"] and gap["epochs"] == outcome.numbers["trained_tokens"] / unique == gap["curve"][-1]["epochs"]


def test_mistakes(corpus, tmp_path):
    base, dataset = corpus
    plan = lambda **given: robustness_jobs(base, dataset, tmp_path, **{"amounts": [1500], "tokens": 640, "arms": [], **given})
    with pytest.raises(UserError, match="unknown paraphrase"):
        plan(arms=["paraphrase"])
    with pytest.raises(UserError, match="--amounts: 10,000,000 tokens asked, the training text has"):
        plan(amounts=[10_000_000])
    with pytest.raises(UserError, match=r"narrow text of [0-9,]+ tokens would be most of the corpus"):
        plan(amounts=[int(0.8 * dataset.train.reader.ends[-1])], seeds=1)


def test_too_few_documents_for_an_answer_are_refused_with_the_way_out(corpus, tmp_path):
    base, dataset = corpus
    plan = lambda data, **given: robustness_jobs(base, data, tmp_path, **{"amounts": [1500], "tokens": 640, "arms": [], **given})
    few = prepare(base.data.model_copy(update={"validation_fraction": 0.1}))
    count = len(few.validation.reader.starts)
    assert count < 30
    with pytest.raises(UserError, match=rf"held-out text has {count} documents.*30.*data.validation_fraction"):
        plan(few)
    with pytest.raises(UserError, match=r"narrow and varied text of 300 tokens has [1-9] documents.*10.*--amounts"):
        plan(dataset, amounts=[300], seeds=2)
    assert not list(tmp_path.glob("data/narrow*"))


def test_held_out_text_is_never_fewer_than_thirty_documents(corpus, tmp_path):
    base, dataset = corpus
    robustness_jobs(base, dataset, tmp_path, amounts=[1500], tokens=640, arms=[], seeds=2, held_out=100)
    assert len(topics(tmp_path, "held-out")[0]) == 30, "though one has 100 tokens"
