"""How much a model uses the text before: loss by position, by amount and kind of context, and copying.

Drop from the 50th to the 500th token: Olsson et al. 2022 (arXiv 2209.11895). Shuffled and foreign context: Khandelwal et
al. 2018 (1805.04623). Repeated random tokens have nothing to learn but to copy: what is lost less the second time is
induction. Intervals draw documents. Letters: M predicted tokens, G documents, B rows, T positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from pellucid.config import UserError
from pellucid.measure import intervals
from pellucid.measure.outcome import Outcome, spread

Losses = Callable[[np.ndarray, np.ndarray], np.ndarray]  # inputs [B, T], targets [B, T] (< 0: none) -> nats [B, T]
NEAR = 16  # tokens left in place before the predicted one, where the far context is replaced
EARLY, LATE = 50, 500  # positions of Olsson et al.
BAND = 8  # positions on either side, or a quarter of a short window, averaged with them: their text corpora were larger
KINDS = ("true", "near only", "far shuffled", "far foreign", "all shuffled", "all foreign")
ROWS = 64  # windows or predicted tokens between two reports of progress


def measure_context(
    losses: Losses, streams: Sequence[np.ndarray], vocab_size: int, *, context: int, predictions: int = 512,
    copies: int = 64, seed: int = 0, progress: Callable[..., None] | None = None,
) -> Outcome:  # fmt: skip
    """streams: documents as eos + text + eos. context: most tokens given; predictions: tokens predicted under each kind.

    Raises UserError when no document, or too few of them, is longer than `context`.
    """
    progress = progress or (lambda *_: None)
    began, random = time.perf_counter(), np.random.default_rng(seed)
    long = [stream for stream in streams if len(stream) > context]
    if len(long) < 2:
        raise UserError(f"{len(long)} of {len(streams)} documents have more than {context} tokens, 2 are needed: give longer "
                        "text with --data, or a smaller --context")
    numbers = {"context": context, "near": near_of(context), "documents": len(long), "predictions": predictions, "seed": seed}
    numbers["by_position"] = by_position(losses, long, context, progress)
    numbers["drop"] = drop(numbers["by_position"].pop("sums"), numbers["by_position"].pop("counts"), context)
    numbers["amount"], numbers["kinds"] = by_amount_and_kind(losses, long, context, predictions, random, progress)
    numbers["induction"] = induction(losses, vocab_size, context, copies, random, progress)
    settings = {"context": context, "predictions": predictions, "copies": copies, "near": near_of(context), "seed": seed}
    outcome = Outcome("context", "How much of the text before is used", settings, numbers=numbers)
    _describe(outcome)
    outcome.seconds = time.perf_counter() - began
    return outcome


def by_position(losses: Losses, streams: Sequence[np.ndarray], T: int, progress: Callable[..., None], most: int = 512) -> dict:
    """Mean loss at each position of windows that begin with a document or `T` tokens after another window.

    Position p is predicted from p tokens. At most `most` windows, spread over the documents.
    """
    windows = [(g, start) for g, stream in enumerate(streams) for start in range(0, len(stream) - T, T)]
    chosen = [windows[i] for i in np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int)]
    sums, counts = np.zeros((len(streams), T)), np.zeros((len(streams), T))
    for first in range(0, len(chosen), ROWS):
        part = chosen[first : first + ROWS]
        progress("loss by position", first, len(chosen))
        rows = np.stack([streams[g][start : start + T + 1] for g, start in part])
        for (g, _), row in zip(part, losses(rows[:, :-1], rows[:, 1:]), strict=True):
            sums[g] += row
            counts[g] += 1
    seen = counts.any(1)
    sums, counts = sums[seen], counts[seen]
    edges = np.unique(np.geomspace(1, T + 1, 25).astype(int)) - 1  # buckets as wide as they are far
    pooled = lambda table: np.add.reduceat(table, edges[:-1], axis=1)
    found = intervals.ratio(pooled(sums), pooled(counts))
    middles = ((edges[:-1] + edges[1:] - 1) / 2 + 1).tolist()  # counted from 1: tokens known to the model
    return {"position": middles, **found, "windows": len(chosen), "sums": sums, "counts": counts}


def drop(sums_GT: np.ndarray, counts_GT: np.ndarray, T: int) -> dict:
    """Loss late minus loss early, each over a band of positions: negative where context helps. Late: the 500th if there."""
    width = min(BAND, max(1, T // 4))  # so that no position is in both bands
    early, late = min(EARLY, max(1, T // 4)), min(LATE, T - width)
    band = lambda table, at: table[:, at - width : at + width].sum(1)
    count_early, count_late = band(counts_GT, early), band(counts_GT, late)
    # each window has all positions, so that the difference of means is the mean of differences per token
    difference = band(sums_GT, late) / (count_late / count_early) - band(sums_GT, early)
    return {"early": early, "late": late, "band": width, **intervals.ratio(difference, count_early)}


def by_amount_and_kind(losses: Losses, streams, T: int, predictions: int, random, progress: Callable[..., None]) -> tuple:
    """The same tokens, predicted from 1, 2, 4, ... T tokens before, and from other kinds of context of T tokens."""
    places = [(g, int(at)) for g in random.choice(len(streams), predictions) for at in [random.integers(T, len(streams[g]))]]
    windows_MT = np.stack([streams[g][at - T : at] for g, at in places])
    targets_M = np.array([streams[g][at] for g, at in places])
    owners_M = np.array([g for g, _ in places])
    amounts = [2**n for n in range(20) if 2**n < T] + [T]
    given = {("amount", n): windows_MT[:, T - n :] for n in amounts}
    given |= {("kind", kind): window for kind, window in _kinds(windows_MT, owners_M, random).items()}
    total, done, found = sum(table.shape[1] for table in given.values()), 0, {}
    for key, inputs in given.items():
        found[key] = _last_losses(losses, inputs, targets_M)
        done += inputs.shape[1]
        progress("loss by context", done, total)
    per_document = lambda values: np.bincount(owners_M, weights=values, minlength=len(streams))
    counts_G = per_document(np.ones(predictions))
    used = counts_G > 0
    mean = lambda values: intervals.ratio(per_document(values)[used], counts_G[used])
    amount = [{"tokens": n, **mean(found["amount", n]), "to_full": mean(found["amount", n] - found["amount", T])} for n in amounts]
    kinds = {kind: {**mean(found["kind", kind]), "to_true": mean(found["kind", kind] - found["kind", "true"]),
                    "to_near": mean(found["kind", kind] - found["kind", "near only"])} for kind in KINDS}
    return amount, kinds


def _kinds(windows_MT: np.ndarray, owners_M: np.ndarray, random) -> dict[str, np.ndarray]:
    """The context itself, cut, shuffled, and taken from another document (far: all but the last 16 tokens, or half of few)."""
    T = windows_MT.shape[1]
    near = near_of(T)
    other = np.array([random.choice(np.flatnonzero(owners_M != g)) if (owners_M != g).any() else m
                      for m, g in enumerate(owners_M)])
    foreign = windows_MT[other]
    far_shuffled = np.concatenate([random.permuted(windows_MT[:, : T - near], axis=1), windows_MT[:, T - near :]], axis=1)
    far_foreign = np.concatenate([foreign[:, : T - near], windows_MT[:, T - near :]], axis=1)
    tables = (windows_MT, windows_MT[:, T - near :], far_shuffled, far_foreign, random.permuted(windows_MT, axis=1), foreign)
    return dict(zip(KINDS, tables, strict=True))


def near_of(T: int) -> int:
    """How many tokens stay in place before the predicted one, of T."""
    return min(NEAR, T // 2)


def _last_losses(losses: Losses, inputs_MT: np.ndarray, targets_M: np.ndarray) -> np.ndarray:
    """Loss of the token after each window, [M]."""
    found = []
    for start in range(0, len(inputs_MT), ROWS):
        part = inputs_MT[start : start + ROWS]
        targets = np.full(part.shape, -1)
        targets[:, -1] = targets_M[start : start + ROWS]
        found.append(losses(part, targets)[:, -1])
    return np.concatenate(found)


def induction(losses: Losses, vocab_size: int, T: int, copies: int, random, progress: Callable[..., None]) -> dict:
    """Loss on random tokens the first time minus the second time: all of the first where copying is perfect, 0 where there is none.

    At first they cost a model that has learnt a language more than to guess evenly would (`random`). The first four ids are left
    out: they are reserved in trained tokenizers.
    """
    half = T // 2
    rows = random.integers(4, vocab_size, (copies, half))
    rows = np.concatenate([rows, rows], axis=1)
    table = np.concatenate([losses(rows[i : i + ROWS, :-1], rows[i : i + ROWS, 1:]) for i in range(0, copies, ROWS)])
    progress("induction", 1, 1)
    first, second = table[:, : half - 1].mean(1), table[:, half:].mean(1)  # the first copied token has no token before it
    ones = np.ones(copies)
    return {"length": half, "first": intervals.ratio(first, ones), "second": intervals.ratio(second, ones),
            "gain": intervals.ratio(first - second, ones), "random": float(np.log(vocab_size - 4))}


def useful_tokens(amount: Sequence[dict]) -> int:
    """The fewest tokens from which all context is not clearly better: the interval of the difference reaches 0. At most all."""
    return next(row["tokens"] for row in amount if row["to_full"]["low"] <= 0)


def _describe(outcome: Outcome) -> None:
    found = outcome.numbers
    curve, amount, kinds, copied, fall = (found[k] for k in ("by_position", "amount", "kinds", "induction", "drop"))
    enough, most = useful_tokens(amount), found["context"]
    used = (f"After {enough} token{'s' * (enough > 1)} of context more of it makes no difference that {found['predictions']} predicted "
            "tokens can show"
            if enough < most else f"All of the window of {most} tokens is used: every smaller amount tried is clearly worse")
    verdict = ("context helps" if fall["high"] < 0 else "no gain from context can be shown" if fall["low"] <= 0
               else "more context makes it worse")
    shorter = "" if fall["late"] == LATE else f" (the window of {found['context']} tokens does not reach token 500)"
    outcome.findings += [
        f"From token {fall['early']} to token {fall['late']} the loss changes by {spread(fall)} nats: {verdict}{shorter}.",
        f"{used}; with 1 token the loss is {amount[0]['to_full']['mean']:.3f} higher than with {most}.",
        f"Against the true context, foreign text before the last {found['near']} tokens costs "
        f"{spread(kinds['far foreign']['to_true'])}, "
        f"the same words shuffled {spread(kinds['far shuffled']['to_true'])}, none at all {spread(kinds['near only']['to_true'])}.",
        f"Random tokens repeated: {copied['first']['mean']:.2f} nats at first (guessed evenly: {copied['random']:.2f}), "
        f"{copied['second']['mean']:.2f} the second time: induction gains {spread(copied['gain'])} of at most "
        f"{copied['first']['mean']:.2f}.",
    ]
    outcome.tables.append({
        "title": "Loss under each kind of context", "columns": ["context", "loss", "low", "high", "more than true", "low", "high"],
        "rows": [[kind, row["mean"], row["low"], row["high"], *(row["to_true"][k] for k in ("mean", "low", "high"))]
                 for kind, row in kinds.items()]})
    ends = ("mean", "low", "high")
    table = lambda rows: dict(zip(("y", "low", "high"), ([row[end] for row in rows] for end in ends), strict=True))
    outcome.charts += [
        {"title": "Loss by position", "x": "tokens known", "y": "nats per token", "log_x": True,
         "lines": [{"name": "", "x": curve["position"], "y": curve["mean"], "low": curve["low"], "high": curve["high"]}]},
        {"title": "What is lost with less context", "x": "tokens of context given", "y": "nats above all of it", "log_x": True,
         "level": ["all of the context", 0.0],
         "lines": [{"name": "true context, cut", "x": [r["tokens"] for r in amount], **table([r["to_full"] for r in amount])},
                   *({"name": kind, "points": True, "x": [found["context"] * (1 + 0.06 * n)], **table([kinds[kind]["to_true"]])}
                     for n, kind in enumerate(KINDS[2:]))]}]
