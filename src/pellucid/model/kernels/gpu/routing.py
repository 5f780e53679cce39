"""The router's choice and the sort by expert, in Triton: softmax, top-k (ties to the lower index), counts, places.

No host synchronisation: one launch chooses, one counts block by block, one gives every (token, choice) pair its row. Rows
of one expert lie together, in token order, and each expert begins at a multiple of TILE, so that a tile of a product
belongs to one expert. The definitions are `MoE.route_plain` and torch's stable sort.
Letters: N tokens, E experts, k choices; M rows: N*k, and what fills up the last tile of each expert (token -1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels.gpu.launch import INTERPRETED

BLOCK = 64  # tokens of a program
TILE = 16 if INTERPRETED else 128  # rows of a tile


@dataclass
class Order:
    """Where each pair stands, and what stands in each row."""

    row_Nk: Tensor  # int64
    token_M: Tensor  # int32; -1: none
    expert_of_tile: Tensor  # int32; -1: none
    first_E: Tensor  # int64: first row of each expert
    tokens_E: Tensor  # int64: its real rows
    used: Tensor  # int32 scalar: tiles that belong to an expert; they come first
    host_E: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))  # tokens_E, if the host knows it

    def to_host(self) -> torch.cuda.Event | None:
        """Begin to copy the numbers of rows; they are there when the event is past (at once where there is no GPU)."""
        on_gpu = self.tokens_E.is_cuda
        self.host_E = torch.empty(self.tokens_E.shape, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.host_E.copy_(self.tokens_E, non_blocking=on_gpu)
        return torch.cuda.current_stream(self.tokens_E.device).record_event() if on_gpu else None

    def stretches(self) -> Iterator[tuple[int, slice]]:
        """Each expert's rows, where the host knows their number."""
        start = 0
        for expert, rows in enumerate(self.host_E.tolist()):
            yield expert, slice(start, start + rows)
            start += (rows + TILE - 1) // TILE * TILE


@triton.jit
def _choose(logits, bias, probs, index, gate, N, E: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, BLOCK_E)
    inside = (rows[:, None] < N) & (experts[None, :] < E)
    at = rows[:, None].to(tl.int64) * E + experts[None, :]
    scores = tl.load(logits + at, mask=inside, other=-1e38)
    scores = tl.where(experts[None, :] < E, tl.exp(scores - tl.max(scores, 1)[:, None]), 0.0)
    p = scores / tl.sum(scores, 1)[:, None]
    tl.store(probs + at, p, mask=inside)
    left = tl.where(experts[None, :] < E, p + tl.load(bias + experts, mask=experts < E, other=0.0)[None, :], -1e38)
    left = tl.where(left == left, left, 1e38)  # NaN counts as the greatest, as in torch.topk: it must choose experts that exist
    for choice in tl.static_range(k):
        chosen = tl.min(tl.where(left == tl.max(left, 1)[:, None], experts[None, :], BLOCK_E - 1), 1)
        hit = experts[None, :] == chosen[:, None]
        tl.store(index + rows.to(tl.int64) * k + choice, chosen.to(tl.int64), mask=rows < N)
        tl.store(gate + rows.to(tl.int64) * k + choice, tl.sum(tl.where(hit, p, 0.0), 1), mask=rows < N)
        left = tl.where(hit, -2e38, left)


@triton.jit
def _hits(index, rows, experts, N, k: tl.constexpr):
    """int32 [BLOCK, BLOCK_E]: 1 where a token chose the expert."""
    hits = tl.zeros((rows.shape[0], experts.shape[0]), tl.int32)
    for choice in tl.static_range(k):
        expert = tl.load(index + rows.to(tl.int64) * k + choice, mask=rows < N, other=-1).to(tl.int32)
        hits += (expert[:, None] == experts[None, :]).to(tl.int32)
    return hits


@triton.jit
def _count(index, counts, N, E: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    hits = _hits(index, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), experts, N, k)
    tl.store(counts + tl.program_id(0) * E + experts, tl.sum(hits, 0), mask=experts < E)


@triton.jit
def _place(index, before, row, token, N, E: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """`before`: the row that each (block, expert) begins at."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, BLOCK_E)
    hits = _hits(index, rows, experts, N, k)
    start = tl.load(before + tl.program_id(0) * E + experts, mask=experts < E, other=0)
    places = start[None, :] + tl.cumsum(hits, 0) - hits
    for choice in tl.static_range(k):
        pair = rows.to(tl.int64) * k + choice
        expert = tl.load(index + pair, mask=rows < N, other=-1).to(tl.int32)
        place = tl.sum(tl.where(expert[:, None] == experts[None, :], places, 0), 1).to(tl.int64)
        tl.store(row + pair, place, mask=rows < N)
        tl.store(token + place, rows, mask=rows < N)


@torch.library.custom_op("pellucid::route", mutates_args=())
def _route(logits_NE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits_NE = logits_NE.contiguous()
    N, E = logits_NE.shape
    probs_NE, gate_Nk = torch.empty_like(logits_NE), logits_NE.new_empty(N, k)
    index_Nk = torch.empty(N, k, dtype=torch.int64, device=logits_NE.device)
    grid = (triton.cdiv(N, BLOCK),)
    _choose[grid](logits_NE, bias_E, probs_NE, index_Nk, gate_Nk, N, E, k, BLOCK, triton.next_power_of_2(E))
    return probs_NE, index_Nk, gate_Nk


@_route.register_fake
def _(logits_NE, bias_E, k):
    shape = (len(logits_NE), k)
    return torch.empty_like(logits_NE), logits_NE.new_empty(shape, dtype=torch.int64), logits_NE.new_empty(shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[:2])
    ctx.mark_non_differentiable(output[1])


def _softmax_gradient(ctx, grad_probs, _index, grad_gate):
    probs_NE, index_Nk = ctx.saved_tensors
    grad = grad_probs.scatter_add(1, index_Nk, grad_gate)
    return probs_NE * (grad - (grad * probs_NE).sum(-1, keepdim=True)), None, None


_route.register_autograd(_softmax_gradient, setup_context=_save)


def route(logits_NE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(probs_NE, expert_index_Nk best first, gate_Nk): softmax over all experts, top-k of probs + bias, not renormalised."""
    return _route(logits_NE, bias_E, k)


def sort_by_expert(expert_index_Nk: Tensor, E: int) -> Order:
    """The order in which the experts' products run. Nothing waits for the GPU: the number of rows depends on N alone."""
    index, (N, k), device = expert_index_Nk.contiguous(), expert_index_Nk.shape, expert_index_Nk.device
    blocks, size = triton.cdiv(N, BLOCK), (E, k, BLOCK, triton.next_power_of_2(E))
    counts = torch.empty(blocks, E, dtype=torch.int32, device=device)
    _count[(blocks,)](index, counts, N, *size)
    tokens_E = counts.sum(0)
    ends_E = ((tokens_E + TILE - 1) // TILE * TILE).cumsum(0)
    first_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    before = (first_E + counts.cumsum(0) - counts).to(torch.int32).contiguous()
    tiles = triton.cdiv(N * k, TILE) + E
    row_Nk, token_M = torch.empty_like(index), torch.full((tiles * TILE,), -1, dtype=torch.int32, device=device)
    _place[(blocks,)](index, before, row_Nk, token_M, N, *size)
    expert = torch.searchsorted(ends_E, torch.arange(0, tiles * TILE, TILE, device=device), right=True)
    return Order(row_Nk, token_M, torch.where(expert < E, expert, -1).to(torch.int32), first_E, tokens_E,
                 (ends_E[-1] // TILE).to(torch.int32))  # fmt: skip
