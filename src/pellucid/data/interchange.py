"""Picture 2 in other people's files: prepared data out to Megatron and nanoGPT, and tokens made elsewhere in.

What is written are the tokens of the shards, closing eos included, in their order; what is read keeps every token. An
imported folder is prepared data like any other (train on it with data.prepared), except that nobody has seen its text:
a document's provenance is its place in the token file, its content hash that of its tokens.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pellucid.config import DataConfig, UserError
from pellucid.data import shards
from pellucid.data.blocks import hash_number
from pellucid.data.dataset import FORMAT, MANIFEST, Dataset, packing_of
from pellucid.data.document import Document
from pellucid.data.formats import (
    NANOGPT_TYPES,
    Tokenized,
    megatron_type,
    read_megatron,
    read_nanogpt,
    read_rows,
    read_table,
    write_megatron_index,
)
from pellucid.data.passes import Progress
from pellucid.data.readers_tables import open_hugging_face
from pellucid.data.shards import TokenBlock, describe_files, file_sha256, write_shard
from pellucid.data.tokenizer import Tokenizer, load_tokenizer

RECORD = "export.json"
HUB = "hf-dataset:"
BLOCK_TOKENS = 1 << 22  # held in memory at once
COPY_TOKENS = 1 << 22
Kind = Literal["megatron", "nanogpt", "table"]


def export_tokens(dataset: Dataset, to: str, out: str | Path, *, dtype: str | None = None, progress: Progress | None = None) -> Path:
    """Write the splits of prepared data to the new folder `out`, with the tokenizer and export.json (hashes) beside them.

    to: "megatron" (train.bin and .idx; uint16 below 65,500 ids, else int32, as Megatron chooses) or "nanogpt" (train.bin,
    val.bin; uint16, or dtype="uint32" for forks that read it). Raises UserError, where the ids do not fit too.
    """
    tokenizer = dataset.tokenizer
    if to == "megatron":
        if dtype is not None:
            raise UserError("data export: --dtype belongs to nanogpt; Megatron's type follows from the vocabulary")
        kind, val = megatron_type(tokenizer.vocab_size), "validation"
    elif to == "nanogpt":
        kind, val = NANOGPT_TYPES.get(dtype or "uint16"), "val"
        if kind is None:
            raise UserError(f"data export: there is no type '{dtype}'; known: {', '.join(NANOGPT_TYPES)}")
        if tokenizer.vocab_size > np.iinfo(kind).max + 1:
            raise UserError(f"data export: {tokenizer.vocab_size} token ids do not fit nanoGPT's uint16; give --dtype uint32 if "
                            "your trainer reads that, or --to megatron")
    else:
        raise UserError(f"data export: there is no format '{to}'; known: megatron, nanogpt")
    with _new_folder(Path(out)) as folder:
        for name, split in dataset.manifest["splits"].items():
            reader = dataset.split(name).reader
            path = folder / f"{val if name == 'validation' else name}.bin"
            with open(path, "wb") as file:
                for start in range(0, split["tokens"], COPY_TOKENS):
                    stop = min(start + COPY_TOKENS, split["tokens"])
                    file.write(reader.tokens(np.arange(start, stop)).astype(kind).tobytes())
                    if progress:
                        progress(f"writing {name}", stop * 4, split["tokens"] * 4)
            if to == "megatron":
                write_megatron_index(path.with_suffix(".idx"), reader.lengths, kind)
        dataset.tokenizer.save(folder / "tokenizer")
        record = {"format": to, "dtype": np.dtype(kind).name, "vocab_size": tokenizer.vocab_size,
                  "eos_token_id": tokenizer.eos_token_id, "tokenizer": tokenizer.fingerprint, "data": dataset.fingerprint,
                  "files": describe_files(folder, {})}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(out)


def import_tokens(source: str, out: str | Path, *, tokenizer: str | Path | None = None, kind: Kind | None = None,
                  validation: str | None = None, validation_fraction: float = 0.02, sequence_length: int = 128,
                  field: str = "input_ids", dtype: str | None = None, progress: Progress | None = None) -> Dataset:
    """Prepared data, in the new folder `out`, of tokens that are there already. Every token is kept, in its order.

    source: an .idx or .bin, a table, `hf-dataset:NAME[:CONFIG[:SPLIT]]`, or a folder of such files (in which val.bin or
    validation.bin is held out). A document that does not end with eos gets one. `validation` is held out, else a
    fraction of the documents chosen by the hash of their tokens. `tokenizer` may lie beside the source. The rows are those of
    the model that is trained where none is named, unless `sequence_length` says otherwise.
    """
    if kind not in (None, "megatron", "nanogpt", "table") or dtype not in (None, *NANOGPT_TYPES):
        raise UserError(f"data import: there is no {kind if dtype in (None, *NANOGPT_TYPES) else dtype}; known: megatron, nanogpt, "
                        "table, and the types uint16, uint32")
    files = _files(source)
    if validation is not None:
        files = [(path, "train") for path, _ in files] + [(path, "validation") for path, _ in _files(validation)]
    tokens = _tokenizer(tokenizer, source)
    fixed = any(split == "validation" for _, split in files)
    threshold = 0 if fixed else int(validation_fraction * 2**64)
    settings = DataConfig.model_validate({
        "sources": [{"path": source}], "validation": [{"path": validation or source}] if fixed else [],
        "validation_fraction": validation_fraction, "sequence_length": sequence_length,
        "tokenizer": {"kind": "file", "path": str(tokenizer or Path(source) / "tokenizer")}})
    with _new_folder(Path(out)) as folder:
        writer = _Writer(folder)
        read = []
        for path, split in files:
            begun = writer.documents
            for ordinal, item in enumerate(_reader(path, kind, field, dtype, tokens.eos_token_id)):
                ids = _checked(item, ordinal, path, tokens)
                writer.closed += len(ids) - len(item.tokens)
                digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=16).digest()
                held_out = split == "validation" or (split is None and hash_number(digest) < threshold)
                text_bytes = int(tokens.byte_lengths[ids].sum())
                document = Document("", path, 0, ordinal, item.start, item.end)
                writer.add("validation" if held_out else "train", ids, document, text_bytes, digest)
                if progress and ordinal % 1000 == 0:
                    progress("importing", writer.documents, None, f"{writer.documents:,} documents · {writer.tokens:,} tokens")
            read.append(_identity(path, split, writer.documents - begun))
        splits, written = writer.finish()
        if "train" not in splits:
            raise UserError(f"{source}: holds no documents to train on")
        tokens.save(folder / "tokenizer", convert=False)
        for name, made in splits.items():
            made["packing"] = packing_of(folder, made, settings, name)
        manifest = _manifest(settings, tokens, splits, read, writer) | {"files": describe_files(folder, written)}
        shards.write_file(folder / MANIFEST, [(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()])
    return Dataset(out, verify=False)


def _manifest(settings: DataConfig, tokenizer: Tokenizer, splits: dict[str, Any], read: list[dict[str, Any]],
              writer: _Writer) -> dict[str, Any]:
    kept = settings.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps([kept, [file["sha256"] for file in read]], sort_keys=True).encode()).hexdigest()
    text_bytes = sum(split["text_bytes"] for split in splits.values())
    return {
        "format": FORMAT, "settings_hash": digest, "settings": kept,
        "tokenizer": {"kind": "file", "vocab_size": tokenizer.vocab_size, "trained_by": None,
                      "fingerprint": tokenizer.fingerprint, "pad_token_id": tokenizer.pad_token_id,
                      "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        "split": {"method": "sources" if settings.validation else "token hash", "fraction": settings.validation_fraction,
                  "tail_starts_at_byte": None},
        "splits": splits,
        "stages": [{"name": "import", "version": 1, "settings": {"closing_eos_added": writer.closed},
                    "documents_in": writer.documents, "documents_out": writer.documents, "bytes_in": text_bytes,
                    "bytes_out": text_bytes, "dropped": {}, "samples": []}],
        "sources": read,
    }


class _Writer:
    """Documents into shards of at most TOKENS_PER_SHARD or a block more, split by split."""

    def __init__(self, folder: Path):
        self.shards, self.blocks = folder / "shards", folder / "blocks"
        self.shards.mkdir()
        self.blocks.mkdir()
        self.open: dict[str, tuple[TokenBlock, int]] = {}
        self.done: dict[str, list[tuple[Path, dict[str, int]]]] = {}
        self.documents = self.tokens = self.closed = 0

    def add(self, split: str, ids: np.ndarray, document: Document, text_bytes: int, digest: bytes) -> None:
        block, size = self.open.get(split) or (TokenBlock(), 0)
        block.add(ids, document, text_bytes, digest)
        self.documents, self.tokens, size = self.documents + 1, self.tokens + len(ids), size + len(ids)
        self.open[split] = block, size
        if size >= BLOCK_TOKENS:
            self._close(split)

    def _close(self, split: str) -> None:
        block, _ = self.open.pop(split)
        done = self.done.setdefault(split, [])
        name = f"{split}-{len(done):06d}"
        done.append((self.blocks / f"{name}.x", block.save(self.blocks, name)))

    def finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """({split: counts and shards}, {file: size and sha256})."""
        for split in list(self.open):
            self._close(split)
        splits, files, number = {}, {}, 0
        for split in sorted(self.done):  # train first, as a build has it
            counts = {key: sum(count[key] for _, count in self.done[split]) for key in ("documents", "tokens", "text_bytes")}
            splits[split] = {**counts, "shards": []}
            group, size = [], 0
            for n, (path, count) in enumerate(self.done[split], 1):
                group.append(path)
                size += count["tokens"]
                if size >= shards.TOKENS_PER_SHARD or n == len(self.done[split]):
                    record = write_shard(self.shards, number, group)
                    files |= record.pop("files")
                    splits[split]["shards"].append(record)
                    group, size, number = [], 0, number + 1
        shutil.rmtree(self.blocks)
        return splits, files


def _files(source: str) -> list[tuple[str, str | None]]:
    """(file or dataset name, its split if its name says so) behind a name."""
    path = Path(source)
    if source.startswith(HUB) or path.is_file():
        return [(source, None)]
    if not path.is_dir():
        raise UserError(f"{source}: no such file or folder")
    found = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".parquet", ".arrow", ".feather"))
    if not found:
        raise UserError(f"{source}: the folder holds no .bin, .parquet or .arrow file")
    held_out = [file.stem.startswith("val") for file in found]
    return [(str(file), ("validation" if held else "train") if any(held_out) else None)
            for file, held in zip(found, held_out, strict=True)]


def _reader(path: str, kind: str | None, field: str, dtype: str | None, eos_token_id: int) -> Iterator[Tokenized]:
    if path.startswith(HUB):
        return read_rows(open_hugging_face(path.removeprefix(HUB)), field, path)
    file = Path(path)
    if kind is None:
        kind = "table" if file.suffix not in (".bin", ".idx") else "megatron" if file.with_suffix(".idx").exists() else "nanogpt"
    if kind == "nanogpt":
        recorded = _record(file.parent).get("dtype")
        return read_nanogpt(file, dtype or (recorded if recorded in NANOGPT_TYPES else "uint16"), eos_token_id)
    return read_megatron(file) if kind == "megatron" else read_table(file, field)


def _checked(item: Tokenized, ordinal: int, path: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a document as int64, with their closing eos."""
    ids = item.tokens.astype(np.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise UserError(f"{path}: document {ordinal} holds token id {wrong}, but the tokenizer has only the ids 0 to "
                        f"{tokenizer.vocab_size - 1}: it is too small, or of other data")
    return ids if len(ids) and ids[-1] == tokenizer.eos_token_id else np.append(ids, tokenizer.eos_token_id)


def _identity(path: str, split: str | None, documents: int) -> dict[str, Any]:
    file = Path(path)
    local = file.is_file()
    return {"uri": path, "path": path, "source_index": 0, "split": split, "size": file.stat().st_size if local else 0,
            "version": str(file.stat().st_mtime_ns) if local else "", "sha256": file_sha256(file) if local else None,
            "documents": documents}


def _tokenizer(given: str | Path | None, source: str) -> Tokenizer:
    """The tokenizer given, or the one beside the source; refused where export.json says that it was another."""
    place = Path(source) if Path(source).is_dir() else Path(source).parent
    if given is None and not (place / "tokenizer").is_dir():
        raise UserError(f"{source}: say which tokenizer made these tokens: --tokenizer FILE (there is none in {place / 'tokenizer'})")
    tokenizer = load_tokenizer(given or place / "tokenizer")
    recorded = _record(place).get("tokenizer", tokenizer.fingerprint)
    if recorded != tokenizer.fingerprint:
        raise UserError(f"{given or place / 'tokenizer'}: not the tokenizer of these tokens ({place / RECORD} names another)")
    return tokenizer


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when everything in it is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    except OSError as error:
        if error.filename is not None:
            raise
        remedy = "; raise `ulimit -f`" if error.errno == errno.EFBIG else ""
        raise UserError(f"{out}: cannot be written ({error.strerror or error}){remedy}, or choose another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
