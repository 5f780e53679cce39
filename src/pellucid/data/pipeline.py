"""Picture 2: the jobs of a build. Each is a pure piece of work on one part or block, done by whichever worker.

    ScanJob      a large file      -> its parts
    ReadJob      a part            -> blocks of documents that all stages kept
    TokenizeJob  a block           -> token blocks, one per split
    ShardJob     token blocks      -> one shard
A job yields what it has to report: ("position", bytes done) now and then, and its results; `after` a report it is the
job that is left to do. What it writes bears its final name only when complete, and the same job always writes the same
bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.config import DataConfig, UserError
from pellucid.data.augment.identity import materialized
from pellucid.data.augment.materialize import Item, Materializer, augmentation_of
from pellucid.data.blocks import BLOCK_DOCUMENTS, Block, BlockWriter, commit
from pellucid.data.document import Document, Dropped, SourceFile, Stage, StageRecord, Unreadable, utf8_size
from pellucid.data.parts import Part, scan
from pellucid.data.shards import TokenBlock, write_shard
from pellucid.data.sources import read_documents, sha256_of, state_of
from pellucid.data.splitting import Splitter
from pellucid.data.stages.assemble import build_stages
from pellucid.data.tokenizer import Tokenizer, load_tokenizer

REPORT_BYTES = 1 << 20
BATCH_BYTES = 1 << 20  # of text tokenized at once
Report = tuple[str, Any]


def stages(config: DataConfig) -> list[Stage]:
    """The stages of a configuration that look at one document at a time, in the order they are applied."""
    return build_stages(config)


@dataclass
class Setup:
    """What all jobs of a build have in common. `folder` is the build's own; blocks/, tokens/ and shards/ lie in it."""

    config: DataConfig
    folder: Path
    splitter: Splitter
    block_bytes: int


class Job:
    """Work that is done again from its start when its worker dies, unless `after` says what is left of it."""

    def run(self, setup: Setup) -> Iterator[Report]:
        raise NotImplementedError

    def after(self, report: Report) -> Job:
        """What is left to do once this was reported."""
        return self


@dataclass(frozen=True)
class ScanJob(Job):
    part: Part

    def run(self, setup: Setup) -> Iterator[Report]:
        _unchanged(self.part.files[0][1])
        yield "parts", scan(self.part, setup.block_bytes)


@dataclass(frozen=True)
class ReadJob(Job):
    """Reads a part, from where its finished blocks end."""

    part: Part
    blocks: int = 0  # finished already
    items: int = 0  # documents and unreadables in them
    documents: int = 0  # kept in them
    text_bytes: int = 0

    def run(self, setup: Setup) -> Iterator[Report]:
        reading = _Reading(self.part)
        items = itertools.islice(reading.items(setup.config.on_error), self.items, None)
        room = _Room(self.part, self.documents, self.text_bytes)
        for number in itertools.count(self.blocks):
            writer = BlockWriter(setup.folder / "blocks", block_name(self.part, number))
            try:
                block = yield from _fill(writer, items, reading, room, setup)
            finally:
                writer.abandon()
            yield "block", block
            if block.facts["last"]:
                return

    def after(self, report: Report) -> ReadJob:
        kind, block = report
        if kind != "block":
            return self
        items, documents, text_bytes = (block.facts[key] for key in ("items", "documents", "text_bytes"))
        return replace(self, blocks=self.blocks + 1, items=self.items + items, documents=self.documents + documents,
                       text_bytes=self.text_bytes + text_bytes)


def block_name(part: Part, number: int) -> str:
    return f"{part.name}.{number:06d}"


def part_name(block: Block) -> str:
    """The name of the part that a block was read from."""
    return block.name.partition(".")[0]


@dataclass
class _Reading:
    """The items of a part's files in order, with what is known of each file once it has been read."""

    part: Part
    position: int = 0  # in the files as stored
    number: int = 0  # of the file being read, within the part
    ended: dict[str, str | None] = field(default_factory=dict)  # sha256 of the files that were read to their end

    def items(self, on_error: str) -> Iterator[Document | Unreadable]:
        before = 0
        for number, (_, file) in enumerate(self.part.files):
            self.number = number
            _unchanged(file)
            start = self.part.span.start if file.format != "parquet" else 0
            for item in read_documents(file, lambda at, base=before - start: self._at(base + at), self.part.span):
                if isinstance(item, Unreadable) and on_error == "stop":
                    raise UserError(f"{item.message}; leave it out of the sources" if item.reason == "empty" else
                                    f'{item.message}; data.on_error = "skip" leaves out what cannot be read, and counts it')
                yield item
            _unchanged(file)
            before += file.size
            self.position = min(before, self.part.stored_bytes)
            if self.part.sha256 is None and not file.remote:
                self.ended[str(self.number)] = sha256_of(file.path)

    def _at(self, position: int) -> None:
        self.position = min(position, self.part.stored_bytes)


def _unchanged(file: SourceFile) -> None:
    try:
        changed = not file.remote and state_of(Path(file.path)) != (file.size, file.version)
    except OSError as error:
        raise UserError(f"{file.uri}: the file went away while the data were built ({error.strerror}); put it back, or "
                        "start again without it") from None
    if changed:
        raise UserError(f"{file.uri}: the file changed while it was read; start again when it is complete")


