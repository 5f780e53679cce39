"""How varied a data set is, and how clean its held-out part: seven views, each with a closed form on made texts.

Word n-gram entropies (Shannon 1951; Miller & Madow 1955), compression, vocabulary growth (Heaps 1978), near-duplicates
(MinHash, Broder 1997), entropy of the mixture of sources, Vendi score (Friedman & Dieng 2023), and held-out text that
also stands in the training text (as in Brown et al. 2020, appendix C).
"""

from __future__ import annotations

import lzma
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pellucid.config import UserError
from pellucid.data.stages.components import components
from pellucid.data.stages.decontaminate import ngrams, overlap
from pellucid.data.stages.minhash import MinHash
from pellucid.data.stages.textview import TextView, mix
from pellucid.measure import intervals
from pellucid.measure.outcome import Outcome, spread
from pellucid.measure.texts import Texts

ORDERS = (1, 2, 3, 4, 5)
FEATURES = 4096  # of hashed n-grams, for similarity
SIMILAR = 0.8  # Jaccard, from which on two documents count as near-duplicates
VENDI_DOCUMENTS, VENDI_DRAWS = 400, 10
HEAPS_ORDERS, HEAPS_POINTS = 20, 24
LEAST_WORDS = 1000


def measure_diversity(
    train: Texts, held_out: Texts | None = None, *, ngram: int = 13, seed: int = 0,
    embed: Callable[[Sequence[str]], np.ndarray] | None = None, progress: Callable[..., None] | None = None,
) -> Outcome:  # fmt: skip
    """All views of `train`, and of `held_out` against it. ngram: words in common that count as overlap.

    embed: texts -> float [n, D], for a Vendi score by a model besides that by n-grams. Raises UserError for under
    1,000 words.
    """
    progress = progress or (lambda *_: None)
    began, stages = time.perf_counter(), 6
    at = iter(range(stages + 1))
    say = lambda name: progress("measuring", next(at), stages, name)
    say("words")
    views = [TextView(text) for text in train.texts]
    words = sum(len(view.words.hash) for view in views)
    if words < LEAST_WORDS:
        raise UserError(f"the text holds {words} words; diversity needs {LEAST_WORDS:,} or more to say anything")
    text_bytes = sum(len(text.encode()) for text in train.texts)
    numbers = {"documents": len(views), "words": words, "text_bytes": text_bytes, "whole": train.whole, "seed": seed,
               "ngrams": [entropy(views, n) for n in ORDERS]}
    say("compression")
    numbers["compression"] = compression(train.texts)
    say("vocabulary growth")
    numbers["heaps"] = heaps([view.words.hash for view in views], seed)
    say("near-duplicates")
    numbers["near_duplicates"] = near_duplicates(views)
    numbers["mixture"] = mixture(train)
    say("Vendi score")
    numbers["vendi"] = vendi_of_samples(len(views), lambda rows: hashed_features([views[r] for r in rows]), seed)
    if embed is not None:
        states: dict[int, np.ndarray] = {}
        numbers["vendi_model"] = vendi_of_samples(len(views), lambda rows: _embedded(rows, train.texts, embed, states), seed)
    say("overlap")
    if held_out is not None and held_out.texts:
        numbers["overlap"] = contamination(views, held_out.texts, ngram, seed)
    settings = {"ngram": ngram, "seed": seed, "similar": SIMILAR}
    outcome = Outcome("diversity", "How varied the text is", settings, numbers=numbers)
    _describe(outcome)
    outcome.seconds = time.perf_counter() - began
    return outcome


# ---------------------------------------------------------------------------------------- the views


