"""Picture 2, filter: C4's rules (Raffel et al. 2020, arXiv 1910.10683, section 2.2).

Keeps of a page the lines that look like sentences, and drops pages with too few of them. Order of the rules, and
those the paper leaves out (long words, citations, policies), follow the authors' c4_utils.py in tensorflow_datasets.
"""

from __future__ import annotations

import re

from pellucid.config import C4Filter
from pellucid.data.stages.outcome import Outcome
from pellucid.data.stages.textview import TextView

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
END = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SENTENCE_END = re.compile(r"(?<=\S)[.!?]+[\"'”’)\]]*(?=\s)")
ABBREVIATION = re.compile(r"(?:\b[A-Za-z]|\b(?:[A-Za-z]\.)+[A-Za-z]|\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|etc|Prof|No|cf|Fig))\.$")


def c4(view: TextView, rules: C4Filter) -> Outcome:
    """The text made of its good lines, or the reason to drop the document."""
    text = view.text
    lower = text.lower()
    policies = tuple(phrase for phrase in POLICIES if rules.policy and phrase in lower)
    javascript = rules.javascript and "javascript" in lower
    lorem_ipsum = rules.lorem_ipsum and "lorem ipsum" in lower
    curly_bracket = rules.curly_bracket and "{" in text
    citations = rules.citations and "[" in text
    kept: list[str] = []
    sentences = 0
    for line in view.lines:
        original = line = line.strip()
        if len(line) > rules.max_word_length and max(map(len, line.split())) > rules.max_word_length:
            continue
        if citations:
            line = CITATION.sub("", line)
        if rules.terminal_punctuation and (not line.endswith(END) or line.endswith("...")):
            continue
        if len(original.split(maxsplit=rules.min_words_per_line)) < rules.min_words_per_line:
            continue
        if lorem_ipsum and "lorem ipsum" in line.lower():
            return Outcome(None, "lorem ipsum")
        if javascript and "javascript" in line.lower():
            continue
        if curly_bracket and "{" in line:
            return Outcome(None, "curly bracket")
        if policies and any(phrase in line.lower() for phrase in policies):
            continue
        if sentences < rules.min_sentences:
            sentences += count_sentences(line)
        kept.append(line)
    if sentences < rules.min_sentences:
        return Outcome(None, "too few sentences")
    return Outcome("\n".join(kept).strip(), None) if kept else Outcome(None, "no line is a sentence")


def count_sentences(line: str) -> int:
    """Sentences of a line: the last, and ends inside it that are neither an abbreviation's nor of a spaced ellipsis."""
    if not line or line.isspace():
        return 0
    ends = SENTENCE_END.finditer(line.rstrip())
    return 1 + sum(not ABBREVIATION.search(line, max(0, m.start() - 12), m.start() + 1) for m in ends)