@dataclass
class _Room:
    """How much of a capped source is still wanted."""

    part: Part
    documents: int
    text_bytes: int

    def full(self, more: BlockWriter) -> bool:
        most, most_bytes = self.part.max_documents, self.part.max_bytes
        return ((most is not None and self.documents + more.facts["documents"] >= most)
                or (most_bytes is not None and self.text_bytes + more.facts["text_bytes"] >= most_bytes))


def _fill(writer: BlockWriter, items: Iterator[Document | Unreadable], reading: _Reading, room: _Room, setup: Setup,
          ) -> Iterator[Report]:
    """Items into one block until it is large enough; returns the finished block."""
    read, files, reported = StageRecord(), Counter(), reading.position
    pipeline, messages = _pipeline(setup.config), []
    reading.ended.clear()
    count, last, first = 0, False, reading.number
    while True:
        item = None if room.full(writer) else next(items, None)
        if item is None:
            last = True
            break
        count += 1
        read.documents_in += 1
        if isinstance(item, Unreadable):
            read.drop(item.reason)
            messages = [*messages, item.message][:3]
        else:
            size = utf8_size(item.text)
            files[reading.number] += 1
            read.documents_out += 1
            read.bytes_in, read.bytes_out = read.bytes_in + size, read.bytes_out + size
            for document in setup.splitter.cut(item):
                _pass_through(document, pipeline, writer)
        if reading.position - reported >= REPORT_BYTES:
            reported = reading.position
            yield "position", reported
        if read.bytes_in >= setup.block_bytes or count >= BLOCK_DOCUMENTS:
            break
    read.samples = [{"message": message} for message in messages]
    block = writer.finish(
        items=count, last=last, read=read.as_dict(), stages=[stage.record.as_dict() for stage in pipeline],
        files={str(number): files[number] for number in range(first, reading.number + 1)},  # those opened, also without a document
        sha256=dict(reading.ended), position=reading.position)
    room.documents += block.facts["documents"]
    room.text_bytes += block.facts["text_bytes"]
    return block


def forget() -> None:
    """A build begins: what an earlier one in this process loaded from files may have changed since."""
    _stages_of.cache_clear()
    _tokenizer.cache_clear()
    augmentation_of.cache_clear()


@lru_cache(maxsize=2)
def _stages_of(settings: str) -> list[Stage]:
    return stages(DataConfig.model_validate_json(settings))


def _pipeline(config: DataConfig) -> list[Stage]:
    """The stages, their engines loaded once in a process, with new records."""
    pipeline = _stages_of(config.model_dump_json())
    for stage in pipeline:
        stage.record = StageRecord()
    return pipeline


def _pass_through(document: Document, pipeline: list[Stage], writer: BlockWriter) -> None:
    for stage in pipeline:
        result = stage(document)
        if isinstance(result, Dropped):
            return
        document = result
    text = document.text.encode()
    writer.add(document, text, hashlib.blake2b(text, digest_size=16).digest())


@dataclass(frozen=True)
class TokenizeJob(Job):
    """Tokenizes a block into tokens/NAME.train and tokens/NAME.validation (.tok and .arrow), then NAME.json."""

    block: Block

    def run(self, setup: Setup) -> Iterator[Report]:
        folder = setup.folder / "tokens"
        tokenizer = _tokenizer(setup.folder / "tokenizer", setup.config.tokenizer.encoder)
        augment = Materializer(setup.config) if materialized(setup.config) else None
        splits = {"train": TokenBlock(), "validation": TokenBlock()}
        done = 0
        for batch in _batches(self.block):
            items = [Item(*item, setup.splitter.split_of(*item)) for item in batch]
            items = augment.expand(items, tokenizer) if augment else items
            ids = tokenizer.encode_arrays([item.document.text for item in items])
            for item, tokens in zip(items, ids, strict=True):
                tokens = tokens if item.token_ids is None else item.token_ids
                splits[item.split].add(
                    np.append(np.asarray(tokens, dtype=np.uint32), np.uint32(tokenizer.eos_token_id)), item.document,
                    len(item.document.text.encode()), item.text_hash, item.parent, item.augmentation)
            done += sum(len(document.text.encode()) for document, _ in batch)
            yield "position", done
        if augment:
            commit(folder / f"{self.block.name}.augment.json", augment.record())
        counts = {name: tokens.save(folder, f"{self.block.name}-{name}") for name, tokens in splits.items() if tokens.tokens}
        commit(folder / f"{self.block.name}.json", counts)
        yield "tokens", (self.block.name, counts)


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, encoder: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if encoder != "auto":
        tokenizer.use_encoder(encoder)
    return tokenizer


def _batches(block: Block) -> Iterator[list[tuple[Document, bytes]]]:
    batch, size = [], 0
    for item in block:
        batch.append(item)
        size += len(item[0].text)
        if size >= BATCH_BYTES or len(batch) >= 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class ShardJob(Job):
    """Writes one shard, then its record NNNNN.json beside the token blocks."""

    number: int
    blocks: tuple[str, ...]  # of one split: "NAME-train"
    tokens: int

    def run(self, setup: Setup) -> Iterator[Report]:
        folder = setup.folder / "result" / "shards"
        record = write_shard(folder, self.number, [setup.folder / "tokens" / f"{name}.x" for name in self.blocks])
        with contextlib.suppress(FileExistsError):
            commit(setup.folder / "tokens" / f"shard-{self.number:05d}.json", record)
        yield "shard", record
