"""Picture 2, tokenize: text to token ids and back, the same for tokenizers trained here and brought along.

Two engines define it: Hugging Face `tokenizers` (tokenizer.json) and SentencePiece (tokenizer.model); both are run so
that text never becomes a special token, whatever it says. For much text a faster library that gives the same ids
stands in (encoders.py). Tokenizers trained here (tokenizer_training.py) reserve pad 0, bos 1, eos 2, unk 3. One brought
along that lacks pad or eos gets them as new ids at the end of its vocabulary (pad must not be another token: the
model is blind to pad); one that lacks bos uses its eos.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from pellucid.config import UserError
from pellucid.data.encoders import Choice, as_arrays, choose_encoder
from pellucid.data.sentencepiece_json import sentencepiece_to_json

RESERVED = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3
KNOWN_NAMES = {  # of special tokens in tokenizers that do not say which is which
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "[EOS]", "<|eos|>", "<|end_of_text|>", "<|endoftext|>"),
}
SURROGATE = "a text to tokenize is not valid Unicode (it holds half of a surrogate pair)"


class Engine(Protocol):
    """What a Tokenizer needs of the library that does the work."""

    file_name: str  # tokenizer.json or tokenizer.model
    content: bytes  # of that file
    size: int  # ids, appended ones not counted
    patience: int  # bytes of text it encodes itself before loading something faster pays

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...
    def special(self, role: str, names: dict[str, Any]) -> int | None: ...
    def name(self, token_id: int) -> str: ...
    def to_json(self, added: dict[int, str]) -> bytes | None: ...  # the same as a tokenizer.json, if it is none yet
    def table(self) -> list[bytes]: ...  # what each id adds to a text


class Tokenizer:
    """Text to ids and back. `vocab_size` counts every id; `fingerprint` is the sha256 of model file and special ids.

    `decode(encode(text)) == text` for every valid Unicode string with kinds bpe, bytes and characters; with
    SentencePiece except that U+2581 (its mark for a space) comes back as a space.
    """

    def __init__(self, engine: Engine, names: dict[str, Any] | None = None):
        names = names or {}
        self.engine = engine
        self.vocab_size = engine.size
        eos, pad = engine.special("eos", names), engine.special("pad", names)
        self.eos_token_id = self._append() if eos is None else eos
        self.pad_token_id = self._append() if pad is None or pad == self.eos_token_id else pad
        bos = engine.special("bos", names)
        self.bos_token_id = self.eos_token_id if bos is None else bos
        self.trained_by: str | None = None  # the library that made it; it does not change what was made
        self._encoded, self._choice = 0, None

    def _append(self) -> int:
        self.vocab_size += 1
        return self.vocab_size - 1

    @cached_property
    def fingerprint(self) -> str:
        ids = [self.vocab_size, self.pad_token_id, self.bos_token_id, self.eos_token_id]
        return hashlib.sha256(self.engine.content + json.dumps(ids).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos. Raises UserError for half of a surrogate pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; faster than one at a time (both engines use all processors)."""
        try:
            return self.engine.encode_batch(list(texts))
        except (UnicodeEncodeError, TypeError):
            raise UserError(SURROGATE) from None

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same ids, uint32, for much text: once a tokenizer was given enough, by the fastest library that is exact."""
        texts = list(texts)
        if self._choice is None:
            self._encoded += sum(map(len, texts))
            if self._encoded < self.engine.patience:
                return as_arrays(self.encode_batch(texts))
            self.use_encoder()
        try:
            return self._choice.encoder(texts)
        except (UnicodeEncodeError, TypeError):
            raise UserError(SURROGATE) from None

    def use_encoder(self, name: str = "auto") -> Choice:
        """Choose the library behind encode_arrays now: "gigatoken", "kitoken", "splintr", "reference" (the engine itself)
        or "auto", the first that will do. Raises UserError where the named one is absent or not exact."""
        self._choice = choose_encoder(self.engine, name)
        if name not in ("auto", self._choice.encoder.name):
            reason = self._choice.refused.get(name, f"cannot run a {self.engine.file_name}")
            raise UserError(f"data.tokenizer.encoder = '{name}': {reason}; leave the setting out to have one chosen")
        return self._choice

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give none, bytes that form no character give U+FFFD."""
        special = {self.pad_token_id, self.bos_token_id, self.eos_token_id}
        return self.engine.decode([int(i) for i in ids if int(i) not in special and 0 <= int(i) < self.engine.size])

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token adds to a text; b"" for special tokens. May be part of a character."""
        return self._table[token_id]

    @cached_property
    def _table(self) -> list[bytes]:
        table = self.engine.table() + [b""] * (self.vocab_size - self.engine.size)
        for special in (self.pad_token_id, self.bos_token_id, self.eos_token_id):
            table[special] = b""
        return table

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 [V]: the length of token_bytes of every id, for bits per byte: a document and its eos sum to the bytes of its text.

        So eos takes back (-1) the space that SentencePiece puts before each text.
        """
        lengths = np.array([len(item) for item in self._table], dtype=np.int64)
        lengths[self.eos_token_id] -= sum(self._table[i].count(b" ") for i in self.encode("x"))
        return lengths

    def save(self, folder: str | Path, *, convert: bool = True) -> None:
        """Write the model file and tokenizer_config.json, as Hugging Face's AutoTokenizer reads them.

        A tokenizer.model gets a tokenizer.json of the same ids beside it where there is an exact one (`convert`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.engine.file_name).write_bytes(self.engine.content)
        added = {i: self._name(i) for i in range(self.engine.size, self.vocab_size)}
        converted = self.engine.to_json(added) if convert else None
        if converted:
            (folder / "tokenizer.json").write_bytes(converted)
        fast = converted or self.engine.file_name == "tokenizer.json"
        special = {role: getattr(self, f"{role}_token_id") for role in ("pad", "bos", "eos")}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
            "split_special_tokens": True, "clean_up_tokenization_spaces": False,
            "add_bos_token": False, "add_eos_token": False, "vocab_size": self.vocab_size,
            **{f"{role}_token": self._name(i) for role, i in special.items()},
            **{f"{role}_token_id": i for role, i in special.items()},
            "added_tokens_decoder": {str(i): {
                "content": self._name(i), "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                "single_word": False} for i in sorted(set(special.values()))},
        }
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _name(self, token_id: int) -> str:
        if token_id < self.engine.size:
            return self.engine.name(token_id)
        return "<pad>" if token_id == self.pad_token_id else "<eos>"


class HuggingFaceEngine:
    """A tokenizer.json, run by the `tokenizers` library."""

    file_name, patience = "tokenizer.json", 1 << 21

    def __init__(self, content: bytes):
        self.content = content
        self._backend = tokenizers.Tokenizer.from_buffer(content)
        without = _without_special_names(content)
        self._reader = self._backend if without is content else tokenizers.Tokenizer.from_buffer(without)
        self._reader.encode_special_tokens = True  # "<eos>" in a text is five characters
        self._reader.no_padding()
        self._reader.no_truncation()
        self._vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.size = max(self._vocabulary.values(), default=-1) + 1
        if self.size == 0:
            raise ValueError("it has no tokens")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self._reader.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def name(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id)

    def to_json(self, added: dict[int, str]) -> bytes | None:
        return None

    def special(self, role: str, names: dict[str, Any]) -> int | None:
        if names.get(f"{role}_token_id", -1) >= self.size:
            return None  # it was appended once before
        for name in (names.get(f"{role}_token"), *KNOWN_NAMES[role]):
            if name in self._vocabulary:
                return self._vocabulary[name]
        return None

    def table(self) -> list[bytes]:
        settings = json.loads(self.content)
        kinds = set(re.findall(r'"type": ?"(\w+)"', json.dumps([settings.get("decoder"), settings.get("pre_tokenizer")])))
        added = {entry["id"]: entry for entry in settings.get("added_tokens") or []}
        table = [b""] * self.size
        for name, token_id in self._vocabulary.items():
            if token_id in added:
                table[token_id] = b"" if added[token_id]["special"] else name.encode()
            elif "ByteLevel" in kinds:
                table[token_id] = b"".join(BYTE_OF.get(char, char.encode()) for char in name)
            else:
                table[token_id] = _piece_bytes(name, spaces=bool(kinds & {"Metaspace", "Replace"}))
        return table


class SentencePieceEngine:
    """A tokenizer.model, run by the SentencePiece library: the reference for Grok-1's own."""

    file_name, patience = "tokenizer.model", 1 << 24

    def __init__(self, content: bytes):
        self.content = content
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:  # its words are of a place in its own source
            raise ValueError("not what SentencePiece writes") from None
        self.size = self._backend.get_piece_size()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode([text.encode() for text in texts])

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids)

    def name(self, token_id: int) -> str:
        return self._backend.id_to_piece(token_id)

    def to_json(self, added: dict[int, str]) -> bytes | None:
        return sentencepiece_to_json(self.content, added)

    def special(self, role: str, names: dict[str, Any]) -> int | None:
        token_id = getattr(self._backend, f"{role}_id")()
        return token_id if token_id >= 0 else None

    def table(self) -> list[bytes]:
        model = self._backend
        return [b"" if model.is_control(i) or model.is_unknown(i) else _piece_bytes(model.id_to_piece(i), spaces=True)
                for i in range(self.size)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read tokenizer.model or tokenizer.json, or a folder with either (the .model is preferred).

    A tokenizer_config.json beside it names the special tokens. Raises UserError with one sentence.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: the folder holds neither tokenizer.model nor tokenizer.json")
        path = found[0]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
    engine = HuggingFaceEngine if path.suffix == ".json" else SentencePieceEngine
    try:
        if not content:
            raise ValueError("the file is empty")
        return Tokenizer(engine(content), _special_names(path.parent / "tokenizer_config.json"))
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare exceptions on a bad file
        kind = path.suffix[1:] if path.suffix in (".json", ".model") else "tokenizer (.json or .model)"
        raise UserError(f"{path}: not a {kind} file that can be read "
                        f"({str(error).splitlines()[0][:160] if str(error) else type(error).__name__})") from None


def read_by_sentencepiece_alone(folder: Path) -> str | None:
    """A sentence where a folder that `save` wrote has no tokenizer.json, for want of an exact one."""
    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return None
    return (f"no tokenizer.json gives exactly the ids of {folder / 'tokenizer.model'}: programs that read it with anything but "
            "SentencePiece, as transformers does, may give the model other ids")


def _special_names(path: Path) -> dict[str, Any]:
    """{"eos_token": "</s>", "eos_token_id": 2, ...} of a tokenizer_config.json, if there is one."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    names = {}
    kinds = {f"{role}_{what}": kind for role in KNOWN_NAMES for what, kind in (("token", str), ("token_id", int))}
    for key, value in settings.items() if isinstance(settings, dict) else ():
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, kinds.get(key, ())):
            names[key] = value
    return names


def _without_special_names(content: bytes) -> bytes:
    """The same tokenizer.json for encoding: where whole pieces are looked up in the text (BPE makes them by merges), those named as
    special tokens get a name that no text has, so that their ids are never found. The unknown one stays: any text may be unknown."""
    settings = json.loads(content)
    model, added = settings["model"], settings.get("added_tokens") or []
    if model.get("type") not in ("Unigram", "WordLevel", "WordPiece"):
        return content
    vocabulary = model["vocab"]
    listed = isinstance(vocabulary, list)  # Unigram: [name, score] by id
    unknown = vocabulary[model["unk_id"]][0] if listed and model.get("unk_id") is not None else model.get("unk_token")
    names = {entry["content"] for entry in added if entry["special"]} - {unknown}
    names &= {name for name, _ in vocabulary} if listed else vocabulary.keys()
    hidden = lambda name: f"\ufffe\uffff{name}" if name in names else name
    pairs = [[hidden(name), value] for name, value in (vocabulary if listed else vocabulary.items())]
    model["vocab"] = pairs if listed else dict(pairs)
    settings["added_tokens"] = [entry for entry in added if entry["content"] not in names]
    return json.dumps(settings).encode()


def _piece_bytes(piece: str, spaces: bool) -> bytes:
    if len(piece) == 6 and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return (piece.replace("\u2581", " ") if spaces else piece).encode()


def _byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = {char: bytes([byte]) for char, byte in _byte_characters().items()}
