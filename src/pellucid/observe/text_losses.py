"""Where in the text the loss was: by position, by source, by document, and the worst tokens of each step.

All sums are formed on the device, micro-batch by micro-batch; nothing waits. Positions are counted within a document
piece and grouped by powers of two: 0, 1, 2-3, 4-7, ... Letters: B rows, T positions, N = B*T.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.observe.columns import LOSS
from pellucid.observe.store import MISSING, Record, Row

SEGMENTS = 256  # document pieces of a row told apart
DOCUMENTS = 128  # pieces of a step recorded, those with the highest loss
WORST = 16  # tokens of a step recorded
PAIRS = 512  # of a step, looked at for whether targets follow from inputs
DOCUMENT_ROW = "INSERT OR REPLACE INTO document_loss VALUES (?, ?, ?, ?, ?, ?)"
TOKEN_ROW = "INSERT OR REPLACE INTO worst_token VALUES (?, ?, ?, ?, ?, ?, ?)"
SAMPLE_ROW = "INSERT INTO sample (step, row, sample_id, tokens, targets, losses) VALUES (?, ?, ?, ?, ?, ?)"


class TextLossProbe:
    """Accumulates over the micro-batches of a step; take() hands over and starts anew."""

    def __init__(self, sequence_length: int, sources: list[str], categories: int):
        """categories: tokens, or classes, that the loss is a choice among; 0: it is about numbers."""
        self.buckets = int(sequence_length - 1).bit_length() + 1
        self.sources = sources
        self.categories = categories
        self.target_counts: Tensor | None = None  # of the whole session, for the entropy of word frequencies
        self.steps = 0
        self._start()

    def _start(self) -> None:
        self._rows = 0
        self._totals: dict[str, Tensor] = {}
        self._documents: list[Tensor] = []
        self._hashes: list[Tensor] = []
        self._worst: list[Tensor] = []
        self._sample: Tensor | None = None
        self._pairs: Tensor | None = None

    def rows(self) -> tuple[list[Row], list[Row]]:
        """Axes of the streams `position` and `source`."""
        spans = ["0"] + [f"{2**b}-{2 ** (b + 1) - 1}" if b else "1" for b in range(self.buckets - 1)]
        return [Row(span) for span in spans], [Row(source) for source in self.sources]

    @torch.no_grad()
    def add(self, batch: Any, per_token_N: Tensor, real_N: Tensor, keep_row: bool) -> None:
        """per_token_N: loss, 0 where real_N is False, that is, where nothing is predicted; batch: the micro-batch.
        keep_row: sample its first row."""
        B, T = batch.tokens_BT.shape
        losses_BT, real_BT = per_token_N.detach().float().view(B, T), real_N.view(B, T)
        both = torch.stack([losses_BT, real_BT.float()])  # loss sum and token count of whatever is summed
        bucket = torch.frexp(batch.positions_BT.float()).exponent.long().clamp_(0, self.buckets - 1).view(-1)
        self._sum("position", both.view(2, -1), bucket, self.buckets)
        self._sum("source", both.sum(-1), batch.source_ids_B.clamp(0, len(self.sources) - 1), len(self.sources))
        segment = batch.segment_ids_BT.long().clamp(0, SEGMENTS - 1)
        piece = (segment + SEGMENTS * torch.arange(B, device=both.device)[:, None]).view(-1)
        sums = torch.zeros(3, B * SEGMENTS, device=both.device)
        sums[:2].index_add_(1, piece, both.view(2, -1))
        sums[2].scatter_reduce_(0, piece, losses_BT.reshape(-1), "amax")
        self._documents.append(sums)
        worst = losses_BT.reshape(-1).topk(min(WORST, B * T))
        at = worst.indices
        tokens, targets = batch.tokens_BT.reshape(-1)[at], batch.targets_BT.reshape(-1)[at]
        self._worst.append(torch.stack([at // T + self._rows, at % T, tokens, targets, worst.values]).float())
        if keep_row and self._sample is None:
            high_low = torch.stack([batch.sample_ids_B[0] >> 20, batch.sample_ids_B[0] & 0xFFFFF])  # fits float32
            self._sample = torch.cat([high_low.float(), batch.tokens_BT[0].float(),
                                      batch.targets_BT[0].float(), losses_BT[0]])  # fmt: skip
        self._rows += B
        weights = torch.arange(1, T + 1, device=both.device) * 2654435761 % (1 << 31)  # Knuth's multiplicative hash
        self._hashes.append(((batch.tokens_BT * weights).sum(1) % ((1 << 31) - 1)).int())
        if self._pairs is None and batch.labels_BTK is None:
            at = torch.linspace(0, B * T - 1, min(PAIRS, B * T), device=both.device).long()
            self._pairs = torch.stack([batch.tokens_BT.reshape(-1)[at], batch.targets_BT.reshape(-1)[at]]).int()
        if not self.categories:
            return
        if self.target_counts is None:
            self.target_counts = torch.zeros(self.categories + 1, device=both.device)
        chosen_BT = batch.targets_BT if batch.labels_BTK is None else batch.labels_BTK[..., 0].nan_to_num().long()
        targets = torch.where(real_N, chosen_BT.reshape(-1), self.categories)
        self.target_counts.index_add_(0, targets, torch.ones_like(targets, dtype=torch.float32))

    def _unigram_entropy(self) -> Tensor:
        """[1]: entropy in nats of all targets so far: the loss of knowing frequencies and nothing else."""
        counts = self.target_counts[:-1]
        total = counts.sum()
        return (total.log() - torch.special.xlogy(counts, counts).sum() / total)[None]

    def _sum(self, name: str, values: Tensor, index: Tensor, size: int) -> None:
        total = torch.zeros(2, size, device=values.device).index_add_(1, index, values)
        self._totals[name] = self._totals[name] + total if name in self._totals else total

    def take(self) -> dict[str, Tensor]:
        out = dict(self._totals)
        if self._documents:
            out |= {"documents": torch.cat(self._documents, 1), "worst": torch.cat(self._worst, 1)}
            out["hashes"] = torch.cat(self._hashes)
        self.steps += 1
        if self.steps % 20 == 0 and self.target_counts is not None:
            out["unigram"] = self._unigram_entropy()
        if self._sample is not None:
            out["sample"] = self._sample
        if self._pairs is not None:
            out["pairs"] = self._pairs
        self._start()
        return out

    def finish(self, sums: dict[str, np.ndarray], record: Record) -> None:
        """Adds frames `position` and `source`, document losses, worst tokens and the kept row to the record."""
        for name in ("position", "source"):
            total, count = sums[name]
            with np.errstate(all="ignore"):
                loss = np.where(count > 0, total / count, MISSING)
            record.frames[name] = np.stack([loss, count], 1).astype(np.float32).reshape(-1, len(LOSS))
        self._documents_of(sums["documents"], record)
        worst = sums["worst"][:, _from_worst(sums["worst"][4])[:WORST]].T
        record.rows.append((TOKEN_ROW, [
            (record.step, rank, *(int(v) for v in row[:4]), float(row[4])) for rank, row in enumerate(worst) if row[4] != 0]))
        if "sample" in sums:
            high, low = sums["sample"][:2].astype(int).tolist()
            sample_id, rest = (high << 20) + low, sums["sample"][2:].reshape(3, -1)
            tokens, targets, losses = rest[0].astype("<i4"), rest[1].astype("<i4"), rest[2].astype("<f4")
            record.rows.append((SAMPLE_ROW, [
                (record.step, 0, sample_id, tokens.tobytes(), targets.tobytes(), losses.tobytes())]))

    def _documents_of(self, sums: np.ndarray, record: Record) -> None:
        total, count, worst = sums
        pieces = np.flatnonzero(count)
        mean = total[pieces] / count[pieces]
        order = _from_worst(mean)[:DOCUMENTS]
        record.rows.append((DOCUMENT_ROW, [
            (record.step, int(p // SEGMENTS), int(p % SEGMENTS), int(count[p]), float(m), float(worst[p]))
            for p, m in zip(pieces[order], mean[order], strict=True)]))


def _from_worst(losses: np.ndarray) -> np.ndarray:
    """Their places, the highest loss first; NaN is worse than any number."""
    return np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")
