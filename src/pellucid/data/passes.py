"""Picture 2: the two passes of a build, from the ledger's point of view: what is finished, what is left to do.

Reads the ledger, gives the jobs that are left to the workers, hears their reports, and hands out blocks and shards
in the order of the plan, whoever made them and when. Says how it goes: documents, bytes, tokens, what was dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from pellucid.data import shards
from pellucid.data.blocks import Block, commit, finished_block, read_record
from pellucid.data.document import SourceFile, Span
from pellucid.data.parts import Part, plan_parts, worth_scanning
from pellucid.data.pipeline import ReadJob, ScanJob, Setup, ShardJob, TokenizeJob, block_name, part_name
from pellucid.data.workers import Workers

Progress = Callable[..., None]  # (stage, done, total, detail=""); bytes, except where the stage says files
SAMPLED_BLOCKS = 4  # times the sample's size: what is read to draw it


class Build:
    """One build at work; see build.py for the order in which its methods are called."""

    def __init__(self, setup: Setup, files: list[SourceFile], workers: Workers, progress: Progress):
        self.setup, self.files, self.workers, self.progress = setup, files, workers, progress
        self.parts: list[Part] = []

    def read(self) -> list[Block]:
        """First pass: every part through the stages. The blocks, in order."""
        self.parts = self._planned()
        blocks = {part.name: self._finished(part) for part in self.parts}
        jobs, numbers = [], []
        for part in self.parts:
            done = blocks[part.name]
            if not (done and done[-1].facts["last"]):
                jobs.append(_continuation(part, done))
                numbers.append(part)
        tally = _Tally(sum(part.stored_bytes for part in self.parts))
        for part in self.parts:
            for block in blocks[part.name]:
                tally.block(part, block, new=False)
        for number, (kind, value) in self.workers.do(jobs, self.setup):
            part = numbers[number]
            if kind == "block":
                blocks[part.name].append(value)
                tally.block(part, value)
            else:
                tally.at(part, value)
            self.progress("reading", tally.done, tally.total, tally.detail())
        self.progress("reading", tally.total, tally.total, tally.detail())
        return [block for part in self.parts for block in blocks[part.name]]

    def _planned(self) -> list[Part]:
        """The parts, large files cut into spans (that is kept in the ledger too)."""
        parts: list[Part | None] = []
        spans: dict[str, list[Part]] = {}
        scans = []
        folder, block_bytes = self.setup.folder / "blocks", self.setup.block_bytes
        for part in plan_parts(self.setup.config, self.files, block_bytes):
            parts.append(part)
            if worth_scanning(part, block_bytes):
                known = read_record(folder / f"scan-{part.name}.scan")
                if known is None:
                    scans.append(part)
                else:
                    spans[part.name] = [_with_span(part, values) for values in known["spans"]]
        done, total = 0, sum(part.stored_bytes for part in scans)
        for number, (_, cut) in self.workers.do([ScanJob(part) for part in scans], self.setup):
            part = scans[number]
            spans[part.name] = cut
            commit(folder / f"scan-{part.name}.scan", {"spans": [
                [p.span.start, p.span.stop, p.span.ordinal, p.sha256, p.spans] for p in cut]})
            done += part.stored_bytes
            self.progress("scanning", done, total)
        return [piece for part in parts for piece in spans.get(part.name, [part])]

    def _finished(self, part: Part) -> list[Block]:
        found: list[Block] = []
        while block := finished_block(self.setup.folder / "blocks", block_name(part, len(found))):
            found.append(block)
            if block.facts["last"]:
                break
        return found

    def sample(self, blocks: list[Block], sample_bytes: int) -> Iterator[str]:
        """Training texts for the tokenizer: all, or about sample_bytes of them: every n-th block, chosen by hash."""
        splitter = self.setup.splitter
        text_bytes = sum(block.facts["text_bytes"] for block in blocks)
        stride = max(1, math.ceil(text_bytes / (SAMPLED_BLOCKS * sample_bytes)))
        chosen = blocks[::stride]
        share = sample_bytes / max(1, sum(block.facts["text_bytes"] for block in chosen))
        done, total = 0, min(text_bytes, sample_bytes)
        for block in chosen:
            for document, content_hash in block:
                wanted = int.from_bytes(content_hash[8:], "little") < share * 2**64
                if wanted and splitter.split_of(document, content_hash) == "train":
                    done += len(document.text.encode())
                    self.progress("training tokenizer", min(done, total), total)
                    yield document.text

    def tokenize(self, blocks: list[Block]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Second pass. ({split: counts and shards}, {file: size and sha256}), the shards written."""
        folder = self.setup.folder / "tokens"
        counts = {block.name: read_record(folder / f"{block.name}.json") for block in blocks}
        jobs = [TokenizeJob(block) for block in blocks if counts[block.name] is None]
        sizes = {block.name: block.facts["text_bytes"] for block in blocks}
        total, started = sum(sizes.values()), time.monotonic()
        ready = [name for name, count in counts.items() if count is not None]
        before = done = sum(sizes[name] for name in ready)
        documents, tokens = (sum(_in_splits(counts[name], key) for name in ready) for key in ("documents", "tokens"))
        at: dict[int, int] = {}  # of the blocks being tokenized
        for number, (kind, value) in self.workers.do(jobs, self.setup):
            if kind == "tokens":
                name, counts[name] = value
                done += sizes[name]
                documents += _in_splits(counts[name], "documents")
                tokens += _in_splits(counts[name], "tokens")
                at.pop(number, None)
            else:
                at[number] = value
            position = min(total, done + sum(at.values()))
            detail = f"{documents:,} documents · {tokens:,} tokens · {_speed(position - before, started)}"
            self.progress("tokenizing", position, total, detail)
        splits = {}
        for name in ("train", "validation"):
            mine = [(block.name, counts[block.name][name]) for block in blocks if name in counts[block.name]]
            if mine:
                splits[name] = {key: sum(count[key] for _, count in mine) for key in ("documents", "tokens", "text_bytes")}
                splits[name]["shards"] = [(f"{block}-{name}", count["tokens"]) for block, count in mine]
        return self._write_shards(splits)

    def _write_shards(self, splits: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        jobs, owners = [], []
        for name, split in splits.items():
            group, size = [], 0
            for block, tokens in split["shards"]:
                group.append(block)
                size += tokens
                if size >= shards.TOKENS_PER_SHARD:
                    jobs.append(ShardJob(len(jobs), tuple(group), size))
                    owners.append(name)
                    group, size = [], 0
            if group:
                jobs.append(ShardJob(len(jobs), tuple(group), size))
                owners.append(name)
            split["shards"] = []
        records: list[dict[str, Any]] = [{}] * len(jobs)
        done, total = 0, sum(job.tokens for job in jobs) * 4
        for number, (_, record) in self.workers.do(jobs, self.setup):
            records[number] = record
            done += record["tokens"] * 4
            self.progress("writing", done, total)
        files: dict[str, Any] = {}
        for record, owner in zip(records, owners, strict=True):
            files |= record.pop("files")
            splits[owner]["shards"].append(record)
        return splits, files

    def identities(self, blocks: list[Block]) -> list[dict[str, Any]]:
        """The manifest's entry for each source file; `documents` is None of one beyond a cap, which was not opened."""
        documents, hashes = [None] * len(self.files), [None] * len(self.files)
        for part in self.parts:
            for number, _ in part.files:
                hashes[number] = hashes[number] or part.sha256
        places = {part.name: [number for number, _ in part.files] for part in self.parts}
        for block in blocks:
            numbers = places[part_name(block)]
            for place, count in block.facts["files"].items():
                documents[numbers[int(place)]] = (documents[numbers[int(place)]] or 0) + count
            for place, digest in block.facts["sha256"].items():
                hashes[numbers[int(place)]] = digest
        return [{"uri": file.uri, "path": str(file.path), "source_index": file.source_index, "split": file.split,
                 "size": file.size, "version": file.version, "sha256": hashes[number], "documents": documents[number]}
                for number, file in enumerate(self.files)]


def _in_splits(counts: dict[str, dict[str, int]], key: str) -> int:
    return sum(split[key] for split in counts.values())


def _continuation(part: Part, done: list[Block]) -> ReadJob:
    return reduce(lambda job, block: job.after(("block", block)), done, ReadJob(part))


def _with_span(part: Part, values: list[Any]) -> Part:
    start, stop, ordinal, sha256, spans = values
    return Part(part.files, Span(start, stop, ordinal), sha256=sha256, spans=spans)


class _Tally:
    """What the first pass has done so far, for the person watching."""

    def __init__(self, total: int):
        self.total, self.started = total, time.monotonic()
        self._position: dict[str, int] = {}  # of each part, in its files as stored
        self._positions = 0  # their sum
        self.documents = self.text_bytes = self.new_bytes = 0
        self.dropped: dict[str, int] = {}

    def block(self, part: Part, block: Block, new: bool = True) -> None:
        facts = block.facts
        self.at(part, part.stored_bytes if facts["last"] else facts["position"])
        self.documents += facts["documents"]
        self.text_bytes += facts["read"]["bytes_in"]
        self.new_bytes += facts["read"]["bytes_in"] if new else 0
        for record in (facts["read"], *facts["stages"]):
            for reason, count in record["dropped"].items():
                self.dropped[reason] = self.dropped.get(reason, 0) + count

    def at(self, part: Part, position: int) -> None:
        self._positions += position - self._position.get(part.name, 0)
        self._position[part.name] = position

    @property
    def done(self) -> int:
        return min(self.total, self._positions)

    def detail(self) -> str:
        """"12,345 documents · 67.8 MB · 3.2 MB/s · dropped 12 empty"."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in
                            sorted(self.dropped.items(), key=lambda item: -item[1])[:4])
        parts = [f"{self.documents:,} documents", f"{self.text_bytes / 1e6:,.1f} MB", _speed(self.new_bytes, self.started)]
        return " · ".join([*parts, f"dropped {dropped}"] if dropped else parts)


def _speed(new_bytes: int, started: float) -> str:
    return f"{new_bytes / 1e6 / max(1e-3, time.monotonic() - started):,.1f} MB/s"
