"""Picture 2, normalize: one pure function from text to text, each of its steps switchable.

Unicode forms: Unicode Standard Annex 15. Control characters: category Cc other than tab and newline. Repair is
ftfy's (Speer 2019), restricted to wrong decodings, entities and terminal escapes: it changes no quotes or widths.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache
from typing import Any

from pellucid.config import NormalizeConfig, UserError
from pellucid.data.stages.outcome import Outcome
from pellucid.data.stages.privacy import mask

VERSION = 3
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories
CONTROL = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r")
ANY_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
QUOTES = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")
SPACES = re.compile(r"[^\S\n\t ]")  # no-break, thin, ideographic ... spaces
TRAILING = re.compile(r"[ \t]+(?=\n|\Z)")
BLANK_LINES = re.compile(r"\n{3,}")
RUNS = re.compile(r"[ \t]+")


def normalize(text: str, config: NormalizeConfig) -> str:
    """The text after every step that is switched on. Idempotent, but for `repair` and `pii`."""
    if config.repair:
        text = _repair(text)
    if config.line_ends:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if config.control_characters and ANY_CONTROL.search(text):
        text = text.translate(CONTROL)
    text = _unicode(text, config.unicode)
    if config.quotes:
        text = text.translate(QUOTES)
    if config.pii:
        text = mask(text, config.pii)
    if config.lowercase:
        text = _unicode(text.lower(), config.unicode)  # lower case may decompose
    if config.punctuation:
        text = _unicode(text.translate(_punctuation()), config.unicode)  # an accent may meet its letter
    if config.whitespace != "keep":
        text = _whitespace(text, collapse=config.whitespace == "collapse")
    return text


def normalize_text(text: str, config: NormalizeConfig) -> Outcome:
    """The normalized text; documents without a visible character are dropped."""
    text = normalize(text, config)
    return Outcome(text, None) if any(unicodedata.category(char) not in INVISIBLE for char in text) else Outcome(None, "empty")


def _unicode(text: str, form: str) -> str:
    return text if form == "none" or text.isascii() else unicodedata.normalize(form, text)


def _whitespace(text: str, collapse: bool) -> str:
    if not text.isascii():
        text = SPACES.sub(" ", text)
    if collapse:
        text = "\n".join(RUNS.sub(" ", line).strip(" ") for line in text.split("\n"))
    text = BLANK_LINES.sub("\n\n", TRAILING.sub("", text))
    return text.strip("\n")


@cache
def _punctuation() -> dict[int, None]:
    """Every character of the categories P*, for str.translate."""
    return dict.fromkeys(code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "P")


@cache
def _ftfy() -> tuple[Any, Any]:
    try:
        import ftfy
    except ImportError:
        raise UserError("data.normalize.repair: ftfy is not installed; pip install 'pellucid[clean]'") from None
    return ftfy, ftfy.TextFixerConfig(
        unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
        fix_line_breaks=False, remove_control_chars=False, normalization=None, explain=False)


def _repair(text: str) -> str:
    ftfy, config = _ftfy()
    return ftfy.fix_text(text, config)


def check(config: NormalizeConfig) -> None:
    """Raises UserError where a step needs something that is not installed."""
    if config.repair:
        _ftfy()
