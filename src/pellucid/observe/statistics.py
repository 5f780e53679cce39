"""What one step did to every parameter: norms, update, cosines, credit, for each tensor and each expert's slice.

Exact at every step: norms of weight and gradient, non-finite counts. From a fixed sample (up to 1,024 evenly spread
coordinates of each tensor or expert, always the same): the rest. In turn, one tensor a step is copied before the update
and compared whole, with exponent histograms: so there is never a second copy of the model.
Legend: a *leaf* is a tensor or one expert's slice of a stacked one; R leaves, S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.observe.columns import INDEX, PARAM
from pellucid.observe.store import MISSING, Row
from pellucid.training.device import widest

SAMPLES = 1024
SUMS = ("w2", "g2", "dw2", "g_dw", "dw_dwp", "dwp2", "g_gp", "gp2", "u2", "stale", "zero", "unmoved", "swallowed", "epsilon")
KINDS = ("weight", "gradient", "update")  # of exponent histograms
ADAM = ("exp_avg", "exp_avg_sq")


@dataclass
class Parameter:
    """One tensor of the model and its place among the leaves."""

    name: str
    weight: nn.Parameter
    group: dict  # of the optimizer; {} if it does not update this tensor
    first: int  # leaf
    leaves: int
    stride: int
    count: int  # samples of each leaf

    @property
    def stacked(self) -> bool:
        """Whether its leaves are experts' slices, be there only one."""
        return self.weight.ndim == 3

    def samples(self, tensor: Tensor) -> Tensor:
        """View [leaves, count] of evenly spread elements of a tensor of the weight's shape."""
        size, tensor = tensor.numel() // self.leaves, tensor.detach().contiguous()
        return tensor.as_strided((self.leaves, self.count), (size, self.stride), tensor.storage_offset())

    def split(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.detach()
        return list(tensor.unbind(0)) if self.stacked else [tensor]


class ParameterProbe:
    """Measures around `optimizer.step()`: before(), then after(); finish() makes the frame on the host."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
        self.optimizer = optimizer
        self.parameters: list[Parameter] = []
        first = 0
        for name, weight in model.named_parameters():
            leaves = weight.shape[0] if weight.ndim == 3 else 1
            stride, count = _sampling(weight.numel() // leaves, weight.shape[-1])
            self.parameters.append(Parameter(name, weight, groups.get(id(weight), {}), first, leaves, stride, count))
            first += leaves
        self.R, device = first, self.parameters[0].weight.device
        self.count_R = np.repeat([p.count for p in self.parameters], [p.leaves for p in self.parameters])
        self.numel_R = np.repeat([p.weight.numel() // p.leaves for p in self.parameters], [p.leaves for p in self.parameters])
        # w0 weight before, w1 after, g gradient, p previous gradient, d update, q previous update, m and v Adam's moments
        self._buffers = {key: torch.zeros(first, SAMPLES, device=device) for key in "w0 w1 g p d q m v".split()}
        self._pads_R = torch.tensor(SAMPLES - self.count_R, device=device, dtype=torch.float32)
        self._have_previous = self._had_previous = False
        self._exact: tuple[Parameter, Tensor] | None = None
        self.rows, self._members = self._axis()

    def _axis(self) -> tuple[list[Row], list[tuple[int, int]]]:
        """Rows of the `param` stream, each with the leaves it sums over: tensors, their experts, the whole model."""
        rows, members = [], []
        for p in self.parameters:
            parts = p.name.split(".")
            layer = int(parts[1]) if parts[0] == "layers" else None
            role = parts[-2] if parts[-1] == "weight" else parts[-1]
            dtype = str(p.weight.dtype).removeprefix("torch.")
            shape = list(p.weight.shape)
            rows.append(Row(p.name, layer, None, role, str(shape), p.weight.numel(), dtype))
            members.append((p.first, p.first + p.leaves))
            for e in range(p.leaves if p.stacked else 0):
                rows.append(Row(f"{p.name}[{e}]", layer, e, role, str(shape[1:]), p.weight[0].numel(), dtype))
                members.append((p.first + e, p.first + e + 1))
        rows.append(Row("all", None, None, "model", "", sum(p.weight.numel() for p in self.parameters), ""))
        return rows, [*members, (0, self.R)]

    def row_of(self, p: Parameter) -> int:
        return next(i for i, row in enumerate(self.rows) if row.name == p.name)

    def forget(self) -> None:
        """A step was not measured: the next one has no predecessor to be compared with."""
        self._have_previous = False

    # ------------------------------------------------------------------------------------ on the device

    @torch.no_grad()
    def before(self, exact: Parameter | None, count_nonfinite: bool) -> dict[str, Tensor]:
        """After clipping, before the update. `exact` is copied, to be compared whole afterwards."""
        weights = [leaf for p in self.parameters for leaf in p.split(p.weight)]
        gradients = [leaf for p in self.parameters if p.weight.grad is not None for leaf in p.split(p.weight.grad)]
        norms = torch.zeros(2, self.R, device=self._pads_R.device)
        norms[0] = torch.stack(torch._foreach_norm(weights, 2, torch.float32))
        if gradients:
            norms[1, self._with_gradient()] = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        self._sample("w0", lambda p: p.weight)
        self._buffers["g"], self._buffers["p"] = self._buffers["p"], self._buffers["g"]
        self._sample("g", lambda p: p.weight.grad)
        self._exact = (exact, exact.weight.detach().clone()) if exact is not None else None
        out = {"norms": norms}
        if count_nonfinite:
            out["weight_nonfinite"] = torch.stack([(~torch.isfinite(leaf)).sum() for leaf in weights]).float()
            out["gradient_nan"] = torch.stack([torch.isnan(leaf).sum() for leaf in gradients]).float()
            out["gradient_inf"] = torch.stack([torch.isinf(leaf).sum() for leaf in gradients]).float()
        return out

    @torch.no_grad()
    def after(self, applied: bool, histograms: bool) -> dict[str, Tensor]:
        """After the update. Not applied: only the gradients' memory is kept."""
        if not applied:
            self._have_previous, self._exact = False, None
            return {}
        b = self._buffers
        self._sample("w1", lambda p: p.weight)
        b["d"], b["q"] = b["q"], b["d"]
        torch.sub(b["w1"], b["w0"], out=b["d"])
        adam = [p for p in self.parameters if "exp_avg_sq" in self.optimizer.state.get(p.weight, {})]
        for key, name in zip("mv", ADAM, strict=True):
            self._sample(key, lambda p, name=name: self.optimizer.state.get(p.weight, {}).get(name))
        out = {"sums": self._sums(adam)}
        if self._exact is not None:
            out |= self._compare(*self._exact, histograms)
        self._had_previous, self._have_previous = self._have_previous, True
        return out

    def _sums(self, adam: list[Parameter]) -> Tensor:
        """[len(SUMS), R], over each leaf's samples."""
        b = self._buffers
        g, d, w = b["g"], b["d"], b["w0"]
        dot = lambda x, y: torch.linalg.vecdot(x, y)
        sums = torch.zeros(len(SUMS), self.R, device=g.device)
        put = lambda name, value: sums[SUMS.index(name)].copy_(value)
        for name, x, y in (("w2", w, w), ("g2", g, g), ("dw2", d, d), ("g_dw", g, d), ("dw_dwp", d, b["q"]),
                           ("dwp2", b["q"], b["q"]), ("g_gp", g, b["p"]), ("gp2", b["p"], b["p"])):  # fmt: skip
            put(name, dot(x, y))
        has_gradient = g != 0
        put("zero", (~has_gradient).sum(1) - self._pads_R)
        put("unmoved", (has_gradient & (d == 0)).sum(1))
        put("swallowed", (has_gradient & (d.abs() < 2.0**-9 * w.abs())).sum(1))
        if adam:
            scale1, scale2, eps = self._corrections(adam)
            root = (b["v"] * scale2).sqrt_()
            u = b["m"] * scale1 / (root + eps)
            stale = g / torch.maximum(root, eps)
            put("u2", dot(u, u))
            put("stale", dot(stale, stale))
            put("epsilon", ((root < eps) & (b["v"] > 0)).sum(1))
        return sums

    def _corrections(self, adam: list[Parameter]) -> tuple[Tensor, Tensor, Tensor]:
        """Bias corrections 1/(1-beta^t) of both moments and eps, each [R, 1]; 1 where the rule is not Adam's."""
        steps = torch.stack([self.optimizer.state[p.weight]["step"].float() for p in adam]).to(self._pads_R.device)
        wide = widest(steps.device)
        betas = torch.tensor([p.group["betas"] for p in adam], dtype=wide, device=steps.device)
        repeats = torch.tensor([p.leaves for p in adam])
        rows = torch.cat([torch.arange(p.first, p.first + p.leaves) for p in adam]).to(steps.device)
        scale = 1 / (1 - betas ** steps.to(wide)[:, None])
        eps = torch.tensor([[p.group["eps"]] for p in adam], dtype=wide, device=steps.device)
        packed = torch.ones(self.R, 3, device=steps.device)
        packed[rows] = torch.cat([scale, eps], 1).float().repeat_interleave(repeats.to(steps.device), 0, output_size=len(rows))
        return packed[:, 0:1], packed[:, 1:2], packed[:, 2:3]

    def _compare(self, p: Parameter, before: Tensor, histograms: bool) -> dict[str, Tensor]:
        """Over all elements of one tensor; `before` becomes the update. [2, leaves]: ||dw||, g . dw."""
        counted = {"weight": exponent_histogram(before, p.leaves)} if histograms else {}
        change = torch.sub(p.weight.detach().float(), before.float())
        norm = torch.stack(torch._foreach_norm(p.split(change), 2, torch.float32))
        gradient = p.weight.grad
        credit = torch.zeros_like(norm)
        if gradient is not None:
            credit = torch.stack([(a.float() * b).sum() for a, b in zip(p.split(gradient), p.split(change), strict=True)])
            counted |= {"gradient": exponent_histogram(gradient, p.leaves)} if histograms else {}
        counted |= {"update": exponent_histogram(change, p.leaves)} if histograms else {}
        return {"exact": torch.stack([norm, credit]), **{f"hist.{kind}": counts for kind, counts in counted.items()}}

    def _sample(self, key: str, get) -> None:
        """Fill one buffer [R, S] with the samples of what `get(parameter)` returns; None leaves zeros."""
        buffer, targets, sources = self._buffers[key], [], []
        for p in self.parameters:
            tensor = get(p)
            target = buffer[p.first : p.first + p.leaves, : p.count]
            if tensor is None:
                target.zero_()
            else:
                targets.append(target)
                sources.append(p.samples(tensor))
        if targets:
            torch._foreach_copy_(targets, sources)

    def _with_gradient(self) -> Tensor:
        have = np.repeat([p.weight.grad is not None for p in self.parameters], [p.leaves for p in self.parameters])
        return torch.from_numpy(have).to(self._pads_R.device)

    def facts(self, clip_factor: float, applied: bool) -> dict:
        """What the host knows of this step without asking the device."""
        per_leaf = lambda values: np.repeat(np.array(values, dtype=np.float64), [p.leaves for p in self.parameters])
        state = lambda p, key: key in self.optimizer.state.get(p.weight, {})
        return {
            "clip_factor": clip_factor,
            "applied": applied,
            "previous": self._had_previous,
            "gradient": per_leaf([p.weight.grad is not None for p in self.parameters]).astype(bool),
            "adam": per_leaf([state(p, "exp_avg_sq") and p.weight.grad is not None for p in self.parameters]).astype(bool),
            "learning_rate": per_leaf([p.group.get("lr", math.nan) for p in self.parameters]),
            "weight_decay": per_leaf([p.group.get("weight_decay", math.nan) for p in self.parameters]),
            "exact": self._exact[0] if self._exact is not None else None,
        }

    # -------------------------------------------------------------------------------------- on the host

    def finish(self, device: dict[str, np.ndarray], facts: dict) -> np.ndarray:
        """The frame float32 [rows, statistics] from what before() and after() measured."""
        frame = np.full((len(self.rows), len(PARAM)), MISSING, dtype=np.float32)
        with np.errstate(all="ignore"):
            leaves = self._leaf_sums(device, facts)
            stacked = np.stack([*leaves.values()])
            stacked = np.concatenate([stacked, np.zeros((len(stacked), 1))], axis=1)
            ranges = np.array(self._members).reshape(-1)
            totals = np.add.reduceat(stacked, ranges, axis=1)[:, ::2]  # of pairs (start, stop), the odd ones are junk
            _fill(frame, dict(zip(leaves, totals, strict=True)), facts)
        for name in ("learning_rate", "weight_decay"):
            values = facts[name][[start for start, _ in self._members[:-1]]]
            frame[:-1, INDEX["param"][name]] = np.where(np.isnan(values), MISSING, values)
        return frame

    def _leaf_sums(self, device: dict[str, np.ndarray], facts: dict) -> dict[str, np.ndarray]:
        """Sums over all elements of each leaf, float64 [R]; those of samples scaled up. NaN: needed but not counted."""
        clip = facts["clip_factor"]
        weight2, clipped2 = device["norms"].astype(np.float64) ** 2
        uncounted = lambda squares: np.where(np.isfinite(squares), 0.0, np.nan)
        leaves = {
            "leaves": np.ones(self.R), "numel": self.numel_R.astype(np.float64),
            "gradients": facts["gradient"].astype(np.float64), "weight2": weight2,
            "gradient2": clipped2 / clip**2, "clipped2": clipped2,
            "weight_nonfinite": device.get("weight_nonfinite", uncounted(weight2)),
            "gradient_nan": uncounted(clipped2), "gradient_inf": uncounted(clipped2),
        }  # fmt: skip
        for name in ("gradient_nan", "gradient_inf"):
            if name in device:
                leaves[name][facts["gradient"]] = device[name]
        if "sums" not in device:
            return leaves
        sums = dict(zip(SUMS, device["sums"].astype(np.float64) * (self.numel_R / self.count_R), strict=True))
        adam = facts["adam"].astype(np.float64)
        for name in ("u2", "stale", "epsilon"):
            sums[name] = np.where(facts["adam"], sums[name], 0.0)
        # exact values stand beside the sampled sums, because a cosine must divide sampled by sampled
        change2, credit = sums["dw2"].copy(), sums["g_dw"] / clip
        exact = (self.count_R == self.numel_R).astype(np.float64)
        if facts["exact"] is not None:
            at = slice(facts["exact"].first, facts["exact"].first + facts["exact"].leaves)
            change2[at], exact[at] = device["exact"][0].astype(np.float64) ** 2, 1
            credit[at] = device["exact"][1].astype(np.float64) / clip
        return leaves | sums | {"change2": change2, "credit": credit, "exact": exact, "adam": adam,
                                "adam_numel": adam * self.numel_R}  # fmt: skip


def _fill(frame: np.ndarray, total: dict[str, np.ndarray], facts: dict) -> None:
    """All rows of the frame at once, from the sums over their leaves."""

    def put(name: str, values: np.ndarray, where: np.ndarray | bool = True) -> None:
        column = frame[:, INDEX["param"][name]]
        np.copyto(column, values.astype(np.float32), where=where)

    learns = total["gradients"] > 0
    put("weight_norm", np.sqrt(total["weight2"]))
    put("weight_nonfinite", total["weight_nonfinite"], ~np.isnan(total["weight_nonfinite"]))
    put("gradient_norm", np.sqrt(total["gradient2"]), learns)
    put("clipped_norm", np.sqrt(total["clipped2"]), learns)
    for name in ("gradient_nan", "gradient_inf"):
        put(name, total[name], learns & ~np.isnan(total[name]))
    if not facts["applied"]:
        put("update_norm", np.zeros(len(frame)))
        return
    put("exact", (total["exact"] == total["leaves"]).astype(float))
    put("update_norm", np.sqrt(total["change2"]))
    put("update_ratio", np.sqrt(total["change2"] / total["weight2"]), total["weight2"] != 0)
    put("credit", total["credit"], learns)
    for name, key in (("gradient_zero", "zero"), ("unmoved", "unmoved"), ("swallowed", "swallowed")):
        put(name, total[key] / total["numel"], learns)

    def cosine(name: str, dot: str, one: str, two: str, where) -> None:
        product = total[one] * total[two]
        put(name, total[dot] / np.sqrt(product), where & (product != 0))

    total["-g_dw"] = -total["g_dw"]
    cosine("cos_descent", "-g_dw", "g2", "dw2", learns)
    if facts["previous"]:
        cosine("cos_previous", "dw_dwp", "dw2", "dwp2", learns)
        cosine("cos_gradient", "g_gp", "g2", "gp2", learns)
    adam = total["adam"] > 0
    put("adam_rms", np.sqrt(total["u2"] / total["adam_numel"]), adam)
    put("staleness", np.sqrt(total["stale"] / total["adam_numel"]), adam)
    put("epsilon", total["epsilon"] / total["adam_numel"], adam)


def _sampling(size: int, last: int) -> tuple[int, int]:
    """(stride, count): at most SAMPLES elements of a leaf, in steps that visit every column."""
    stride = max(1, -(-size // SAMPLES))
    while math.gcd(stride, last) > 1 and stride > 1:
        stride += 1
    return stride, min(SAMPLES, -(-size // stride))


@torch.no_grad()
def exponent_histogram(tensor: Tensor, leaves: int = 1) -> Tensor:
    """int32 [leaves, 515]: counts by sign and IEEE exponent (float32's 8 bits; + then -), then zeros, NaN, infinities.

    Bins are fixed for ever, comparable between tensors, steps and float32/bfloat16. Exponent 0 holds zeros and
    subnormals, 255 NaN and infinities.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    tensor = tensor.detach().contiguous().view(leaves, -1)
    wide = tensor.dtype == torch.float32
    if tensor.device.type == "cpu":
        top = tensor.view(torch.int16).numpy().view(np.uint16)[:, (1 if wide else 0) :: (2 if wide else 1)]
        counted = np.zeros((leaves, 512), dtype=np.int64)
        for start in range(0, top.shape[1], 2**20):  # bincount widens to int64: not all at once
            counted += np.stack([np.bincount(leaf >> 7, minlength=512) for leaf in top[:, start : start + 2**20]])
        counts = torch.from_numpy(counted)
    else:
        top = (tensor.view(torch.int32) >> 23) & 0x1FF if wide else (tensor.view(torch.int16).int() >> 7) & 0x1FF
        flat = (top.long() + 512 * torch.arange(leaves, device=top.device)[:, None]).view(-1)
        counts = torch.zeros(leaves * 512, dtype=torch.int64, device=top.device)
        counts = counts.index_add_(0, flat, torch.ones_like(flat)).view(leaves, 512)
    zeros = (tensor == 0).sum(1)
    nans = torch.isnan(tensor).sum(1)
    infinities = counts[:, 255] + counts[:, 511] - nans
    return torch.cat([counts, torch.stack([zeros, nans, infinities], 1)], 1).int()
