"""A SentencePiece BPE model as a tokenizer.json that gives the same ids (the stock converters do not).

The recipe: every piece yields a merge for each split into two pieces, ranked by the piece's score, then id;
spaces become U+2581 with one in front; user-defined symbols are cut out first, longest first, leaving out those
with a raw space (the text has none once escaped, so they never match). A word that is a piece is taken whole, so the
name of a control piece, as text alone between two such symbols ("\\n[PAD]\\n"), is cut where SentencePiece would.
Checked on probes before it is given out.
Format: sentencepiece_model.proto of github.com/google/sentencepiece (wire format of protocol buffers).
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

import sentencepiece
import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE_MODEL = 2
MARK = "\u2581"
PROBES = (
    "", " ", "  leading and   inner    spaces ", "def f(x):\n\treturn x ** 2  # 1234567890\n\n\n\t\t\tpass\n",
    "The quick brown fox; naïve café — “quotes” … 你好，世界 мир दुनिया 😀👩‍👩‍👧 e\u0301", "\x00\x7f\r\n\u2028\ufeff\u2581x",
    "<s></s>[PAD] <0x41> <|separator|> <|mask|>x", "\n" * 23 + "\t" * 17 + " " * 33 + "0.1e-7,000",
    "https://example.org/a_b?c=%20&d#e {\"k\": [1, 2]} CamelCaseIdentifier SHOUTING aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


def sentencepiece_to_json(model: bytes, added: dict[int, str] | None = None) -> bytes | None:
    """The tokenizer.json of a tokenizer.model; `added` names special ids to append.

    None where it would not be exact: not BPE, no byte fallback, a normalizer, or a probe that comes out differently.
    """
    pieces = _plain_pieces(model)
    if pieces is None:
        return None
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    symbols = [name for name, _, kind in pieces if kind == USER_DEFINED and " " not in name]
    alone = [f"{symbol}{name}{symbol}" for symbol in symbols[:1] for name in reserved_names(model)]
    first = [reference.encode(text, out_type=str)[2] for text in alone]
    cuts = {name: piece if name.startswith(piece) else name[0]  # where it is spelled in bytes
            for name, piece in zip(reserved_names(model), first, strict=False)}
    result = json.dumps(_document(pieces, added or {}, cuts), ensure_ascii=False).encode()
    converted = tokenizers.Tokenizer.from_buffer(result)
    converted.encode_special_tokens = True
    if any(converted.encode(text, add_special_tokens=False).ids != reference.encode(text) for text in (*PROBES, *alone)):
        return None
    return result


def sentencepiece_without_split(model: bytes) -> tuple[bytes, list[str]] | None:
    """The same as a tokenizer.json without a pre-tokenizer, and strings that mark the texts it is not good for.

    For a library that splits by no pattern of ours. Runs of one character ("\\n" to ten of them) become merges that
    come before all others, which is exact up to the longest run; a text with a longer one, or with another
    user-defined symbol, is for the reference. None where sentencepiece_to_json gives none.
    """
    pieces = _plain_pieces(model)
    symbols = [name for name, _, kind in pieces or () if kind == USER_DEFINED and " " not in name]
    if pieces is None or any(MARK in name for name in symbols):
        return None
    inside = set("".join(name for name, _, kind in pieces if kind == NORMAL))
    runs = {name: max(len(other) for other in symbols if set(other) == {name}) for name in symbols if len(name) == 1}
    runs = {name: most for name, most in runs.items()
            if name not in inside and all(name * n in symbols for n in range(1, most + 1))}
    document = _document(pieces, {}, {})
    document |= {"added_tokens": [], "pre_tokenizer": None}
    document["model"]["ignore_merges"] = False
    document["model"]["merges"] = [[name * n, name * (total - n)] for name, most in runs.items()
                                   for total in range(2, most + 1) for n in range(1, total)] + document["model"]["merges"]
    others = [name for name in symbols if name[0] not in runs or len(set(name)) > 1]
    shared = os.path.commonprefix(others)  # noqa: RUF071  of characters, as it is: "<|" is one search for all of them
    others = [shared] if len(shared) > 1 else others
    return json.dumps(document, ensure_ascii=False).encode(), [*others, *(name * (n + 1) for name, n in runs.items() if n > 1)]


def reserved_names(model: bytes) -> list[str]:
    """The names of control and unknown pieces, which are ordinary text where a text holds them."""
    return [name for name, _, kind in _parse(model)[0] if kind in (CONTROL, UNKNOWN)]


def _plain_pieces(model: bytes) -> list[tuple[str, float, int]] | None:
    """The pieces of a model whose rules the conversion knows, else None."""
    pieces, trainer, normalizer = _parse(model)
    plain = trainer.get(3) == BPE_MODEL and trainer.get(35) and not trainer.get(24)  # type, byte_fallback, suffix marks
    escaped = normalizer.get(3, 1) and not normalizer.get(4, 1) and normalizer.get(5, 1) and not normalizer.get(2)
    return pieces if plain and escaped and all(kind != UNUSED for _, _, kind in pieces) else None


def _document(pieces: list[tuple[str, float, int]], added: dict[int, str], cuts: dict[str, str]) -> dict[str, Any]:
    """`cuts`: the first piece of each reserved name where it is text."""
    special = {n: name for n, (name, _, kind) in enumerate(pieces) if kind in (CONTROL, UNKNOWN)} | added
    symbols = sorted((name for name, _, kind in pieces if kind == USER_DEFINED and " " not in name), key=len, reverse=True)
    any_symbol = "|".join(_escape(name) for name in symbols)
    lone = [f"(?<={any_symbol}){_escape(first)}(?={_escape(name.removeprefix(first))}(?:{any_symbol}|\\z))"
            for name, first in cuts.items()]
    split = {"type": "Split", "pattern": {"Regex": "|".join([any_symbol, *lone])}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": n, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for n, name in sorted(special.items())],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": MARK}, {"type": "Replace", "pattern": {"String": " "}, "content": MARK}]},
        "pre_tokenizer": split if symbols else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": True,
                  "vocab": {name: n for n, (name, _, _) in enumerate(pieces)}, "merges": _merges(pieces)},
    }


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    ids = {name: n for n, (name, _, kind) in enumerate(pieces) if kind == NORMAL}
    ranked = []
    for name, n in ids.items():
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[n][1], n, ids[left], ids[right]))
    return [[pieces[left][0], pieces[right][0]] for _, _, left, right in sorted(ranked)]


def _escape(name: str) -> str:
    return re.sub(r"([\\^$.|?*+()\[\]{}\-/#&~])", r"\\\1", name)


def _parse(model: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """Pieces (name, score, kind), trainer_spec and normalizer_spec of a ModelProto."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, b"\0" * 4))[0], piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return pieces, trainer, normalizer


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: integers, or raw bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
