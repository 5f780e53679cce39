"""Picture 2: which documents are held out for validation.

With `data.validation`, those sources. Else by the hash of each document's final text, so that copies fall on the
same side and the choice depends on nothing else. But when all there is is one plain text file without a cap, its tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from pellucid.config import DataConfig, UserError
from pellucid.data.blocks import Block, hash_number
from pellucid.data.document import Document, SourceFile
from pellucid.data.readers import PLAIN
from pellucid.data.sources import opened


class Splitter:
    """Cuts documents while they are read, is settled by what was read, and then knows each one's split."""

    def __init__(self, config: DataConfig, files: list[SourceFile]):
        self.fraction = 0.0 if config.validation else config.validation_fraction
        self.method = "none"
        if config.validation:
            self.method = "sources"
        elif self.fraction:
            capped = any(source.max_documents is not None or source.max_bytes is not None for source in config.sources)
            self.method = "tail" if len(files) == 1 and files[0].format in PLAIN and not capped else "content hash"
        self.documents, self.threshold = 0, 0
        self.boundary = _tail_start(files[0], self.fraction) if self.method == "tail" else None

    def cut(self, document: Document) -> Iterator[Document]:
        """The document, or its parts before and after the start of the held-out tail."""
        if self.boundary is None:
            yield document if self.method == "content hash" or document.split else replace(document, split="train")
        elif document.byte_end <= self.boundary:
            yield replace(document, split="train")
        elif document.byte_start >= self.boundary:
            yield replace(document, ordinal=document.ordinal + 1, split="validation")  # after the one that was cut in two
        else:
            head = document.text.encode()[: self.boundary - document.byte_start].decode()
            yield replace(document, text=head, byte_end=self.boundary, split="train")
            yield replace(document, text=document.text[len(head) :], byte_start=self.boundary,
                          ordinal=document.ordinal + 1, split="validation")

    def settle(self, blocks: Iterable[Block]) -> None:
        """Fix the threshold from all documents: at least one on either side. Raises UserError where that cannot be."""
        facts = [block.facts for block in blocks if block.facts["documents"]]
        self.documents = sum(fact["documents"] - fact["held_out"] for fact in facts)
        if self.method == "sources" and not any(fact["held_out"] for fact in facts):
            raise UserError("data.validation: no documents left to validate on")
        if self.method == "content hash" and facts:
            least, most = min(fact["least"] for fact in facts), max(fact["most"] for fact in facts)
            if least == most:
                raise UserError("data.validation_fraction: there is only one document, or all are the same, so none can be held out; "
                                "give data.validation, or set data.validation_fraction = 0")
            self.threshold = min(max(int(self.fraction * 2**64), least + 1), most)

    def split_of(self, document: Document, content_hash: bytes) -> str:
        """"train" or "validation"."""
        if document.split:
            return document.split
        return "validation" if hash_number(content_hash) < self.threshold else "train"

    def describe(self) -> dict[str, Any]:
        return {"method": self.method, "fraction": self.fraction, "tail_starts_at_byte": self.boundary}


def _tail_start(file: SourceFile, fraction: float) -> int | None:
    """The byte of the decompressed file where its held-out tail starts.

    After the first line end within the last `fraction`, else after the last one in as much again before, else at a character.
    """
    position = before = after = 0
    try:
        with opened(file) as (_, stream):
            total = sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
        target = int(total * (1 - fraction))
        with opened(file) as (_, stream):
            inside = b""
            while not after and (line := stream.readline(1 << 16)):
                if position < target <= position + len(line):
                    inside = line[target - position :] + stream.peek(4)[:4]
                position += len(line)
                if line.endswith(b"\n") and position < total:
                    before, after = (before, position) if position >= target else (position, 0)
    except Exception:  # a file that cannot be read is reported where it is read
        return None
    whole = target + next((n for n, byte in enumerate(inside) if byte & 0xC0 != 0x80), 0)
    return after or (before if before > total * (1 - 2 * fraction) else 0) or (whole if 0 < whole < total else None)
