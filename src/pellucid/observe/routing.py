"""What each router decided: loads, entropies, margins, by layer and expert; summed on the device over micro-batches.

Counts are exact over all real tokens. Entropy, mass, margin and score extremes are taken over every n-th token, at most
512 of a micro-batch. Letters: L layers, N tokens, E experts, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.observe.columns import INDEX, LAYER, ROUTER
from pellucid.observe.history import measured
from pellucid.observe.store import MISSING, Row

TOKENS = 512
KEPT = 0.99  # of the way gone so far, at each measured step
MEANS = ("count", "entropy", "top_mass", "margin", "router_z")


class RoutingProbe:
    """Accumulates over the micro-batches of a step; take() hands over and starts anew."""

    def __init__(self, layers: int, experts: int, experts_per_token: int):
        self.L, self.E, self.k = layers, experts, experts_per_token
        self.idle_LE = np.zeros((layers, experts), dtype=np.float32)
        self.way_2LE = np.zeros((2, layers, experts))  # sums of update norms, fading: of all steps, of those without tokens
        self._sums: dict[str, Tensor] = {}

    def recall(self, frames: np.ndarray, newest: np.ndarray) -> None:
        """Goes on from recorded frames of `router` [n, L*E, statistics], the oldest first; newest [0 or 1, ...]: the last step's."""
        column = INDEX["router"]
        for frame in frames.reshape(-1, self.L, self.E, len(ROUTER)):
            if measured(frame[..., column["update_norm"]]).all():
                self._add_way(frame[..., column["tokens"]], frame[..., column["update_norm"]])
        for frame in newest:
            self.idle_LE = frame[:, column["idle_steps"]].reshape(self.L, self.E)

    def rows(self) -> tuple[list[Row], list[Row]]:
        """Axes of the streams `router` and `layer`."""
        pairs = [(layer, e) for layer in range(self.L) for e in range(self.E)]
        router = [Row(f"layers.{layer}.experts.{e}", layer, e, "expert") for layer, e in pairs]
        return router, [Row(f"layers.{layer}", layer, None, "layer") for layer in range(self.L)]

    @torch.no_grad()
    def add(self, routings: list[Any], real_N: Tensor) -> None:
        """routings: one per layer, with logits_NE, probs_NE, expert_index_Nk, gate_Nk; real_N: bool, False at pads."""
        chosen_LNk = torch.stack([r.expert_index_Nk for r in routings])
        gate_LNk = torch.stack([r.gate_Nk.detach() for r in routings]).float()
        probs_LNE = torch.stack([r.probs_NE.detach() for r in routings]).float()
        real = real_N.float()
        spread = lambda values: torch.zeros(self.L, self.E, device=real.device).scatter_add_(
            1, chosen_LNk.view(self.L, -1), values.reshape(self.L, -1))  # fmt: skip
        self._add("tokens", spread(real[None, :, None].expand_as(gate_LNk)))
        self._add("gates", spread(gate_LNk * real[None, :, None]))
        self._add("probability", torch.einsum("lne,n->le", probs_LNE, real))
        self._add("real", real.sum()[None])
        step = -(-len(real) // TOKENS)
        logits_LNE = torch.stack([r.logits_NE.detach()[::step] for r in routings]).float()
        self._means(logits_LNE, probs_LNE[:, ::step], chosen_LNk[:, ::step], gate_LNk[:, ::step], real_N[::step])

    def _means(self, logits: Tensor, probs: Tensor, chosen: Tensor, gates: Tensor, real: Tensor) -> None:
        normalizer = logits.logsumexp(-1)
        entropy = normalizer - (probs * logits).sum(-1)
        rest = probs.scatter(-1, chosen, -torch.inf).amax(-1)
        margin = probs.gather(-1, chosen).amin(-1) - rest if self.E > self.k else torch.zeros_like(entropy)
        values = torch.stack([torch.ones_like(entropy), entropy, gates.sum(-1), margin, normalizer.square()])
        self._add("means", torch.where(real, values, 0).sum(-1))
        top = torch.where(real[:, None], logits, -torch.inf).amax((1, 2))
        low = torch.where(real[:, None], logits, torch.inf).amin((1, 2))
        old = self._sums.get("extremes")
        new = torch.stack([top, -low])
        self._sums["extremes"] = new if old is None else torch.maximum(old, new)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def take(self) -> dict[str, Tensor]:
        sums, self._sums = self._sums, {}
        return sums

    def finish(self, sums: dict[str, np.ndarray], param: np.ndarray | None, expert_rows: np.ndarray) -> dict[str, np.ndarray]:
        """Frames of `router` and `layer`. param: this step's frame of `param`, for what moved, or None.

        expert_rows: int [L, E, tensors], rows of `param` that belong to each expert.
        """
        router = np.full((self.L, self.E, len(ROUTER)), MISSING, dtype=np.float32)
        layer = np.full((self.L, len(LAYER)), MISSING, dtype=np.float32)
        tokens, real = sums["tokens"], max(float(sums["real"][0]), 1.0)
        load = tokens * (self.E / (real * self.k))
        self.idle_LE = np.where(tokens > 0, 0, self.idle_LE + 1)
        with np.errstate(all="ignore"):
            mean_gate = np.where(tokens > 0, sums["gates"] / tokens, MISSING)
            columns = {"tokens": tokens, "load": load, "probability": sums["probability"] / real,
                       "gate_mass": sums["gates"] / real, "mean_gate": mean_gate, "idle_steps": self.idle_LE}  # fmt: skip
            if param is not None:
                columns |= self._moved(tokens, param, expert_rows)
            for name, values in columns.items():
                router[..., INDEX["router"][name]] = values
            count, entropy, mass, margin, z = sums["means"]
            share = load / self.E
            spread = np.exp(-np.where(share > 0, share * np.log(share), 0).sum(1)) / self.E
            top, low = sums["extremes"][0], -sums["extremes"][1]
            values = (load.max(1) - 1, (tokens == 0).sum(1), entropy / count / math.log(max(self.E, 2)), spread,
                      mass / count, margin / count, top, low, z / count)  # fmt: skip
        for column, value in enumerate(values):
            layer[:, column] = np.where(count > 0, value, MISSING)
        return {"router": router.reshape(-1, len(ROUTER)), "layer": layer}

    def _moved(self, tokens: np.ndarray, param: np.ndarray, expert_rows: np.ndarray) -> dict[str, np.ndarray]:
        column = INDEX["param"]
        whole = lambda name: np.sqrt((param[expert_rows, column[name]].astype(np.float64) ** 2).sum(-1))
        update = whole("update_norm")
        others_moved = (update > 0).any()
        self._add_way(tokens, update)
        all_LE, ghost_LE = self.way_2LE
        return {
            "ghost_share": np.divide(ghost_LE, all_LE, out=np.full_like(all_LE, MISSING), where=all_LE > 0),
            "gradient_norm": whole("gradient_norm"),
            "update_norm": update,
            "ghost": (tokens == 0) & (update > 0),
            "frozen": (tokens > 0) & (update == 0) & others_moved,
        }

    def _add_way(self, tokens: np.ndarray, update: np.ndarray) -> None:
        self.way_2LE = KEPT * self.way_2LE + np.nan_to_num(np.stack([update, np.where(tokens == 0, update, 0)]), posinf=0)
