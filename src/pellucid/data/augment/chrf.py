"""Picture 2, augment: chrF, the likeness of two texts by their character n-grams (Popović 2015).

F-score with recall weighing twice as much as precision, over n = 1..6, white space left out: sacrebleu's chrF2
without its factor of 100. 1 for equal texts, 0 for texts without a common character.
"""

from __future__ import annotations

from collections import Counter

ORDER = 6
BETA = 2.0


def chrf(hypothesis: str, reference: str) -> float:
    """chrF2 of a hypothesis against a reference, between 0 and 1; 0 if either is empty."""
    hypothesis, reference = "".join(hypothesis.split()), "".join(reference.split())
    precision = recall = 0.0
    orders = 0
    for n in range(1, ORDER + 1):
        ours, theirs = _ngrams(hypothesis, n), _ngrams(reference, n)
        if not ours or not theirs:
            break
        matches = sum((ours & theirs).values())
        precision += matches / ours.total()
        recall += matches / theirs.total()
        orders += 1
    if not precision or not recall:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
