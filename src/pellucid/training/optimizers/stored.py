"""Moments kept smaller, or elsewhere, than the update uses them: in bf16, or in host memory beside a GPU.

One piece of a tensor after the other is brought to the weight's device and dtype, updated by its rule, and put back, so
that only a piece's moments exist in full. bf16: rounded stochastically (see rounding.py), and 4 bytes a parameter less than
Adam's 8; DeepSeek-V3 was trained with both moments in bf16 (2024, arXiv 2412.19437, section 3.3). In host memory: the same
bits as on the device; copies run beside the computation where the device has streams. Adam's bf16 moments on a CPU are
updated where they lie, in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.sgd import sgd as torch_sgd

from pellucid.model.kernels import native
from pellucid.training.optimizers.lion import lion_
from pellucid.training.optimizers.muon import muon_
from pellucid.training.optimizers.rounding import round_plain, round_stochastically, rounding_key

PIECE = {"cpu": 2**18, "cuda": 2**24}  # elements: should stay in a cache, or fill the GPU
MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",),
           "muon": ("momentum_buffer",), "sgd": ("momentum_buffer",)}  # fmt: skip


class Stored(torch.optim.Optimizer):
    """The rules of `groups` (of the ordinary optimizer), with their moments stored as `dtype` (None: the weight's), and on
    the host if `offload`. The state has their usual names, and always a `step` count, which the rounding needs."""

    def __init__(self, groups: list[dict], *, dtype: torch.dtype | None, offload: bool, seed: int):
        super().__init__([dict(group) for group in groups], {})
        self.dtype, self.offload, self.seed = dtype, offload, seed
        self.idle: dict[str, Tensor] = {}  # by name, the experts that the next step leaves alone (see idle.py)
        device = self.param_groups[0]["params"][0].device
        self.beside = torch.cuda.Stream(device) if offload and device.type == "cuda" else None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        pieces = self._pieces()
        following = next(pieces, None)
        arriving = self._fetch(following)
        while following is not None:
            piece, (moments, ready) = following, arriving
            following = next(pieces, None)
            arriving = self._fetch(following)  # the next one travels while this one is computed
            if ready is not None:
                torch.cuda.current_stream().wait_event(ready)
            UPDATES[piece.group["rule"]](piece, moments)
            self._put_back(piece, moments)
        if self.beside is not None:
            self.beside.synchronize()  # the host may read its memory now

    def as_stored(self, name: str, moments: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What the state of tensor `name` becomes when its step number `step` (from 1) leaves these moments: the definition."""
        narrow = lambda key, moment: round_plain(moment.float().contiguous(), rounding_key(self.seed, step, f"{key}.{name}"))
        kept = {key: moment if self.dtype is None else narrow(key, moment) for key, moment in moments.items() if key != "step"}
        return {"step": torch.tensor(float(step)), **kept}

    def placed(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor where a moment of a weight on `device` lives between steps; a count of steps stays on the host."""
        if tensor.ndim and not self.offload:
            return tensor.to(device)
        host = tensor.cpu()
        return host.pin_memory() if tensor.ndim and device.type == "cuda" else host

    def _pieces(self) -> Iterator[_Piece]:
        for group in self.param_groups:
            for name, weight in zip(group["names"], group["params"], strict=True):
                if weight.grad is None:
                    continue
                state = self._state_of(weight, group)
                used = _used(weight, self.idle.get(name))
                piece = PIECE.get(native.dry() or weight.device.type, PIECE["cuda"])
                size = weight.numel() if self._in_one_pass(weight, group) else piece
                cuts = _matrices(weight, used) if group["rule"] == "muon" else _slices(used, size)
                before = state["step"].clone()
                state["step"] += 1
                gradient = weight.grad.contiguous()
                for first, cut in cuts:
                    kept = {key: cut(state[key]) for key in _keys(group)}
                    yield _Piece(name, group, cut(weight.detach()), cut(gradient), kept, before, first, self.seed)

    def _in_one_pass(self, weight: Tensor, group: dict) -> bool:
        """Whether a kernel updates the weight and its moments as they are stored."""
        adam_in_bf16 = self.dtype == torch.bfloat16 and group["rule"] in ("adam", "adamw")
        return adam_in_bf16 and weight.dtype == torch.float32 and native.fits(weight)

    def _state_of(self, weight: Tensor, group: dict) -> dict[str, Tensor]:
        state, home = self.state[weight], "cpu" if self.offload else weight.device
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        for key in _keys(group):
            if key not in state:
                zeros = torch.zeros(weight.shape, dtype=self.dtype or weight.dtype, device=home)
                state[key] = self.placed(zeros, weight.device)
        return state

    def _fetch(self, piece: _Piece | None) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The piece's moments on the weight's device, in its dtype; the event to wait for. A copy where anything differs."""
        if piece is None:
            return {}, None
        like = piece.weight
        if self._in_one_pass(like, piece.group):
            return piece.kept, None
        if self.beside is None:
            return {key: kept.to(like.device, like.dtype) for key, kept in piece.kept.items()}, None
        with torch.cuda.stream(self.beside):
            moments = {key: kept.to(like.device, non_blocking=True).to(like.dtype) for key, kept in piece.kept.items()}
        for moment in moments.values():
            moment.record_stream(torch.cuda.current_stream())
        return moments, self.beside.record_event()

    def _put_back(self, piece: _Piece, moments: dict[str, Tensor]) -> None:
        for key, moment in moments.items():
            kept = piece.kept[key]
            if moment is kept:
                continue  # updated in place
            if self.dtype is not None:
                moment = round_stochastically(moment.float().contiguous(), piece.rounding_key(key), piece.first)
            if self.beside is None:
                kept.copy_(moment)
                continue
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):
                kept.copy_(moment, non_blocking=True)
            moment.record_stream(self.beside)


@dataclass
class _Piece:
    """Some elements of one tensor: views of its weight, gradient and stored moments."""

    name: str
    group: dict
    weight: Tensor
    gradient: Tensor
    kept: dict[str, Tensor]
    before: Tensor  # the count of steps already done
    first: int  # index of its first element in the tensor
    seed: int

    def rounding_key(self, moment: str) -> int:
        return rounding_key(self.seed, int(self.before) + 1, f"{moment}.{self.name}")


def _keys(group: dict) -> tuple[str, ...]:
    return () if group["rule"] == "sgd" and not group["momentum"] else MOMENTS[group["rule"]]


def _used(weight: Tensor, idle_E: Tensor | None) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of elements whose experts are in use."""
    if idle_E is None:
        yield 0, weight.numel()
        return
    each = weight[0].numel()
    yield from ((each * first, each * end) for first, end in experts_in_use(idle_E))


def experts_in_use(idle_E: Tensor) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of experts that are not idle."""
    first = 0
    for is_idle, run in groupby(idle_E.tolist()):
        end = first + len(list(run))
        if not is_idle:
            yield first, end
        first = end


def _slices(used: Iterator[tuple[int, int]], size: int) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    """(first element, how to cut it out of a tensor of this shape), for rules that treat every element alike."""
    for begin, end in used:
        for first in native.starts(end - begin, size):
            at = slice(begin + first, min(end, begin + first + size))
            yield at.start, lambda tensor, at=at: tensor.view(-1)[at]


def _matrices(weight: Tensor, used: Iterator[tuple[int, int]]) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    """One expert, or the whole tensor, for a rule that treats matrices."""
    each = weight[0].numel()
    for begin, end in used if weight.ndim > 2 else [(0, each)]:
        for first in range(begin, end, each):
            yield first, (lambda tensor, e=first // each: tensor[e]) if weight.ndim > 2 else lambda tensor: tensor


def _adam(piece: _Piece, moments: dict[str, Tensor]) -> None:
    group, (beta1, beta2) = piece.group, piece.group["betas"]
    if moments is piece.kept:  # as they are stored: see _in_one_pass
        step, decay, decoupled = int(piece.before) + 1, group["weight_decay"], group["rule"] == "adamw"
        native.call("adam_rounded", piece.weight.dtype, piece.weight, piece.gradient, moments["exp_avg"], moments["exp_avg_sq"],
                    piece.weight.numel(), piece.rounding_key("exp_avg"), piece.rounding_key("exp_avg_sq"), piece.first,
                    group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5, beta1, 1 - beta1, beta2, 1 - beta2, group["eps"],
                    1 - group["lr"] * decay if decoupled else 1.0, 0.0 if decoupled else decay)  # fmt: skip
        return
    steps = [piece.before.to(piece.weight.device, copy=True)]
    torch_adam([piece.weight], [piece.gradient], [moments["exp_avg"]], [moments["exp_avg_sq"]], [], steps, lr=group["lr"],
               beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"], fused=group["fused"],
               decoupled_weight_decay=group["rule"] == "adamw", amsgrad=False, maximize=False)  # fmt: skip


def _sgd(piece: _Piece, moments: dict[str, Tensor]) -> None:
    group = piece.group
    settings = {key: group[key] for key in ("weight_decay", "momentum", "lr", "nesterov", "fused")}
    torch_sgd([piece.weight], [piece.gradient], list(moments.values()) or [None], dampening=0.0, maximize=False, **settings)


def _lion(piece: _Piece, moments: dict[str, Tensor]) -> None:
    lion_([piece.weight], [piece.gradient], [moments["exp_avg"]], piece.group)


def _muon(piece: _Piece, moments: dict[str, Tensor]) -> None:
    parts = piece.group["parts"][piece.group["names"].index(piece.name)]
    muon_([piece.weight], [piece.gradient], [moments["momentum_buffer"]], parts, piece.group)


UPDATES = {"adam": _adam, "adamw": _adam, "sgd": _sgd, "lion": _lion, "muon": _muon}
