"""Picture 2: the stages that a configuration asks for, in the order in which they are applied.

    documents -> build_stages (one at a time) -> corpus_passes (all seen first) -> split -> held_out_passes -> tokenizer

Cheap filters come before dear ones; what is kept does not depend on that, only the reasons counted do. `build.py`
puts every document through `build_stages`, then lets the corpus passes `refine` what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pellucid.config import DataConfig
from pellucid.data.document import Document, Dropped, Stage
from pellucid.data.splitting import Splitter
from pellucid.data.stages import decontaminate, normalize
from pellucid.data.stages.c4 import c4
from pellucid.data.stages.corpus import CorpusPass, Deduplicate
from pellucid.data.stages.expression import compile_expression
from pellucid.data.stages.language import identifier, language
from pellucid.data.stages.outcome import Outcome
from pellucid.data.stages.quality import fineweb, gopher_quality, length
from pellucid.data.stages.repeats import CutRepeats
from pellucid.data.stages.repetition import gopher_repetition
from pellucid.data.stages.textview import TextView, view

FILTERS: dict[str, Callable[[TextView, Any], str | None]] = {
    "length": length, "language": language, "gopher_quality": gopher_quality, "gopher_repetition": gopher_repetition,
}
AFTER_C4: dict[str, Callable[[TextView, Any], str | None]] = {"fineweb": fineweb}
VERSION = 1


def build_stages(config: DataConfig) -> list[Stage]:
    """The stages that judge one document at a time: normalize, then the filters that are on, then decontaminate.

    Raises UserError where a rule is no rule, a benchmark is missing, or a package is not installed.
    """
    normalize.check(config.normalize)
    stages = [_stage("normalize", normalize.VERSION, config.normalize.model_dump(mode="json"),
                     lambda text: normalize.normalize_text(text, config.normalize))]
    filters = config.filter
    if filters.language is not None:
        identifier()
    for name, judge in FILTERS.items():
        stages += _filter(name, judge, getattr(filters, name))
    if filters.c4 is not None:
        stages.append(_stage("c4", VERSION, filters.c4.model_dump(mode="json"), lambda text: c4(view(text), filters.c4)))
    for name, judge in AFTER_C4.items():
        stages += _filter(name, judge, getattr(filters, name))
    if filters.expression is not None:
        judge = compile_expression(filters.expression)
        stages.append(_stage("expression", VERSION, {"keep": filters.expression},
                             lambda text: _outcome(text, judge(view(text)))))
    if config.decontaminate.against:
        stages.append(_benchmarks(config))
    return stages


def corpus_passes(config: DataConfig, folder: Path) -> list[CorpusPass]:
    """The passes over all documents, in order; temporary files lie in `folder`. See corpus.run_pass."""
    wanted = config.deduplicate
    passes: list[CorpusPass] = [Deduplicate(wanted, folder)] if wanted.exact or wanted.near else []
    return [*passes, CutRepeats(wanted, folder)] if wanted.substring_words else passes


def held_out_passes(config: DataConfig, folder: Path, splitter: Splitter) -> list[CorpusPass]:
    """The passes that need to know which documents are held out: after the split is settled."""
    if not config.decontaminate.held_out:
        return []
    is_held_out = lambda document, content_hash: splitter.split_of(document, content_hash) == "validation"
    return [decontaminate.HeldOut(config.decontaminate, folder, is_held_out)]


def pass_versions(config: DataConfig) -> list[tuple[str, int]]:
    """(name, version) of the passes of both kinds that are on."""
    wanted = {Deduplicate: config.deduplicate.exact or config.deduplicate.near, CutRepeats: config.deduplicate.substring_words,
              decontaminate.HeldOut: config.decontaminate.held_out}
    return [(kind.name, kind.version) for kind, on in wanted.items() if on]


def _filter(name: str, judge: Callable[[TextView, Any], str | None], limits: Any) -> list[Stage]:
    if limits is None:
        return []
    return [_stage(name, VERSION, limits.model_dump(mode="json"), lambda text: _outcome(text, judge(view(text), limits)))]


def _benchmarks(config: DataConfig) -> Stage:
    wanted = config.decontaminate
    known, facts = decontaminate.read_benchmarks(wanted)

    def judge(text: str) -> Outcome:
        shared = decontaminate.overlap(view(text), known, wanted.ngram) > wanted.max_overlap
        return _outcome(text, "shares text with a benchmark" if shared else None)

    settings = {**wanted.model_dump(mode="json", exclude={"held_out"}), **facts}
    return _stage("decontaminate benchmarks", decontaminate.VERSION, settings, judge)


def _outcome(text: str, reason: str | None) -> Outcome:
    return Outcome(text, None) if reason is None else Outcome(None, reason)


def _stage(name: str, version: int, settings: dict[str, Any], judge: Callable[[str], Outcome]) -> Stage:
    def apply(document: Document) -> Document | Dropped:
        text, reason = judge(document.text)
        if text is None:
            return Dropped(reason)
        return document if text == document.text else replace(document, text=text, exact=False)

    return Stage(name, version, settings, apply)
