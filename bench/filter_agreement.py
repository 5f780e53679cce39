"""Do our filters say what datatrove's say? Every disagreement on the same documents, with its cause.

    python bench/filter_agreement.py CORPUS_DIR [--megabytes 3]     writes bench/results/filter_agreement.json
    python bench/filter_agreement.py --golden                       writes tests/data/stages/filter_verdicts.json

CORPUS_DIR holds .jsonl files with "id" and "text". The cause is found by trial: where our filter, given datatrove's
split into words (spaCy's) or its count of sentences, says what datatrove says, that split is the cause; else it is
"rules", and would be a mistake of the one or the other. Needs datatrove[processing] and spacy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from datatrove.data import Document
from datatrove.pipeline import filters
from datatrove.utils.text import split_into_sentences, split_into_words

from pellucid import config as settings
from pellucid.data.stages import c4, quality, repetition
from pellucid.data.stages.textview import LETTERS, TextView, Words, hash_text

ROOT = Path(__file__).parent.parent
RESULTS, GOLDEN = ROOT / "bench/results/filter_agreement.json", ROOT / "tests/data/stages/filter_verdicts.json"
OURS: dict[str, Callable[[TextView], str | None]] = {
    "gopher_quality": lambda view: quality.gopher_quality(view, settings.GopherQualityFilter()),
    "gopher_repetition": lambda view: repetition.gopher_repetition(view, settings.GopherRepetitionFilter()),
    "c4": lambda view: c4.c4(view, settings.C4Filter()).reason,
    "fineweb": lambda view: quality.fineweb(view, settings.FineWebFilter()),
}
THEIRS = {
    "gopher_quality": filters.GopherQualityFilter(), "gopher_repetition": filters.GopherRepetitionFilter(),
    "c4": filters.C4QualityFilter(), "fineweb": filters.FineWebQualityFilter(char_duplicates_ratio=0.1),
}


def their_verdict(name: str, text: str) -> str | None:
    """datatrove's reason to drop the text, or None."""
    try:
        result = THEIRS[name].filter(Document(text=text, id="0"))
    except (ZeroDivisionError, AssertionError) as error:
        return f"raises {type(error).__name__}"
    return None if result is True else result[1]


def with_their_words(text: str) -> TextView:
    """Our view of a text, but with datatrove's words."""
    view, words = TextView(text), split_into_words(text)
    symbol = [not any(map(str.isalnum, word)) for word in words]
    view.__dict__["words"] = Words(
        np.array([hash_text(word) for word in words], np.uint64), np.array([len(word) for word in words], np.int32),
        np.array([LETTERS.search(word) is not None for word in words], bool), np.array(symbol, bool),
        np.arange(len(words)), None)
    return view


def cause(name: str, text: str, theirs: str | None) -> str:
    """Why the two verdicts differ: "words", "sentences", "crash" or "rules"."""
    if theirs is not None and theirs.startswith("raises"):
        return "crash"
    if (OURS[name](with_their_words(text)) is None) == (theirs is None):
        return "words"
    with mock.patch.object(c4, "count_sentences", lambda line: len(split_into_sentences(line))):
        if (OURS[name](TextView(text)) is None) == (theirs is None):
            return "sentences"
    return "rules"


def compare(folder: Path, megabytes: float) -> dict:
    files = sorted(folder.glob("*.jsonl"))
    report: dict = {name: {"documents": 0, "same": 0, "verdicts": Counter(), "causes": Counter(), "disagreements": []}
                    for name in OURS}
    for file in files:
        size = 0
        for line in open(file, encoding="utf-8"):
            record = json.loads(line)
            size += len(record["text"].encode())
            for name, entry in report.items():
                ours, theirs = OURS[name](TextView(record["text"])), their_verdict(name, record["text"])
                entry["documents"] += 1
                entry["same"] += (ours is None) == (theirs is None)
                entry["verdicts"][f"{ours} | {theirs}"] += 1
                if (ours is None) != (theirs is None):
                    why = cause(name, record["text"], theirs)
                    entry["causes"][why] += 1
                    entry["disagreements"].append({
                        "document": f"{file.stem}: {record['id']}", "pellucid": ours, "datatrove": theirs, "cause": why})
            if size >= megabytes * 1e6 / len(files):
                break
    return report


