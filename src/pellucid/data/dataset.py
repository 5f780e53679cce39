"""Picture 2, loader: prepared data on disk, and its batches as a pure function of (seed, step).

A document's stream is [eos] + text + [eos]: inputs are the stream without its last token, targets without its
first, so every text token and the closing eos are predicted exactly once. A piece that starts inside a document
has the token before it as its first input. Legend: B rows of T positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from pellucid.config import DataConfig, MixtureSegment, SourceConfig, TokenMaskingConfig, UserError, explain_validation_error
from pellucid.data.augment.token_masking import mask_tokens
from pellucid.data.labels import encode
from pellucid.data.order import Mixture, make_mixture, mixed_rows, permute, sample_rows
from pellucid.data.packing import Plan, count_rows, make_plan
from pellucid.data.shards import ShardReader, damage
from pellucid.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2  # 2: provenance names the stages that changed a document
MANIFEST = "manifest.json"
IGNORE = -100  # target of a position that predicts nothing
SAMPLES_AT_ONCE = 1 << 14  # whose rows are found together
VALIDATION_KEY = 0x76616C6964  # the fixed order of held-out rows, whatever the seed


Parts = tuple[ShardReader, Plan, np.ndarray | None]  # of a split: its documents, their rows, their labels [documents, K]


@dataclass
class Batch:
    """Rows for one forward pass, as torch tensors on the CPU (`to` moves them)."""

    tokens_BT: torch.Tensor  # int64; pad where nothing is
    targets_BT: torch.Tensor  # int64; IGNORE (-100) where nothing is
    segment_ids_BT: torch.Tensor  # int32; 0 = padding, 1.. = pieces of the row (all 1 with cross_document_attention)
    positions_BT: torch.Tensor  # int32; from 0 in each segment
    sample_ids_B: torch.Tensor  # int64; row of the split
    source_ids_B: torch.Tensor  # int64; entry of data.sources (of data.validation, for held-out sources)
    labels_BTK: torch.Tensor | None = None  # float32; at the last token of a labelled document what it is (see labels.py), else NaN

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the rows (a micro-batch)."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = (getattr(self, f.name) for f in fields(self))
        return Batch(*(None if tensor is None else change(tensor) for tensor in tensors))


class Dataset:
    """A folder that `prepare` made. Sizes of all files are checked on opening, and sha256 too unless verify=False.

    `manifest` (dict), `tokenizer`, `directory`; `train` and `validation` (None if nothing is held out) are splits
    in the order of seed 0: `split("train", seed)` gives that of another seed. `reused` tells whether prepare()
    found it ready. `run`: the [data] of a run, whose mixture, weights and epochs hold instead of those it was prepared
    with. Raises UserError that names a missing or damaged file.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True, run: DataConfig | None = None):
        self.directory = Path(directory)
        self.reused = False
        self.manifest = _read_manifest(self.directory)
        wrong = damage(self.directory, self.manifest["files"], hashes=verify)
        if wrong:
            raise UserError(f"{wrong}; remove the folder {self.directory} and build the data again")
        self.config = _settings(self.manifest, self.directory)
        self.mixture: list[MixtureSegment] = list(run.mixture) if run else []
        if run and run.prepared is None and len(run.sources) == len(self.config.sources):
            for source, wanted in zip(self.config.sources, run.sources, strict=True):
                source.weight, source.epochs = wanted.weight, wanted.epochs
        self.labels: dict[str, Any] | None = self.manifest.get("labels")  # names, and counts or mean and std
        self.tokenizer: Tokenizer = load_tokenizer(self.directory / "tokenizer")
        if self.mixture:
            self.train  # noqa: B018  says at once which shares cannot be

    @cached_property
    def train(self) -> Split:
        return self.split("train")

    @cached_property
    def validation(self) -> Split | None:
        return self.split("validation") if "validation" in self.manifest["splits"] else None

    def split(self, name: str, seed: int = 0) -> Split:
        """The "train" or "validation" split in the order of `seed` (training.seed)."""
        if name not in ("train", "validation"):
            raise UserError(f"{self.directory}: there is no split '{name}'; known: train, validation")
        if name not in self.manifest["splits"]:
            raise UserError(f"{self.directory}: holds no {name} split; set data.validation_fraction or data.validation")
        return Split(self._parts(name), self, name, seed)

    def _parts(self, name: str) -> Parts:
        if name not in self._opened:
            split = self.manifest["splits"][name]
            reader = ShardReader(self.directory / "shards", split["shards"])
            labels = None
            if self.labels:
                spread = (self.labels.get(key, ()) for key in ("mean", "std"))
                labels = encode(reader.labels(), self.labels["type"], self.labels["names"], *spread)
            self._opened[name] = reader, _plan(reader, self.config, name), labels
        return self._opened[name]

    @cached_property
    def _opened(self) -> dict[str, Parts]:
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the batches: shards, tokenizer, row length, packing, weights, epochs. Not of paths."""
        config = self.config
        shards = {name: file["sha256"] for name, file in self.manifest["files"].items() if name.endswith((".tok", ".idx"))}
        decisive = [self.manifest["format"], shards, self.manifest["splits"], self.tokenizer.fingerprint,
                    config.sequence_length, config.packing, config.cross_document_attention,
                    [source.weight for source in config.sources]]
        if any(source.epochs for source in config.sources):
            decisive.append([source.epochs for source in config.sources])
        if self.labels:
            decisive += [self.labels, config.truncation_side, *(self._parts(name)[0].labels() for name in self.manifest["splits"])]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class Split:
    """Rows of one split. Sample k of a run is one row, found from (seed, k) alone; a step takes the next batch_size.

    With all weights 1 an epoch is every row once, shuffled. A source of weight w has round(w * its rows) places in
    an epoch and goes through its rows again and again, each time in a new order, none twice before all once.
    With data.mixture the shares of the sources follow the step instead; an epoch then is as many rows as there are.
    A source of E epochs gives round(E * its rows) in the whole run; then the others share its places.
    """

    def __init__(self, parts: Parts, dataset: Dataset, name: str, seed: int):
        self.reader, self.plan, self.labels = parts
        self.name, self.seed, self.tokenizer = name, seed, dataset.tokenizer
        self.sequence_length = self.plan.sequence_length
        self.cross_document = dataset.config.cross_document_attention
        self.masking = [a for a in dataset.config.augment if isinstance(a, TokenMaskingConfig) and name == "train"]
        self.fingerprint = dataset.fingerprint
        self.mixture = dataset.mixture if name == "train" else []
        rows = self.plan.source_rows.tolist()
        sources = dataset.config.sources if name == "train" else [SourceConfig(path="")] * len(rows)
        weights = [1.0 if self.mixture else source.weight for source in sources]
        self.budgets = [None if source.epochs is None else max(min(count, 1), round(source.epochs * count))
                        for source, count in zip(sources, rows, strict=True)]
        for segment in self.mixture:
            if len(segment.shares) != len(self.plan.source_rows):
                raise UserError(f"data.mixture: {len(segment.shares)} shares for the {len(self.plan.source_rows)} sources of "
                                f"{dataset.directory} (one each, in order)")
            for index, share in enumerate(segment.shares):
                if share and not self.plan.source_rows[index]:
                    raise UserError(f"data.mixture: source {index} has a share but no rows to give")
        self.quotas = np.array([max(1, round(w * r)) if r else 0
                                for w, r in zip(weights, rows, strict=True)], dtype=np.int64)
        self.rows_per_epoch = int(self.quotas.sum())
        self._rows_of_samples = lru_cache(maxsize=4)(self._order)
        self._spelled: dict[int, int | None] = {}  # bytes_before_text of documents

    def __len__(self) -> int:
        """Number of different rows."""
        return self.plan.rows

    @cached_property
    def tokens_per_epoch(self) -> int:
        """Predicted tokens of one epoch (rounded where weights are not 1)."""
        row_tokens = np.add.reduceat(self.plan.length, self.plan.row_first[:-1])
        source = np.repeat(np.arange(len(self.quotas)), self.plan.source_rows)
        tokens = np.bincount(source, weights=row_tokens, minlength=len(self.quotas))
        return round(float((tokens * self.quotas / np.maximum(1, self.plan.source_rows)).sum()))

    def epoch_of(self, step: int, batch_size: int) -> float:
        """Epochs completed before this step."""
        return step * batch_size / self.rows_per_epoch

    def steps_in_all(self, batch_size: int) -> int | None:
        """Steps until every source has been read as often as its `epochs` allow; None: no end."""
        stop = self._mixture(batch_size).stop if self._scheduled else None
        return None if stop is None else stop // batch_size

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of step 0, 1, ... of the run: samples step * batch_size and on."""
        return self.samples(step * batch_size, (step + 1) * batch_size, batch_size)

    def samples(self, start: int, stop: int, batch_size: int = 1) -> Batch:
        """Samples start..stop-1 of the run (what a rank's part of a batch, or a growing batch, needs).

        `batch_size` is that of the run: it says where the steps of data.mixture lie.
        """
        batch = self._assemble(self._sample_rows(start, stop, batch_size))
        for entry in self.masking:
            masked = mask_tokens(batch.tokens_BT.numpy(), batch.segment_ids_BT.numpy(), np.arange(start, stop),
                                 rate=entry.rate, seed=self.seed, eos_token_id=self.tokenizer.eos_token_id)
            batch.tokens_BT = torch.from_numpy(masked)
        return batch

    def rows(self, start: int, stop: int) -> Batch:
        """Each row once in one fixed order that no seed changes (evaluation); stops at the last row."""
        order = permute(np.arange(start, min(stop, len(self))), len(self), VALIDATION_KEY)
        return self._assemble(order)

    def trace(self, step: int, batch_size: int) -> list[dict[str, Any]]:
        """Which documents a step's batch holds, without running it: one dict per piece.

        row (in the batch), sample (row of the split), document, source (uri), source_index, ordinal, segment,
        position_start, length, token_start (within the document), label (of a labelled document, else None),
        byte_start and byte_end in the decompressed source: of the piece where `exact`, else of its whole document (for
        parquet, row numbers).
        """
        return self.describe_rows(self._sample_rows(step * batch_size, (step + 1) * batch_size, batch_size))

    def describe_rows(self, sample_ids: np.ndarray) -> list[dict[str, Any]]:
        """As `trace`, for given rows of the split (a batch's sample_ids_B)."""
        row, piece, position, segment = self._pieces(np.asarray(sample_ids))
        plan = self.plan
        provenance = self.reader.provenance(plan.document[piece].tolist())
        return [{
            "row": int(row[n]), "sample": int(sample_ids[row[n]]), "document": int(plan.document[p]),
            "source": origin["source"], "source_index": origin["source_index"], "ordinal": origin["ordinal"],
            **self.byte_range(int(plan.document[p]), int(plan.start[p]), int(plan.start[p] + plan.length[p]), origin),
            "segment": int(segment[n]), "position_start": int(position[n]),
            "length": int(plan.length[p]), "token_start": int(plan.start[p]), "label": origin.get("label"),
        } for n, (p, origin) in enumerate(zip(piece, provenance, strict=True))]

    def document(self, index: int) -> dict[str, Any]:
        """Provenance, tokens (closing eos included) and text of one document of this split."""
        first, last = int(self.reader.starts[index]), int(self.reader.ends[index])
        tokens = self.reader.tokens(np.arange(first, last)).tolist()
        return {**self.reader.provenance([index])[0], "token_ids": tokens, "text": self.text_of(index)}

    def text_of(self, index: int) -> str:
        """The text of one document, after all stages."""
        first, last = int(self.reader.starts[index]), int(self.reader.ends[index])
        return self.tokenizer.decode(self.reader.tokens(np.arange(first, last - 1)).tolist())

    def steps_with(self, rows: set[int], steps: int, batch_size: int) -> list[int]:
        """Which of the steps 0..steps-1 of a run saw any of these rows."""
        found = self.steps_of_rows(rows, steps, batch_size)
        return sorted({step for seen in found.values() for step in seen})

    def steps_of_rows(self, rows: set[int], steps: int, batch_size: int) -> dict[int, list[int]]:
        """{row: those of the steps 0..steps-1 of a run that saw it}."""
        wanted, found = np.array(sorted(rows), dtype=np.int64), {row: [] for row in rows}
        for first in range(0, steps * batch_size, 1 << 18):
            last = min(first + (1 << 18), steps * batch_size)
            seen = self._sample_rows(first, last, batch_size)
            for sample in np.flatnonzero(np.isin(seen, wanted)).tolist():
                found[int(seen[sample])].append((first + sample) // batch_size)
        return found

    def rows_of_document(self, index: int, tokens: Sequence[tuple[int, int]] | None = None) -> set[int]:
        """The rows that hold a piece of a document; or of these (first, stop) ranges of its tokens."""
        plan, pieces = self.plan, np.flatnonzero(self.plan.document == index)
        if tokens is not None:
            start, stop = plan.start[pieces], plan.start[pieces] + plan.length[pieces]
            pieces = pieces[np.any([(start < end) & (stop > first) for first, end in tokens], axis=0)]
        return set((np.searchsorted(plan.row_first, pieces, side="right") - 1).tolist())

    def _sample_rows(self, start: int, stop: int, batch_size: int) -> np.ndarray:
        end = self._mixture(batch_size).stop if self._scheduled else None
        if end is not None and stop > end:
            raise UserError(f"data.sources: their epochs give {end:,} rows, and sample {stop - 1:,} is asked for; raise an epochs")
        first = start // SAMPLES_AT_ONCE
        parts = [self._rows_of_samples(number, batch_size) for number in range(first, -(-stop // SAMPLES_AT_ONCE))]
        return np.concatenate([*parts, np.empty(0, np.int64)])[start - first * SAMPLES_AT_ONCE :][: stop - start]

    def _order(self, number: int, batch_size: int) -> np.ndarray:
        """The rows of SAMPLES_AT_ONCE samples; many at once cost little more than one."""
        samples = np.arange(number * SAMPLES_AT_ONCE, (number + 1) * SAMPLES_AT_ONCE)
        if self._scheduled:
            return mixed_rows(samples, self.plan.source_rows, self._mixture(batch_size), self.seed)
        return sample_rows(samples, self.plan.source_rows, self.quotas, self.seed)

    def _mixture(self, batch_size: int) -> Mixture:
        if batch_size not in self._mixtures:
            segments = [(segment.from_step * batch_size, segment.shares) for segment in self.mixture]
            self._mixtures[batch_size] = make_mixture(segments or [(0, self.quotas.tolist())], self.seed, self.budgets)
        return self._mixtures[batch_size]

    @property
    def _scheduled(self) -> bool:
        return bool(self.mixture) or any(budget is not None for budget in self.budgets)

    @cached_property
    def _mixtures(self) -> dict[int, Mixture]:
        return {}

    def _pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(row in the batch, piece, first position, segment 1..) of every piece of some rows, row by row."""
        first, counts = self.plan.row_first[rows], self.plan.row_first[rows + 1] - self.plan.row_first[rows]
        row = np.repeat(np.arange(len(rows)), counts)
        segment = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        piece = np.repeat(first, counts) + segment
        length = self.plan.length[piece]
        flat = np.cumsum(length) - length
        position = flat - np.repeat(flat[np.cumsum(counts) - counts], counts) if len(row) else flat
        return row, piece, position, segment + 1

    def _assemble(self, rows: np.ndarray) -> Batch:
        B, T = len(rows), self.sequence_length
        row, piece, position, segment = self._pieces(rows)
        length, document = self.plan.length[piece], self.plan.document[piece]
        first = self.reader.starts[document] + self.plan.start[piece]
        windows = [self.reader.window(at, n) for at, n in zip(first.tolist(), length.tolist(), strict=True)]
        inputs, outputs = (np.concatenate([np.empty(0, "<u4"), *(window[n] for window in windows)]) for n in (0, 1))
        begins = np.cumsum(length) - length  # of each piece, among all tokens of the batch
        inputs[begins[self.plan.start[piece] == 0]] = self.tokenizer.eos_token_id
        numbers = np.repeat(segment.astype(np.int32), length)
        within = np.arange(len(numbers), dtype=np.int32) - np.repeat(begins.astype(np.int32), length)
        tokens = np.full((B, T), self.tokenizer.pad_token_id, dtype=np.int64)
        targets = np.full((B, T), IGNORE, dtype=np.int64)
        segments, positions = np.zeros((B, T), dtype=np.int32), np.zeros((B, T), dtype=np.int32)
        ends = np.cumsum(np.bincount(row, weights=length, minlength=B)).astype(np.int64).tolist()
        for r, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):  # a row's pieces lie from its start on
            used = stop - start
            tokens[r, :used], targets[r, :used] = inputs[start:stop], outputs[start:stop]
            segments[r, :used] = 1 if self.cross_document else numbers[start:stop]
            positions[r, :used] = np.arange(used) if self.cross_document else within[start:stop]
        source = np.searchsorted(np.cumsum(self.plan.source_rows), rows, side="right")
        shaped = [torch.from_numpy(array) for array in (tokens, targets, segments, positions)]
        labels = None
        if self.labels is not None:
            labels = torch.full((B, T, self.labels.shape[1]), torch.nan)
            labels[torch.from_numpy(row), torch.from_numpy(position + length - 1)] = torch.from_numpy(self.labels[document])
        return Batch(*shaped, torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(source.astype(np.int64)), labels)

    def byte_range(self, document: int, start: int, stop: int, origin: dict[str, Any]) -> dict[str, Any]:
        """Bytes of some tokens of a document: the sum of their own bytes, where these are the source's; else the whole document's."""
        before = self.bytes_before_text(document, origin)
        if before is None:
            return {"byte_start": origin["byte_start"], "byte_end": origin["byte_end"], "exact": False}
        first = int(self.reader.starts[document])
        ends = np.cumsum(self.tokenizer.byte_lengths[self.reader.tokens(np.arange(first, first + stop))].clip(0))
        bounds = [max(0, int(ends[n - 1]) - before) if n else 0 for n in (start, stop)]
        return {"byte_start": origin["byte_start"] + bounds[0], "byte_end": origin["byte_start"] + bounds[1], "exact": True}

    def bytes_before_text(self, document: int, origin: dict[str, Any]) -> int | None:
        """How many bytes a document's tokens spell before its text: SentencePiece puts a space there. None where they do not
        spell the very bytes of the source: a stage changed these, or the tokenizer did (the content hash tells)."""
        if document not in self._spelled:  # one look through a document serves all of its pieces
            self._spelled[document] = self._spell(document, origin) if origin["exact"] else None
        return self._spelled[document]

    def _spell(self, document: int, origin: dict[str, Any]) -> int | None:
        first = int(self.reader.starts[document])
        tokens = self.reader.tokens(np.arange(first, first + origin["tokens"])).tolist()
        spelled = b"".join(map(self.tokenizer.token_bytes, tokens))
        before = max(0, len(spelled) - origin["text_bytes"])
        return before if hashlib.blake2b(spelled[before:], digest_size=16).digest() == origin["content_hash"] else None


def packing_of(folder: Path, split: dict[str, Any], config: DataConfig, name: str) -> dict[str, Any]:
    """The manifest's `packing` of a split whose shards lie in folder/shards: what its plan will be, without making it."""
    readers = (ShardReader(folder / "shards", [shard]) for shard in split["shards"])
    lengths = ((reader.lengths, reader.source_index) for reader in readers)
    rows, utilization, truncated = count_rows(lengths, *_packed(config, name))
    counts = {"rows": rows, "utilization": utilization}
    return counts | ({"truncated_documents": truncated} if config.label_fields else {})


def _plan(reader: ShardReader, config: DataConfig, name: str) -> Plan:
    return make_plan(reader.lengths, reader.source_index, *_packed(config, name))


def _packed(config: DataConfig, name: str) -> tuple[int, int, str, str | None]:
    sources = config.validation if name == "validation" and config.validation else config.sources
    return len(sources), config.sequence_length, config.packing, config.truncation_side if config.label_fields else None


def _settings(manifest: dict[str, Any], directory: Path) -> DataConfig:
    known = {key: value for key, value in manifest["settings"].items() if key in DataConfig.model_fields}
    try:
        return DataConfig.model_validate(known)
    except ValidationError as error:
        raise UserError(f"{directory / MANIFEST}: settings this version does not know "
                        f"({explain_validation_error(error, DataConfig)}); build the data again") from None


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this a folder of prepared data?") from None
    except ValueError:
        raise UserError(f"{path}: damaged (not valid JSON); remove the folder and build the data again") from None
    needed = {"settings", "splits", "files", "tokenizer"}
    if isinstance(manifest, dict) and (directory / "config.toml").is_file() and "data" in manifest:
        raise UserError(f"{directory}: a run; the data it was trained on are in {manifest['data'].get('directory')}")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not needed <= manifest.keys():
        raise UserError(f"{path}: not a manifest of data format {FORMAT}; build the data again")
    return manifest