def entropy(views: Sequence[TextView], n: int) -> dict[str, float]:
    """Word n-grams, never across documents: block entropy in bits, that of the last word given the others, distinct.

    Plug-in entropies with Miller & Madow's correction (types - 1) / 2N nats. Where most n-grams are seen once
    (`once` near 1) both are limited by the sample's size, not by the text.
    """
    whole, context = (_block_entropy([_grams(view, m, n) for view in views]) for m in (n, n - 1))
    return {"n": n, "bits": whole["bits"], "conditional_bits": whole["bits"] - context["bits"],
            "distinct": whole["types"] / max(1, whole["count"]), "once": whole["once"], "count": whole["count"]}


def _grams(view: TextView, m: int, n: int) -> np.ndarray:
    """m-grams that begin an n-gram, so that the two entropies are of one sample."""
    count = max(0, len(view.words.hash) - n + 1)
    return view.grams(m)[:count] if m else np.zeros(count, np.uint64)


def _block_entropy(parts: Sequence[np.ndarray]) -> dict[str, float]:
    counts = np.unique(np.concatenate(parts), return_counts=True)[1]
    total = int(counts.sum())
    if not total:
        return {"bits": 0.0, "types": 0, "count": 0, "once": 0.0}
    shares = counts / total
    bits = float(-(shares * np.log2(shares)).sum() + (len(counts) - 1) / (2 * total * np.log(2)))
    return {"bits": bits, "types": len(counts), "count": total, "once": float((counts == 1).sum() / len(counts))}


def compression(texts: Sequence[str]) -> dict[str, float]:
    """How much smaller xz makes the texts, one after another: ratio, and bits per byte."""
    packer, size, packed = lzma.LZMACompressor(preset=6), 0, 0
    for text in texts:
        data = text.encode() + b"\n"
        size, packed = size + len(data), packed + len(packer.compress(data))
    packed += len(packer.flush())
    return {"ratio": size / packed, "bits_per_byte": 8 * packed / size}


def heaps(documents: Sequence[np.ndarray], seed: int = 0) -> dict:
    """V(n) = K * n^beta, types among n words: a line through log V(n) at even steps of log n, documents shuffled.

    The interval of beta is over orders of the documents: how much it hangs on which came first.
    """
    random, curves = np.random.default_rng(seed), []
    total = sum(map(len, documents))
    at = np.unique(np.geomspace(min(100, total), total, HEAPS_POINTS).astype(np.int64))
    for _ in range(HEAPS_ORDERS if len(documents) > 1 else 1):
        words = np.concatenate([documents[number] for number in random.permutation(len(documents))])
        first = np.zeros(total, np.int64)
        first[np.unique(words, return_index=True)[1]] = 1
        curves.append(np.cumsum(first)[at - 1])
    fits = np.array([np.polyfit(np.log(at), np.log(curve), 1) for curve in curves])
    low, high = intervals.bounds(fits[:, 0]) if len(documents) > 1 else (-np.inf, np.inf)
    return {"beta": {"mean": float(fits[:, 0].mean()), "low": float(low), "high": float(high)},
            "K": float(np.exp(fits[:, 1]).mean()), "words": at.tolist(), "types": np.mean(curves, axis=0).tolist()}


def near_duplicates(views: Sequence[TextView]) -> dict:
    """Share of documents that are near-duplicates of one kept: Jaccard of word 5-grams estimated at 0.8 or more.

    Pairs come from equal MinHash bands; their similarity is estimated from all 112 hashes. Documents of under five
    words cannot be judged.
    """
    hasher, signatures, owners = MinHash(), [], []
    for number, view in enumerate(views):
        if (signature := hasher.signature(view)) is not None:
            signatures.append(signature)
            owners.append(number)
    if not owners:
        return {"documents": 0, "judged": 0}
    pairs: set[tuple[int, int]] = set()
    keys = np.stack([hasher.band_keys(signature) for signature in signatures])
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        same = np.flatnonzero(band[order][1:] == band[order][:-1])
        heads = order[np.maximum.accumulate(np.where(np.isin(np.arange(len(order)), same + 1), 0, np.arange(len(order))))]
        pairs |= {tuple(sorted((int(order[i + 1]), int(other)))) for i in same for other in (order[i], heads[i])}
    alike = lambda a, b: float(np.mean(signatures[a] == signatures[b]))
    edges = np.array([[owners[a], owners[b]] for a, b in sorted(pairs) if alike(a, b) >= SIMILAR], np.int64).reshape(-1, 2)
    extra = np.zeros(len(views))
    with tempfile.TemporaryDirectory() as folder:
        for rows in components([edges.astype(np.uint64)], Path(folder)):
            extra[rows[rows[:, 0] != rows[:, 1], 0].astype(np.int64)] = 1.0
    return {"rate": intervals.share(extra[owners], np.ones(len(owners))), "documents": int(extra.sum()), "judged": len(owners)}


