"""Does it generalise? Three questions of one plan of paired runs, all of the same number of training tokens.

How the gap between training and held-out loss grows as the same text is repeated (Muennighoff et al. 2023, arXiv 2305.16264);
whether augmentation helps here, at several amounts of text; whether varied text teaches more than narrow text. Runs of one
seed share their initial weights, and all predict the same held-out documents: differences are paired, and may be zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.config import Config, DataConfig, UserError
from pellucid.data.build import prepare
from pellucid.data.dataset import Dataset
from pellucid.data.stages.textview import TextView
from pellucid.measure import intervals
from pellucid.measure.diversity import hashed_features, vendi
from pellucid.measure.outcome import Outcome, replace, spread
from pellucid.measure.plan import Job
from pellucid.measure.training import TRAINING, estimate

ARMS: dict[str, list[dict[str, Any]]] = {
    "off": [],
    "synonyms": [{"name": "synonyms", "rate": 0.1}],
    "back-translation": [{"name": "back_translation"}],
    "bpe-dropout": [{"name": "bpe_dropout", "rate": 0.1}],
}
HELD_OUT, SAMPLE = 30, 10  # fewest documents held out, and of narrow or varied text, from which anything follows
NARROW_SHARE = 0.5  # narrow text may take at most this share of the corpus, or it would not be narrow
CANDIDATES, CENTRES = 3000, 8  # documents among which narrow ones are looked for, around how many
ROWS = 128  # of training text, on which its loss is taken


def robustness_jobs(
    base: Config, dataset: Dataset, folder: Path, *, amounts: Sequence[int], tokens: int, arms: Sequence[str], seeds: int = 3,
    versions: int = 4, held_out: int = 40_000, progress: Callable[..., None] | None = None,
) -> tuple[list[Job], dict[str, Any]]:  # fmt: skip
    """Jobs, and facts of the texts: what was left out and why, Vendi scores, their tokens. Prepared texts lie in `folder`.

    amounts: unique training tokens; tokens: what each run trains on in all; versions: augmented ones of each document.
    Raises UserError for an unknown arm, or where the corpus has too little text or too few documents for an answer.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arms: unknown {', '.join(unknown)}; known: {', '.join(ARMS)}")
    documents = 0 if dataset.validation is None else len(dataset.validation.reader.starts)
    if documents < HELD_OUT:
        raise UserError(f"the held-out text has {documents} documents, and intervals from fewer than {HELD_OUT} mean nothing: raise "
                        "data.validation_fraction, or give more or shorter documents")
    amounts, say = sorted(amounts), progress or (lambda *_: None)
    if amounts[-1] > dataset.train.reader.ends[-1]:
        raise UserError(f"--amounts: {amounts[-1]:,} tokens asked, the training text has {int(dataset.train.reader.ends[-1]):,}; give "
                        "more text or smaller amounts")
    texts = _Texts(dataset, folder, base.data, versions)
    pairs = [texts.narrow_and_varied(amounts[0], seed) for seed in range(seeds)]
    texts.write("held-out", "validation", texts.up_to("validation", held_out, seed=0, least=HELD_OUT))
    facts: dict[str, Any] = {"unavailable": {}, "vendi": {}, "unique_tokens": {}}
    wanted = [("off", amount) for amount in amounts] + [(arm, amount) for arm in arms if arm != "off" for amount in amounts]
    prepared = {}
    for number, (arm, amount) in enumerate(wanted):
        say("preparing text", number, len(wanted) + 2 * seeds, f"{arm}, {amount:,} tokens")
        if arm in facts["unavailable"]:
            continue
        texts.write(f"train-{amount}", "train", texts.up_to("train", amount, seed=0))
        try:
            prepared[arm, amount, None] = texts.prepare(f"train-{amount}", arm)
        except UserError as error:
            if arm == "off":
                raise
            facts["unavailable"][arm] = str(error)
        if arm == "off":
            facts["unique_tokens"][amount] = int(prepared[arm, amount, None].train.reader.ends[-1])  # its last document is whole
    amount = amounts[0]
    for seed, pair in enumerate(pairs):
        say("preparing text", len(wanted) + 2 * seed, len(wanted) + 2 * seeds, "narrow and varied text")
        for kind, numbers in zip(("narrow", "varied"), pair, strict=True):
            texts.write(f"{kind}-{amount}-{seed}", "train", numbers)
            prepared[kind, amount, seed] = texts.prepare(f"{kind}-{amount}-{seed}", "off")
            facts["vendi"][f"{kind}-{seed}"] = texts.vendi(numbers)
    return _jobs(base, prepared, tokens, seeds, say), facts


