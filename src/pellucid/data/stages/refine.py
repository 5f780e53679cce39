"""Picture 2, deduplicate, on disk: the corpus passes over the blocks of a build.

Each pass reads the blocks in order and writes those of what is left beside them, under the same names; when all are
there its record is committed. So a build that was killed goes on with the pass it was at.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pellucid.data.blocks import Block, BlockWriter, commit, finished_block, read_record
from pellucid.data.document import Document, Dropped
from pellucid.data.stages.corpus import CorpusPass

OWN = ("documents", "held_out", "text_bytes", "least", "most", "size")  # facts that BlockWriter finds itself
Progress = Callable[..., None]  # (stage, done, total); bytes


def refine(blocks: list[Block], stages: list[CorpusPass], folder: Path, progress: Progress,
           ) -> tuple[list[Block], list[dict[str, Any]]]:
    """(blocks of what the passes leave, a manifest entry for each). They lie in folder/<name of the pass>."""
    for leftover in folder.glob("*.rows"):
        leftover.unlink()
    records = []
    for stage in stages:
        blocks, record = _refine(blocks, stage, folder, progress)
        records.append(record)
    return blocks, records


def _refine(blocks: list[Block], stage: CorpusPass, folder: Path, progress: Progress) -> tuple[list[Block], dict[str, Any]]:
    place = folder / stage.name.replace(" ", "-")
    record = read_record(place / "record.json")
    done = [finished_block(place, block.name) for block in blocks] if record else [None]
    if record and all(done):
        return done, record
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    total, position = (stage.sweeps + 1) * sum(block.facts["text_bytes"] for block in blocks), 0
    for _ in range(stage.sweeps):
        number = 0
        for block in blocks:
            for document, content_hash in block:
                stage.see(number, document, content_hash)
                number += 1
            position += block.facts["text_bytes"]
            progress(stage.name, position, total)
        stage.settle()
    numbers = iter(range(number))
    written = []
    for block in blocks:
        written.append(_apply(block, stage, place, numbers))
        position += block.facts["text_bytes"]
        progress(stage.name, position, total)
    stage.close()
    commit(place / "record.json", stage.describe())
    return written, stage.describe()


def _apply(block: Block, stage: CorpusPass, place: Path, numbers: Iterator[int]) -> Block:
    writer = BlockWriter(place, block.name)
    try:
        for (document, content_hash), number in zip(block, numbers, strict=False):
            result: Document | Dropped = stage.apply(number, document)
            stage.record.add(document, result)
            if isinstance(result, Dropped):
                continue
            text = result.text.encode()
            if result.text is not document.text:
                content_hash = hashlib.blake2b(text, digest_size=16).digest()
            writer.add(result.marked(document, stage.name), text, content_hash)
        return writer.finish(**{key: value for key, value in block.facts.items() if key not in OWN})
    finally:
        writer.abandon()