def mixture(texts: Texts) -> dict:
    """Entropy in bits of the sources' shares of the text, and 2 to that power: how many equal sources it is like."""
    sizes: dict[str, int] = {}
    for source, text in zip(texts.sources, texts.texts, strict=True):
        sizes[source] = sizes.get(source, 0) + len(text.encode())
    shares = np.array(list(sizes.values())) / sum(sizes.values())
    bits = float(-(shares * np.log2(shares)).sum()) + 0.0
    return {"bits": bits, "effective_sources": 2.0**bits, "shares": dict(zip(sizes, shares.tolist(), strict=True))}


def vendi(features: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K / n, K the cosines between n documents: their effective number.

    n for mutually unlike documents, 1 for equal ones. A document without features is unlike all others.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms > 0, norms, 1)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, 1.0)
    values = np.linalg.eigvalsh(cosines / len(cosines))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def vendi_of_samples(count: int, features: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> dict:
    """The score grows with the number of documents, so it is that of samples of one size (at most half); the interval is over them."""
    random, size = np.random.default_rng(seed), min(VENDI_DOCUMENTS, max(1, count // 2))
    draws = VENDI_DRAWS
    scores = np.array([vendi(features(random.choice(count, size, replace=False))) for _ in range(draws)])
    low, high = intervals.bounds(scores) if size > 1 else (-np.inf, np.inf)
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high), "documents": size, "samples": draws}


def _embedded(rows: np.ndarray, texts: Sequence[str], embed: Callable, known: dict[int, np.ndarray]) -> np.ndarray:
    """The model's states of some texts; each text goes through the model once, however many samples hold it."""
    new = [int(row) for row in rows if int(row) not in known]
    if new:
        known.update(zip(new, embed([texts[row] for row in new]), strict=True))
    return np.stack([known[int(row)] for row in rows])


def hashed_features(views: Sequence[TextView]) -> np.ndarray:
    """float64 [n, 4096]: log(1 + count) of each document's words and word pairs, hashed.

    Weighted by 1 + log inverse document frequency within the sample: words which all documents share say less.
    """
    table = np.zeros((len(views), FEATURES))
    for row, view in enumerate(views):
        for n in (1, 2):
            slots = (mix(view.grams(n, folded=True)) % np.uint64(FEATURES)).astype(np.int64)
            table[row] += np.bincount(slots, minlength=FEATURES)
    used = (table > 0).sum(0)
    return np.log1p(table) * (1 + np.log((1 + len(views)) / (1 + used)))


def contamination(train: Sequence[TextView], held_out: Sequence[str], n: int, seed: int = 0) -> dict:
    """Held-out documents against all word n-grams of the training text.

    `touched`: share of documents with one in common; `overlap`: share of held-out n-grams in common, a mean over
    documents' n-grams. Documents of under n words cannot be judged. 8 bytes of memory a training n-gram.
    """
    known = np.unique(np.concatenate([ngrams(view, n) for view in train]))
    views = [view for view in map(TextView, held_out) if len(view.grams(n, folded=True))]
    if not views:
        return {"ngram": n, "judged": 0, "documents": len(held_out)}
    shares = np.array([overlap(view, known, n) for view in views])
    counts = np.array([len(view.grams(n, folded=True)) for view in views], float)
    return {"ngram": n, "judged": len(views), "documents": len(held_out),
            "touched": intervals.share(shares > 0, np.ones(len(views)), seed=seed),
            "overlap": intervals.share(shares * counts, counts, seed=seed)}


# ------------------------------------------------------------------------------------------ in words


def _near_duplicates_in_words(twins: dict, short: int) -> str:
    """short: how many documents were not judged."""
    if not twins["judged"]:
        return "Near-duplicates cannot be told: every document has under five words."
    return (f"{twins['rate']['mean']:.1%} of {twins['judged']:,} documents ({twins['documents']:,}) are near-duplicates of another"
            f"{f'; {short:,} of under five words cannot be judged' if short else ''}.")


def _describe(outcome: Outcome) -> None:
    found = outcome.numbers
    heap, vendis, twins, blend = found["heaps"], found["vendi"], found["near_duplicates"], found["mixture"]
    sample = "" if found["whole"] else " (a sample)"
    outcome.findings += [
        f"{found['documents']:,} documents, {found['words']:,} words, {found['text_bytes']:,} bytes{sample}.",
        f"A word carries {found['ngrams'][0]['bits']:.2f} bits, {found['ngrams'][1]['conditional_bits']:.2f} once the word "
        f"before is known; xz needs {found['compression']['bits_per_byte']:.2f} bits per byte "
        f"({found['compression']['ratio']:.2f} times smaller).",
        f"Vocabulary grows as n^{spread(heap['beta'])}.",
        _near_duplicates_in_words(twins, found["documents"] - twins["judged"]),
        f"Vendi score: {vendis['documents']:,} documents are as varied as {spread(vendis, 1)} wholly different ones.",
    ]
    if "vendi_model" in found:
        outcome.findings.append(f"To the model they are as varied as {spread(found['vendi_model'], 1)} ones.")
    if len(blend["shares"]) > 1:
        outcome.findings.append(f"Sources: {blend['bits']:.2f} bits, like {blend['effective_sources']:.2f} equal ones.")
    if "overlap" in found and found["overlap"]["judged"]:
        common = found["overlap"]
        outcome.findings.append(
            f"Held-out text: {common['touched']['mean']:.1%} of {common['judged']:,} documents share a run of "
            f"{common['ngram']} words with the training text, {common['overlap']['mean']:.2%} "
            f"({common['overlap']['low']:.2%} to {common['overlap']['high']:.2%}) of their runs in all"
            f"{'' if found['whole'] else '; at least, for only a sample of the training text was looked at'}.")
    elif "overlap" in found:
        outcome.findings.append(f"Held-out text: none of its {found['overlap']['documents']:,} documents has "
                                f"{found['overlap']['ngram']} words, so none can be judged.")
    orders = [row["n"] for row in found["ngrams"]]
    outcome.tables.append({
        "title": "Word n-grams", "columns": ["n", "bits", "bits of the last word", "distinct", "seen once"],
        "rows": [[r["n"], r["bits"], r["conditional_bits"], r["distinct"], r["once"]] for r in found["ngrams"]]})
    outcome.charts += [
        {"title": "Types among the first n words", "x": "words", "y": "different words", "log_x": True, "log_y": True,
         "lines": [{"name": "measured", "x": heap["words"], "y": heap["types"]},
                   {"name": f"{heap['K']:.3g} n^{heap['beta']['mean']:.3f}", "dashed": True, "x": heap["words"],
                    "y": [heap["K"] * n ** heap["beta"]["mean"] for n in heap["words"]]}]},
        {"title": "What the next word tells, given those before", "x": "words known, the next included (n)", "y": "bits",
         "lines": [{"name": "", "x": orders, "y": [row["conditional_bits"] for row in found["ngrams"]]}]}]
