"""Picture 2, augment: the augmenters of `data.augment` applied to documents, one version per document and epoch.

A document's version depends on (seed, its content hash, epoch, the augmenters), and on nothing else: not on the
other documents, their order, or who works on them. What changes lengths happens here, before packing; what keeps
them (token_masking) happens in the loader. The held-out split never comes here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid.config import (
    BackTranslationConfig,
    BpeDropoutConfig,
    DataConfig,
    FillInTheMiddleConfig,
    NoiseConfig,
    SpanMaskingConfig,
    SynonymsConfig,
    TokenMaskingConfig,
)
from pellucid.data.augment import noise
from pellucid.data.augment.back_translation import BackTranslation, Gates
from pellucid.data.augment.bpe_dropout import BpeDropout, spelled_otherwise
from pellucid.data.augment.lexicons import open_source
from pellucid.data.augment.neural_translators import CTranslate2Translator, TransformersTranslator
from pellucid.data.augment.outcome import Augmenter, Outcome
from pellucid.data.augment.rearrange import fill_in_the_middle, span_masking
from pellucid.data.augment.seeding import generator, stream_key
from pellucid.data.augment.synonyms import Insertion, Lookup, Synonyms
from pellucid.data.augment.translation_cache import CachedTranslator
from pellucid.data.augment.translators import HttpTranslator, Translator, open_apertium
from pellucid.data.tokenizer import Tokenizer

NOISES = {"random_swap": noise.swap, "random_deletion": noise.deletion, "spelling": noise.spelling,
          "keyboard": noise.keyboard, "characters": noise.characters}


@dataclass(frozen=True)
class Augmented:
    """One version of a document: its text, ids if the tokenizer itself was varied, and how it came about."""

    text: str
    parent: str  # content hash of the document it was made from, hex
    epoch: int
    seed: int
    steps: tuple[dict[str, Any], ...]  # per augmenter that changed it: name, settings, changed (units)
    token_ids: list[int] | None = None

    @property
    def record(self) -> str:
        """The JSON that the shards keep: enough to make the version again from its parent."""
        return json.dumps({"epoch": self.epoch, "seed": self.seed, "steps": self.steps})


@dataclass
class Step:
    """One entry of data.augment, ready to run. `name` is unique: a second entry of a kind is called kind#2."""

    name: str
    settings: dict[str, Any]
    documents: float
    run: Augmenter | None  # None: bpe_dropout, which varies the ids
    fingerprint: str = ""
    rearranges: bool = False
    rejected: dict[str, int] = field(default_factory=dict)
    changed: int = 0


