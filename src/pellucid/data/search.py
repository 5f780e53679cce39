"""Picture 2 asked backwards: which documents of prepared data hold a text, and in which rows it lies.

What is searched is the bytes of the tokens, shard after shard: the documents as they are trained on, after all stages.
So nothing but the prepared data is needed, and a text is found wherever its tokens begin and end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pellucid.config import NormalizeConfig, UserError
from pellucid.data.dataset import Dataset, Split
from pellucid.data.stages.normalize import normalize
from pellucid.data.tokenizer import Tokenizer

TOKENS_AT_ONCE = 1 << 20
CONTEXT = 60  # bytes shown on either side
BETWEEN = b"\xff"  # documents; no UTF-8 text holds this byte


@dataclass
class Found:
    """A document that holds the text: where it came from, how often, and where first.

    `byte_start` and `byte_end` bound the first place in the decompressed source where `exact`, else the whole document
    (for tables, row numbers). `tokens` are the first place's, within the document; `rows` those of the split with any place.
    """

    split: str
    document: int
    source: str
    byte_start: int
    byte_end: int
    exact: bool
    occurrences: int
    before: str
    text: str
    after: str
    tokens: tuple[int, int]
    augmented: bool
    rows: list[int] = field(default_factory=list)


@dataclass
class Search:
    """`found` lists the first documents; `documents` and `occurrences` count all."""

    text: str
    documents: int = 0
    occurrences: int = 0
    found: list[Found] = field(default_factory=list)


def search(dataset: Dataset, text: str, *, limit: int = 20, progress: Callable[..., None] = lambda *call: None) -> Search:
    """Documents of all splits that hold `text` (as the data are normalised), the first `limit` of them described.

    progress(stage, done, total) counts tokens. Raises UserError for an empty text, and for what is none.
    """
    try:
        needle = _as_prepared(text, dataset.config.normalize).encode()
    except UnicodeEncodeError:
        raise UserError("nothing to search for: the text is not valid UTF-8") from None
    if not needle:
        raise UserError("nothing to search for: the text is empty" + (" once it is normalised as the data are" if text else ""))
    result, table, done = Search(text), TokenBytes(dataset.tokenizer), 0
    total = sum(split["tokens"] for split in dataset.manifest["splits"].values())
    for name in dataset.manifest["splits"]:
        split, begun = dataset.split(name), done
        at = lambda tokens, begun=begun: progress("searching", begun + tokens, total)
        for document, places in _documents_with(split, table, needle, at):
            result.documents += 1
            result.occurrences += len(places)
            if len(result.found) < limit:
                result.found.append(_describe(split, table, document, places, needle))
        done += int(split.reader.ends[-1])
    return result


def _as_prepared(text: str, config: NormalizeConfig) -> str:
    """The text as it stands in documents that were normalised so. Blanks at its ends stay: they are part of what is looked for."""
    core = text.strip()
    head, tail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :] if core else ""
    blanks = lambda part: normalize(f"a{part}a", config)[1:-1] if part else ""
    return blanks(head) + normalize(core, config) + blanks(tail)


def _documents_with(split: Split, table: TokenBytes, needle: bytes, progress: Callable[[int], None],
                    ) -> Iterator[tuple[int, list[int]]]:
    """(document, bytes of its own text before each place) in order."""
    reader, first = split.reader, 0
    puts_blank = split.tokenizer.byte_lengths[split.tokenizer.eos_token_id] < 0  # before each text, as SentencePiece does
    text_bytes = reader.columns(["text_bytes"]).column(0).to_numpy()
    while first < len(reader.ends):
        stop = max(first + 1, int(np.searchsorted(reader.ends, reader.starts[first] + TOKENS_AT_ONCE, side="right")))
        base = int(reader.starts[first])
        content, ends = table.join(reader.tokens(np.arange(base, reader.ends[stop - 1])))
        document_ends = ends[reader.ends[first:stop] - 1 - base]
        if puts_blank:
            starts = np.concatenate([[0], document_ends[:-1]])
            content = bytearray(content)
            for blank in starts[document_ends - 1 - starts > text_bytes[first:stop]].tolist():
                content[blank : blank + 1] = BETWEEN
        places: list[int] = []
        place = content.find(needle)
        while place >= 0:
            places.append(place)
            place = content.find(needle, place + len(needle))
        within = np.searchsorted(document_ends, places, side="right")
        for number in np.unique(within):
            begin = int(document_ends[number - 1]) if number else 0
            yield first + int(number), [places[n] - begin for n in np.flatnonzero(within == number)]
        progress(int(reader.ends[stop - 1]))
        first = stop


class TokenBytes:
    """The bytes of every token in one array, so that many tokens are joined at once."""

    def __init__(self, tokenizer: Tokenizer):
        parts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        parts[tokenizer.eos_token_id] = BETWEEN
        self.lengths = np.array([len(part) for part in parts], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.pool = np.frombuffer(b"".join(parts), np.uint8)

    def join(self, tokens: np.ndarray) -> tuple[bytes, np.ndarray]:
        """(their bytes, where each token's end)."""
        lengths = self.lengths[tokens]
        ends = np.cumsum(lengths)
        index = np.repeat(self.starts[tokens] - ends + lengths, lengths)
        index += np.arange(len(index))
        return self.pool[index].tobytes(), ends


def _describe(split: Split, table: TokenBytes, document: int, places: list[int], needle: bytes) -> Found:
    [origin] = split.reader.provenance([document])
    tokens = split.reader.tokens(np.arange(split.reader.starts[document], split.reader.ends[document] - 1))
    content, ends = table.join(tokens)
    token_at = lambda byte: int(np.searchsorted(ends, byte, side="right"))
    held = [(token_at(place), token_at(place + len(needle) - 1) + 1) for place in places]
    place, stop = places[0], places[0] + len(needle)
    begin, end = origin["byte_start"], origin["byte_end"]
    before = split.bytes_before_text(document, origin)
    if before is not None:
        begin, end = begin + max(0, place - before), begin + stop - before
    show = lambda part: part.decode("utf-8", "ignore")
    return Found(
        split.name, document, origin["source"], begin, end, before is not None, len(places),
        show(content[max(0, place - CONTEXT) : place]), show(needle), show(content[stop : stop + CONTEXT]), held[0],
        origin["parent"] is not None, sorted(split.rows_of_document(document, held)))