def _jobs(base: Config, prepared: dict[tuple, Dataset], tokens: int, seeds: int, say: Callable[..., None]) -> list[Job]:
    steps = max(1, tokens // (base.training.batch_size * base.data.sequence_length))
    jobs, known = [], {}
    for (arm, amount, only), dataset in prepared.items():
        say("estimating", len(jobs), len(prepared) * seeds)
        for seed in range(seeds) if only is None else [only]:
            tables = base.model_dump(mode="json", exclude={"data", "observe", "checkpoint"}, exclude_none=True)
            tables["training"] |= {"max_steps": steps, "seed": seed}
            for budget in ("max_tokens", "max_epochs"):
                tables["training"].pop(budget, None)
            tables["data"] = {"sequence_length": base.data.sequence_length}
            settings = {"config": tables, "data": str(dataset.directory.resolve()), "data_fingerprint": dataset.fingerprint,
                        "points": 8 if arm == "off" else 0, "rows": ROWS, "about": {"arm": arm, "amount": amount, "seed": seed}}
            jobs.append(Job(f"{arm}-{amount}-seed-{seed}", TRAINING, settings, estimate(tables, settings["data"], known)))
    return jobs


class _Texts:
    """Parts of one corpus, written as files and prepared with its own tokenizer against the same held-out text."""

    def __init__(self, dataset: Dataset, folder: Path, base: DataConfig, versions: int):
        self.dataset, self.folder, self.base, self.versions = dataset, folder, base, versions
        (folder / "texts").mkdir(parents=True, exist_ok=True)

    def up_to(self, split: str, tokens: int, seed: int, least: int = 1) -> list[int]:
        """Documents in a random order that more tokens only lengthen, until there are so many, of `least` documents."""
        lengths = self.dataset.split(split).reader.lengths
        order = np.random.default_rng(seed).permutation(len(lengths))
        return order[: max(least, int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1)].tolist()

    def narrow_and_varied(self, tokens: int, seed: int) -> tuple[list[int], list[int]]:
        """The documents most alike one of eight drawn at random, the narrowest of the eight; and documents drawn at random."""
        random = np.random.default_rng([seed, 1])
        lengths = self.dataset.train.reader.lengths
        pool = random.permutation(len(lengths))[:CANDIDATES]
        if lengths[pool].sum() * NARROW_SHARE < tokens:
            raise UserError(f"narrow text of {tokens:,} tokens would be most of the corpus: give more text or smaller --amounts")
        features = hashed_features([TextView(self._text("train", int(number))) for number in pool])
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        until = lambda order: order[: int(np.searchsorted(np.cumsum(lengths[pool[order]]), tokens)) + 1]
        likeness = lambda centre: unit @ unit[centre]
        groups = [(c, until(np.argsort(-likeness(c), kind="stable"))) for c in random.permutation(len(pool))[:CENTRES]]
        _, narrow = max(groups, key=lambda group: likeness(group[0])[group[1]].mean())
        varied = until(random.permutation(len(pool)))
        if (fewest := min(len(narrow), len(varied))) < SAMPLE:
            raise UserError(f"narrow and varied text of {tokens:,} tokens has {fewest} documents, and from fewer than {SAMPLE} nothing "
                            "follows about others: raise the smallest of --amounts, or give shorter documents")
        return pool[narrow].tolist(), pool[varied].tolist()

    def vendi(self, numbers: Sequence[int]) -> dict[str, float]:
        """The score, and over the number of documents."""
        views = [TextView(self._text("train", number)) for number in numbers[:400]]
        return {"score": vendi(hashed_features(views)), "documents": len(views)}

    def write(self, name: str, split: str, numbers: Sequence[int]) -> None:
        rows = "".join(json.dumps({"text": self._text(split, number)}) + "\n" for number in numbers)
        replace(self.folder / "texts" / f"{name}.jsonl", rows)

    def prepare(self, name: str, arm: str) -> Dataset:
        path = lambda name: {"path": str((self.folder / "texts" / f"{name}.jsonl").resolve())}
        augment = ARMS[arm]
        tables = {"sources": [path(name)], "validation": [path("held-out")], "sequence_length": self.base.sequence_length,
                  "tokenizer": {"kind": "file", "path": str((self.dataset.directory / "tokenizer").resolve())},
                  "packing": self.base.packing, "augment": augment, "augment_epochs": self.versions if augment else 1}  # fmt: skip
        return prepare(DataConfig.model_validate(tables), directory=self.folder / "data" / f"{name}-{arm}")

    def _text(self, split: str, number: int) -> str:
        reader = self.dataset.split(split).reader
        tokens = reader.tokens(np.arange(reader.starts[number], reader.ends[number] - 1))
        return self.dataset.tokenizer.decode(tokens.tolist())


# ---------------------------------------------------------------------------------------- the answers


def robustness_outcome(jobs: Sequence[Job], results: dict[str, Any], facts: dict[str, Any]) -> Outcome:
    """Gaps, paired differences and verdicts; facts: from `robustness_jobs`."""
    runs = {(job.settings["about"]["arm"], job.settings["about"]["amount"], job.settings["about"]["seed"]): results[job.name]
            for job in jobs}
    amounts = sorted({amount for arm, amount, _ in runs if arm == "off"})
    seeds = sorted({seed for arm, _, seed in runs if arm == "off"})
    nats = lambda arm, amount: np.array([runs[arm, amount, seed]["documents"]["nats"] for seed in seeds])
    counts_G = np.array(next(iter(runs.values()))["documents"]["tokens"])
    trained = next(iter(runs.values()))["tokens"]
    gaps = []
    for amount in amounts:
        train_S = np.array([runs["off", amount, seed]["train"] for seed in seeds])
        gap = intervals.crossed(nats("off", amount) - train_S[:, None] * counts_G, counts_G)
        curves = [runs["off", amount, seed]["curve"] for seed in seeds]
        unique = facts["unique_tokens"][amount]
        gaps.append({"amount": amount, "unique": unique, "epochs": trained / unique, "train": float(train_S.mean()), "gap": gap,
                     "held_out": intervals.crossed(nats("off", amount), counts_G), "curve": _mean_curve(curves, unique, trained)})
    paired = [{"arm": arm, "amount": amount, **_verdict(intervals.crossed(nats(arm, amount) - nats("off", amount), counts_G))}
              for arm in dict.fromkeys(arm for arm, _, _ in runs) if arm in ARMS and arm != "off" for amount in amounts]
    numbers = {"seeds": seeds, "trained_tokens": trained, "held_out_documents": len(counts_G), "gaps": gaps, "augmentation": paired,
               **facts}  # fmt: skip
    if ("narrow", amounts[0], seeds[0]) in runs:
        difference = intervals.crossed(nats("narrow", amounts[0]) - nats("varied", amounts[0]), counts_G)
        numbers["narrow_minus_varied"] = {"amount": amounts[0], **_verdict(difference)}
    outcome = Outcome("robustness", "Does it generalise?", {"seeds": seeds}, numbers=numbers)
    _describe(outcome)
    return outcome


def _verdict(difference: dict[str, float]) -> dict[str, Any]:
    """What an interval of a difference in held-out loss allows to say: lower is better."""
    word = "helps" if difference["high"] < 0 else "harms" if difference["low"] > 0 else "no difference shown"
    return {**difference, "verdict": word}


def _mean_curve(curves: Sequence[list[dict]], amount: int, trained: int) -> list[dict[str, float]]:
    """Over seeds, at the steps that all have: runs that an earlier version resumed lack those before the stop."""
    by_step = [{point["step"]: point for point in curve} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    mean = lambda step, key: float(np.mean([points[step][key] for points in by_step]))
    return [{"epochs": step / steps[-1] * trained / amount, "train": mean(step, "train"), "held_out": mean(step, "held_out")}
            for step in steps]


def _begin(arm: str) -> str:
    """An arm's name as the first word of a sentence."""
    return arm.capitalize().replace("Bpe", "BPE")


def _describe(outcome: Outcome) -> None:
    found = outcome.numbers
    unique = {gap["amount"]: gap["unique"] for gap in found["gaps"]}  # tokens asked for -> tokens there
    for gap in found["gaps"]:
        outcome.findings.append(f"{gap['unique']:,} tokens of text, {gap['epochs']:.1f} times: training loss {gap['train']:.3f}, "
                                f"held-out {gap['held_out']['mean']:.3f}, a gap of {spread(gap['gap'])}.")
    for row in found["augmentation"]:
        outcome.findings.append(f"{_begin(row['arm'])} at {unique[row['amount']]:,} tokens: held-out loss changes by {spread(row)}: "
                                f"{row['verdict']}.")
    outcome.findings += [f"{_begin(arm)} could not be tried: {why}" for arm, why in found["unavailable"].items()]
    if "narrow_minus_varied" in found:
        row = found["narrow_minus_varied"]
        score = lambda kind: np.mean([v["score"] / v["documents"] for name, v in found["vendi"].items() if name.startswith(kind)])
        outcome.findings.append(
            f"Narrow text of {row['amount']:,} tokens (Vendi score {score('narrow'):.2f} of its documents) instead of varied text "
            f"({score('varied'):.2f}): held-out loss changes by {spread(row)}; varied text "
            f"{ {'harms': 'generalises better', 'helps': 'generalises worse'}.get(row['verdict'], 'shows no difference') }.")
    outcome.tables.append({
        "title": "Held-out loss against no augmentation", "columns": ["augmentation", "tokens", "difference", "low", "high", ""],
        "rows": [[r["arm"], unique[r["amount"]], r["mean"], r["low"], r["high"], r["verdict"]] for r in found["augmentation"]]})
    curve = lambda gap, key: {"x": [p["epochs"] for p in gap["curve"]], "y": [p[key] for p in gap["curve"]]}
    outcome.charts.append({
        "title": "The same text again and again (dashed: loss on the training text)", "x": "times the text was seen",
        "y": "nats per token", "log_x": True,
        "lines": [*({"name": f"{g['unique']:,} tokens, held-out", **curve(g, "held_out")} for g in found["gaps"]),
                  *({"name": "", "dashed": True, "colour": n, **curve(g, "train")} for n, g in enumerate(found["gaps"]))]})
    arms = list(dict.fromkeys(row["arm"] for row in found["augmentation"]))
    if arms:
        of = lambda arm: [row for row in found["augmentation"] if row["arm"] == arm]
        outcome.charts.append({
            "title": "Held-out loss with augmentation minus without (below 0: it helps)", "x": "unique tokens", "y": "nats",
            "log_x": True, "level": ["no difference", 0.0],
            "lines": [{"name": arm, "points": True, "x": [r["amount"] * (1 + 0.05 * n) for r in of(arm)],
                       **{key: [r[end] for r in of(arm)] for key, end in (("y", "mean"), ("low", "low"), ("high", "high"))}}
                      for n, arm in enumerate(arms)]})  # fmt: skip
