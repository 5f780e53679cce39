"""Picture 2, augment: where synonyms come from. Three readers, one question: what are the senses of a word?

wordnet   a WordNet `dict` folder (Miller 1995; formats: wndb(5WN), cntlist(5WN)); Debian: wordnet-base
mythes    a MyThes thesaurus, th_*.dat (Hunspell's sister format); Debian: mythes-en-us
moby      Moby Thesaurus: per line a head word and its synonyms, separated by commas (Ward 1996); no parts of speech
Parts of speech: n noun, v verb, a adjective, r adverb, "" unknown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pellucid.config import UserError

PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
SENSE_PARTS = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}  # ss_type of a sense key; 5 is a satellite adjective
HOME = {"wordnet": "/usr/share/wordnet", "mythes": "/usr/share/mythes/th_en_US_v2.dat", "moby": "words.txt"}
INSTALL = {"wordnet": "apt-get install wordnet-base", "mythes": "apt-get install mythes-en-us",
           "moby": "download the Moby Thesaurus"}


@dataclass(frozen=True, slots=True)
class Sense:
    """One meaning of a word: its part of speech, its other words, how often it was seen in tagged text (None: unknown)."""

    part: str
    synonyms: tuple[str, ...]
    count: int | None = None


class SynonymSource(Protocol):
    """Answers with the senses of a lower-case word, most frequent first; [] for a word it does not know."""

    fingerprint: str  # sha256 of the files read

    def senses(self, word: str) -> list[Sense]: ...

    def is_inflected(self, word: str) -> bool: ...


def open_source(kind: str, path: str | None = None) -> SynonymSource:
    """Read the lexicon of a kind from a path (None: where Debian puts it). Raises UserError that says how to get it."""
    return _read(kind, path, {"wordnet": WordNet, "mythes": MyThes, "moby": Moby}[kind])


def lexicon_fingerprint(kind: str, path: str | None = None) -> str:
    """The fingerprint of a lexicon without reading it in. Raises UserError as open_source does."""
    return _read(kind, path, _sha256)


def _read(kind: str, path: str | None, reader: Callable[[Path], Any]) -> Any:
    place = Path(path or HOME[kind])
    try:
        return reader(place)
    except OSError:
        raise UserError(f"data.augment: cannot read a {kind} lexicon at {place}; `{INSTALL[kind]}` gives one, or set "
                        "path") from None
    except (ValueError, IndexError):
        raise UserError(f"data.augment: {place} is not in the {kind} format; set path to another") from None


class WordNet:
    """The four index and data files of a `dict` folder, with sense counts from cntlist.rev where present."""

    def __init__(self, folder: Path):
        self.fingerprint = _sha256(folder)
        self._counts = _sense_counts(folder / "cntlist.rev")
        self._index: dict[str, list[tuple[str, list[str]]]] = {}
        self._words: dict[tuple[str, str], tuple[str, ...]] = {}
        self._inflected: set[str] = set()
        for part, name in PARTS.items():
            for fields in _wordnet_lines(folder / f"data.{name}"):
                found = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                self._words[part, fields[0]] = tuple(word.partition("(")[0] for word in found)
            for fields in _wordnet_lines(folder / f"index.{name}"):
                self._index.setdefault(fields[0], []).append((part, fields[-int(fields[2]) :]))
            for fields in _wordnet_lines(folder / f"{name}.exc", optional=True):
                self._inflected.update(fields[:1] if fields[0] not in fields[1:] else [])

    def senses(self, word: str) -> list[Sense]:
        result = []
        for part, offsets in self._index.get(word.replace(" ", "_"), []):
            for number, offset in enumerate(offsets, 1):
                others = tuple(w.replace("_", " ") for w in self._words[part, offset] if w.lower() != word)
                result.append(Sense(part, others, self._counts.get((word, part, number), 0) if self._counts else None))
        return sorted(result, key=lambda sense: -(sense.count or 0))

    def is_inflected(self, word: str) -> bool:
        """Whether the word is an irregular form of another ("found", "better"): WordNet's exception lists."""
        return word in self._inflected


class MyThes:
    """A th_*.dat file: a head line `word|number of senses`, then per sense `(part)|synonym|other (generic term)|...`."""

    def __init__(self, path: Path):
        self.fingerprint = _sha256(path)
        encoding = path.open("rb").readline().decode().strip()
        try:
            lines = path.read_text(encoding=encoding).splitlines()[1:]
        except LookupError:
            raise ValueError(encoding) from None
        self._entries: dict[str, list[str]] = {}
        position = 0
        while position < len(lines):
            head, number = lines[position].rsplit("|", 1)
            self._entries[head] = lines[position + 1 : position + 1 + int(number)]
            position += 1 + int(number)

    def senses(self, word: str) -> list[Sense]:
        result = []
        for line in self._entries.get(word, []):
            part, *synonyms = line.split("|")
            plain = tuple(s for s in synonyms if not s.endswith(")") and s.lower() != word)
            result.append(Sense({"noun": "n", "verb": "v", "adj": "a", "adv": "r"}.get(part.strip("()"), ""), plain))
        return result

    def is_inflected(self, word: str) -> bool:
        return False


class Moby:
    """words.txt or .csv: one sense per word, without part of speech or frequency. Broad and noisy."""

    def __init__(self, path: Path):
        self.fingerprint = _sha256(path)
        self._entries = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            head, *synonyms = (field.strip().strip('"') for field in line.split(","))
            if synonyms:
                self._entries[head.lower()] = tuple(synonyms)
        if not self._entries:
            raise ValueError(path)

    def senses(self, word: str) -> list[Sense]:
        return [Sense("", self._entries[word])] if word in self._entries else []

    def is_inflected(self, word: str) -> bool:
        return False


def _wordnet_lines(path: Path, optional: bool = False) -> Iterator[list[str]]:
    """Fields of every line but the licence's (which start with two spaces)."""
    if optional and not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("  ") and line.strip():
                yield line.partition(" | ")[0].split()


def _sense_counts(path: Path) -> dict[tuple[str, str, int], int]:
    counts: dict[tuple[str, str, int], int] = {}
    for key, number, count in _wordnet_lines(path, optional=True):
        lemma, _, rest = key.partition("%")
        name = lemma, SENSE_PARTS[rest[0]], int(number)
        counts[name] = counts.get(name, 0) + int(count)
    return counts


def _sha256(place: Path) -> str:
    """Of a file, or of all that is read of a WordNet folder."""
    names = [f"{kind}.{part}" for part in PARTS.values() for kind in ("data", "index")]
    names += [*(f"{part}.exc" for part in PARTS.values()), "cntlist.rev"]
    digest = hashlib.sha256()
    for file in (place / name for name in names) if place.is_dir() else [place]:
        if file == place or file.suffix not in (".exc", ".rev") or file.exists():
            digest.update(file.read_bytes())
    return digest.hexdigest()