def synthetic() -> dict[str, str]:
    """Texts made to sit on either side of each rule. Plain words only, so that both split them alike."""
    prose = ("The ship went over the open sea and came back with news of an island that nobody had seen before. "
             "People who lived near the harbour listened to the captain and wanted to know what he had found there. "
             "Some of them laughed, others asked questions, and a few began to build boats for the next summer. "
             "It was a long winter. When the ice was gone they left, one after another, and were not heard of again. ")
    words = re.findall(r"[a-z]+", prose.lower())
    texts = {
        "prose": prose, "short": "The end of it.", "empty lines": "\n\n \n", "49 words": " ".join(words[:49]),
        "50 words": " ".join(words[:50]), "short words": " ".join(["to be of it"] * 20), "numbers": prose + "12 " * 60,
        "long words": " ".join(["incomprehensibilities and"] * 30), "no stop words": " ".join(["ship sails fast"] * 20),
        "hashes": "# " * 12 + prose, "ellipses inside": prose.replace(". ", " ... then "),
        "bullets": "\n".join(f"- {part}" for part in prose.split(". ")), "one bullet": f"- {prose}\n{prose}\n{prose}",
        "ellipsis lines": "\n".join(f"{part}..." for part in prose.split(". ")),
        "same line": "\n".join(["The same line comes again and again."] * 6),
        "two same lines of ten": "\n".join(
            [*(f"This is line {word} of them." for word in words[:8]), *["A line comes."] * 2]),
        "same paragraph": "\n\n".join([prose] * 3), "paragraphs": "\n\n".join(prose.split(". ")),
        "top two words": " ".join(f"in the {word}" for word in words[:40]), "refrain": (prose[:95] + " ") * 3 + prose,
        "refrain at the end": prose * 2 + prose[:80], "curly": prose + "A set {a} is given.",
        "lorem": prose + "Lorem ipsum dolor.",
        "javascript": "\n".join([*prose.split(". "), "Please enable Javascript now."]),
        "four sentences": "One is here. Two is here. Three is here. Four is here.",
        "five sentences": "One is here. Two is here. Three is here. Four is here. Five is here.",
        "five lines": "\n".join(f"This is line {word}." for word in words[:5]), "no ends": "\n".join(prose.split(". ")),
        "two words a line": "\n".join(f"See {word}." for word in words[:20]),
        "cookies": "\n".join(["This page uses cookies for all.", *(f"This is line {word}." for word in words[:4])]),
        "list": "\n".join(words[:60]), "short lines": "\n".join(f"The {word}." for word in words[:30]),
        "headings": "\n".join(f"A heading that is long enough, about {word}" for word in words[:20]),
        "headings and a sentence": "\n".join([*(f"A heading that is long enough, on {word}" for word in words[:7]), prose]),
        "table": "\n".join(f"{n} {n * 7} {n * 49}" for n in range(100, 140)),
        "quotes": "\n".join(f'He said "this is {word}"' for word in words[:12]), "cjk": "海は広いな。大きいな。" * 20,
        "spaces": "  ".join(words) + " \t ", "windows": prose.replace(". ", ".\r\n"), "capitals": prose.upper(),
    }
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="?")
    parser.add_argument("--megabytes", type=float, default=3)
    parser.add_argument("--golden", action="store_true")
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("datatrove", "spacy")}
    if arguments.golden:
        cases = [{"name": label, "text": text, "verdicts": {name: their_verdict(name, text) for name in THEIRS}}
                 for label, text in synthetic().items()]
        GOLDEN.write_text(json.dumps({"made_by": "bench/filter_agreement.py --golden", "versions": versions, "cases": cases},
                                     indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for case in cases:
            for name, theirs in case["verdicts"].items():
                ours = OURS[name](TextView(case["text"]))
                if (ours is None) != (theirs is None):
                    print(f"{case['name']}: {name}: {ours} | {theirs} ({cause(name, case['text'], theirs)})")
        return
    report = compare(arguments.corpus, arguments.megabytes)
    RESULTS.write_text(json.dumps({"versions": versions, "filters": report}, indent=1, ensure_ascii=False) + "\n")
    for name, entry in report.items():
        print(f"{name:18s} {entry['same']} of {entry['documents']} the same; causes of the others: {dict(entry['causes'])}")


if __name__ == "__main__":
    main()
