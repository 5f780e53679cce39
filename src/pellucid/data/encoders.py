"""Picture 2, tokenize: faster libraries that stand in for a tokenizer's own engine, where they give its very ids.

The engine (tokenizer.py) is the definition. A library is tried only on files whose rules it is known to follow, and
taken only if it gives the engine's ids for probe texts made of that vocabulary; a text of a kind in which it is known
to differ goes to the engine. So which libraries are installed changes the speed, never a token.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pellucid.data.sentencepiece_json import PROBES, reserved_names, sentencepiece_without_split

if TYPE_CHECKING:
    from pellucid.data.tokenizer import Engine

Batch = Callable[[list[str]], list[np.ndarray]]
NOT_THIS_FILE = "refused: it is not known to follow this file's rules"
CHARACTERS = "  \n\n\t\r0123aeinst'´ÄßœЖ你の한\u0301\u200d\u2028\u2581\ufeff\x00\x1c\x85😀👩\U0010ffff<|[_-.,"


@dataclass
class Encoder:
    """Encodes batches of texts: by `batch`, but by `reference` where a text holds one of the strings in `leave`."""

    name: str
    batch: Batch
    reference: Batch
    leave: Sequence[str] = ()

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """uint32 ids of each text."""
        left = [n for n, text in enumerate(texts) if any(mark in text for mark in self.leave)]
        if not left:
            return self.batch(texts)
        apart = dict(zip(left, self.reference([texts[n] for n in left]), strict=True))
        others = iter(self.batch([text for n, text in enumerate(texts) if n not in apart]))
        return [apart[n] if n in apart else next(others) for n in range(len(texts))]


@dataclass
class Choice:
    """The encoder that was chosen (the engine itself, as "reference", where no other will do) and why others were not."""

    encoder: Encoder
    refused: dict[str, str] = field(default_factory=dict)


def choose_encoder(engine: Engine, wanted: str = "auto") -> Choice:
    """The fastest installed library that gives the ids of `engine`; with a name in `wanted`, only that one is tried."""
    choice = Choice(Encoder("reference", lambda texts: as_arrays(engine.encode_batch(texts)), _nothing))
    for name, make in CANDIDATES[engine.file_name].items():
        if wanted not in ("auto", name):
            continue
        try:
            encoder = make(engine, choice.encoder.batch)
            problem = NOT_THIS_FILE if encoder is None else _difference(encoder, engine)
        except ImportError:
            problem = "not installed; pip install 'pellucid[fast]'"
        except Exception as error:  # each library raises its own kinds over a file it does not know
            problem = f"refused: {(str(error) or type(error).__name__).splitlines()[0][:160]}"
        if problem is None:
            choice.encoder = encoder
            break
        choice.refused[name] = problem
    return choice


def as_arrays(ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(item, dtype=np.uint32) for item in ids]


def _nothing(texts: list[str]) -> list[np.ndarray]:
    raise AssertionError("the reference leaves no text")


def _difference(encoder: Encoder, engine: Engine) -> str | None:
    """What is wrong with an encoder, or None."""
    texts = probe_texts(engine)
    for text, ours, theirs in zip(texts, engine.encode_batch(texts), encoder(texts), strict=True):
        if ours != theirs.tolist():
            return f"refused: other ids for {text[:40]!r}"
    return None


def probe_texts(engine: Engine) -> list[str]:
    """Texts to try an encoder on: fixed ones, pieces of the vocabulary one after another, random characters."""
    rng = random.Random(0)
    names = [bytes(item).decode("utf-8", "replace") for item in engine.table()]
    special = [engine.name(n) for n in range(min(8, engine.size))]
    texts = [*PROBES, "".join(special), " ".join(special), "\n".join(special)]
    texts += ["".join(rng.choices(names, k=30)) for _ in range(100)] + [" ".join(rng.choices(names, k=20)) for _ in range(50)]
    return texts + ["".join(rng.choices(CHARACTERS, k=rng.randrange(40))) for _ in range(300)]


# ----------------------------------------------------------------------------------------- the libraries


def _gigatoken(content: bytes) -> Batch:
    import gigatoken

    backend = gigatoken.gigatoken_rs.load_hf_json(content)

    def batch(texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        rows = backend.encode_batch([text.encode() for text in texts], parallel=True).layout
        ids = np.asarray(rows.content.data)
        return [ids[start:end] for start, end in itertools.pairwise(rows.offsets.data)]

    return batch


def _gigatoken_sentencepiece(engine: Engine, reference: Batch) -> Encoder | None:
    converted = sentencepiece_without_split(engine.content)
    if converted is None:
        return None
    content, leave = converted
    return Encoder("gigatoken", _gigatoken(content), reference, leave)


def _kitoken(engine: Engine, reference: Batch) -> Encoder:
    import kitoken

    backend = kitoken.Kitoken.from_sentencepiece(engine.content)
    return Encoder("kitoken", lambda texts: as_arrays(backend.encode_all(texts)), reference, reserved_names(engine.content))


def _byte_level(content: bytes) -> bytes | None:
    """A plain byte-level BPE without its special tokens, which are ordinary text in a text; None for other files."""
    settings = json.loads(content)
    model, pre_tokenizer = settings["model"], json.dumps(settings.get("pre_tokenizer"))
    plain = (model.get("type") == "BPE" and "ByteLevel" in pre_tokenizer and not settings.get("normalizer")
             and not model.get("dropout") and not model.get("byte_fallback") and model.get("merges")
             and all(token["special"] for token in settings.get("added_tokens") or []))
    return json.dumps(settings | {"added_tokens": [], "post_processor": None}).encode() if plain else None


def _splintr(engine: Engine, reference: Batch) -> Encoder | None:
    import splintr

    content = _byte_level(engine.content)
    if content is None:
        return None
    backend = splintr.from_json_bytes(content)

    def batch(texts: list[str]) -> list[np.ndarray]:
        flat, offsets = backend.encode_batch_flat(texts)
        ids, ends = np.frombuffer(flat, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        return [ids[start:end] for start, end in itertools.pairwise(ends)]

    return Encoder("splintr", batch, reference)


def _gigatoken_byte_level(engine: Engine, reference: Batch) -> Encoder | None:
    content = _byte_level(engine.content)
    return None if content is None else Encoder("gigatoken", _gigatoken(content), reference)


CANDIDATES: dict[str, dict[str, Callable[[Engine, Batch], Encoder | None]]] = {  # the fastest first
    "tokenizer.model": {"gigatoken": _gigatoken_sentencepiece, "kitoken": _kitoken},
    "tokenizer.json": {"splintr": _splintr, "gigatoken": _gigatoken_byte_level},
}