class Augmentation:
    """All entries of a configuration. Raises UserError when a lexicon or an engine they need is missing.

    `versions(documents, epoch, tokenizer)` takes (document id, text) pairs. `describe()` counts what happened so far.
    """

    def __init__(self, config: DataConfig):
        self.seed = config.augment_seed
        self._caches: list[CachedTranslator] = []
        self._lookups: dict[tuple, Lookup] = {}
        self.steps: list[Step] = []
        self.dropout: Step | None = None
        names: dict[str, int] = {}
        for entry in sorted(config.augment, key=_rearranges):
            names[entry.name] = names.get(entry.name, 0) + 1
            if isinstance(entry, BpeDropoutConfig):
                self.dropout = Step(entry.name, entry.model_dump(mode="json"), entry.documents, None)  # last, whatever its place
            elif not isinstance(entry, TokenMaskingConfig):
                name = entry.name if names[entry.name] == 1 else f"{entry.name}#{names[entry.name]}"
                run, fingerprint = self._make(entry, Path(config.directory))
                documents = getattr(entry, "documents", 1.0)
                self.steps.append(Step(name, entry.model_dump(mode="json"), documents, run, fingerprint, _rearranges(entry)))
        self._encoders: dict[str, BpeDropout] = {}

    def versions(self, documents: Sequence[tuple[str, str]], epoch: int, tokenizer: Tokenizer | None = None,
                 ) -> list[Augmented]:
        """The version of each (document id, text) for an epoch (1, 2, ...), in order.

        With a tokenizer, and bpe_dropout configured, also the ids. A version equal to its document has no steps.
        """
        texts = [text for _, text in documents]
        done: list[list[dict[str, Any]]] = [[] for _ in documents]
        rearranged: set[int] = set()
        for step in self.steps:
            streams = [generator(stream_key(self.seed, name, epoch, step.name)) for name, _ in documents]
            mine = [n for n, stream in enumerate(streams) if stream.random() < step.documents]
            outcomes = _run(step.run, [texts[n] for n in mine], [streams[n] for n in mine])
            for n, outcome in zip(mine, outcomes, strict=True):
                if step.rearranges and outcome.text != texts[n]:
                    if n in rearranged:
                        outcome = Outcome(texts[n], 0, {"rearranged already": 1})
                    rearranged.add(n)
                for reason, count in outcome.rejected.items():
                    step.rejected[reason] = step.rejected.get(reason, 0) + count
                if outcome.text not in (texts[n], ""):  # of an empty version there is nothing to learn
                    texts[n], step.changed = outcome.text, step.changed + outcome.changed
                    done[n].append({"name": step.name, "settings": step.settings, "changed": outcome.changed})
        return [self._version(name, text, epoch, steps, tokenizer)
                for (name, _), text, steps in zip(documents, texts, done, strict=True)]

    def _version(self, document: str, text: str, epoch: int, steps: list[dict[str, Any]],
                 tokenizer: Tokenizer | None) -> Augmented:
        ids = None
        if self.dropout is not None and tokenizer is not None:
            stream = generator(stream_key(self.seed, document, epoch, "bpe_dropout"))
            if stream.random() < self.dropout.documents:
                settings = self.dropout.settings
                encoder = self._encoders.get(tokenizer.fingerprint) or BpeDropout(tokenizer, settings["rate"])
                self._encoders[tokenizer.fingerprint] = encoder
                varied = encoder.encode(text, stream)
                if changed := spelled_otherwise(varied, tokenizer.encode(text), tokenizer):
                    ids, self.dropout.changed = varied, self.dropout.changed + changed
                    steps = [*steps, {"name": "bpe_dropout", "settings": settings, "changed": changed}]
        return Augmented(text, document, epoch, self.seed, tuple(steps), ids)

    def describe(self) -> list[dict[str, Any]]:
        """Per entry: settings, the data it stands on, units changed, and changes refused by reason."""
        return [{"name": step.name, "settings": step.settings, "fingerprint": step.fingerprint, "changed": step.changed,
                 "rejected": dict(sorted(step.rejected.items()))} for step in self._all]

    @property
    def _all(self) -> list[Step]:
        return [*self.steps, self.dropout] if self.dropout else self.steps

    def forget(self) -> None:
        """Start counting anew."""
        for step in self._all:
            step.changed, step.rejected = 0, {}

    def close(self) -> None:
        for cache in self._caches:
            cache.close()

    def _make(self, entry: Any, directory: Path) -> tuple[Augmenter, str]:
        if isinstance(entry, SynonymsConfig):
            lookup = self._lookup(entry)
            make = Synonyms if entry.name == "synonyms" else Insertion
            return make(lookup, entry.rate), lookup.source.fingerprint
        if isinstance(entry, NoiseConfig):
            return lambda text, rng: NOISES[entry.name](text, rng, entry.rate), ""
        if isinstance(entry, FillInTheMiddleConfig):
            return lambda text, rng: fill_in_the_middle(text, rng, entry.rate, entry.spm, entry.sentinels), ""
        if isinstance(entry, SpanMaskingConfig):
            return lambda text, rng: span_masking(text, rng, entry.rate, entry.mean_length, entry.sentinel), ""
        translator = CachedTranslator(open_translator(entry), directory / "translations.sqlite")
        self._caches.append(translator)
        gates = Gates(entry.chrf_low, entry.chrf_high, entry.length_ratio)
        return BackTranslation(translator, entry.language, entry.pivot, entry.rate, gates), translator.fingerprint

    def _lookup(self, entry: SynonymsConfig) -> Lookup:
        key = entry.source, entry.path, entry.dominance
        if key not in self._lookups:
            self._lookups[key] = Lookup(open_source(entry.source, entry.path), entry.dominance)
        return self._lookups[key]


def open_translator(entry: BackTranslationConfig) -> Translator:
    """The engine of a back_translation entry. Raises UserError where it is not installed."""
    if entry.engine == "http":
        return HttpTranslator(entry.url)
    if entry.engine == "apertium":
        return open_apertium(entry.language, entry.pivot)
    make = TransformersTranslator if entry.engine == "transformers" else CTranslate2Translator
    return make(entry.models, sampling=entry.sampling, beams=entry.beams, device=entry.device)


def _rearranges(entry: Any) -> bool:
    """Whether an entry puts sentinels into the text: those come last, for the others would change them."""
    return isinstance(entry, FillInTheMiddleConfig | SpanMaskingConfig)


def _run(augmenter: Augmenter, texts: list[str], streams: list) -> list[Outcome]:
    batch = getattr(augmenter, "batch", None)
    if batch is not None:
        return batch(texts, streams)
    return [augmenter(text, stream) for text, stream in zip(texts, streams, strict=True)]
