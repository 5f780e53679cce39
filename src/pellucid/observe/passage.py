"""One row of a training step, followed number by number through picture 1: forward values, and what came back to them.

Hooks catch what each layer read and wrote in the real step; whatever a fused kernel keeps to itself (attention weights,
hidden units) is computed beside it by the plain formulas. A `Fan` is one weighted sum as it stands in the model: its
largest terms w * a, and one term for all others.
Letters: T positions of the row, W of them shown, D hidden, H query heads, d head_dim, E experts, k per token, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.model.grok import Grok1
from pellucid.model.kernels.rotary import rotate

TERMS = {"attention": 6, "router": 4, "experts": 6, "output": 6}  # weights of a fan that are shown


@dataclass
class Fan:
    """value = sum of the terms + the others + rounding. slope: d loss / d value. index: of the sum's row in the tensor."""

    kind: str
    tensor: str
    index: tuple[int, ...]
    value: float
    slope: float
    terms: list[dict[str, float]] = field(default_factory=list)  # j, w, a, wa and what belongs to the kind
    others: dict[str, float] = field(default_factory=dict)  # count, sum (float64)
    rounding: float = 0.0  # what the model's own arithmetic lost against float64

    def edges(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(self.tensor, (*self.index, term["j"])) for term in self.terms]


def make_fan(kind: str, tensor: str, index: tuple[int, ...], weight: Tensor, inputs: Tensor, value: float, slope: float,
             **more: Tensor) -> Fan:  # fmt: skip
    """weight and inputs: the two vectors that are multiplied. more: further vectors to report with each term."""
    products = weight.double() * inputs.double()
    top = products.abs().topk(min(TERMS[kind], len(products))).indices
    rest = torch.ones_like(products, dtype=torch.bool).index_fill_(0, top, False)
    terms = [{"j": int(j), "w": weight[j].item(), "a": inputs[j].item(), "wa": products[j].item(),
              **{name: vector[j].item() for name, vector in more.items()}} for j in top.tolist()]  # fmt: skip
    others = products[rest].sum().item()
    rounding = value - sum(term["wa"] for term in terms) - others
    return Fan(kind, tensor, index, value, slope, terms, {"count": int(rest.sum()), "sum": others}, rounding)


class Passage:
    """Catches one row of a forward and backward pass while `active`; then answers for any of its positions."""

    def __init__(self, model: Grok1, row: int):
        self.model, self.row, self.active = model, row, False
        self.layers: list[dict[str, Any]] = [{} for _ in model.layers]
        self.end: dict[str, Any] = {}
        self.hooks = [model.final_norm.register_forward_hook(self._final)]
        for n, layer in enumerate(model.layers):
            store = self.layers[n]
            self.hooks += [
                layer.register_forward_pre_hook(self._keep(store, "entering")),
                layer.attention.register_forward_hook(self._attention(store)),
                layer.attention.o_proj.register_forward_pre_hook(self._keep(store, "heads")),
                layer.post_attn_norm.register_forward_hook(self._result(store, "attention_branch")),
                layer.pre_moe_norm.register_forward_pre_hook(self._keep(store, "between")),
                layer.moe.register_forward_hook(self._moe(store)),
                layer.post_moe_norm.register_forward_hook(self._result(store, "expert_branch")),
            ]  # fmt: skip

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    # ----------------------------------------------------------------------------------------- catching

    def _keep(self, store: dict, name: str):
        def hook(module, inputs) -> None:
            if self.active:
                store[name] = inputs[0][self.row].detach()

        return hook

    def _result(self, store: dict, name: str):
        def hook(module, inputs, output) -> None:
            if self.active:
                store[name] = output[self.row].detach()

        return hook

    def _slope(self, store: dict, name: str, tensor: Tensor, rows: Any) -> None:
        tensor.register_hook(lambda gradient: store.update({name: gradient[rows].detach().clone()}))

    def _attention(self, store: dict):
        def hook(module, inputs, output) -> None:
            if not self.active:
                return
            hidden_BTD, (cos, sin), visibility = inputs[:3]
            T = hidden_BTD.shape[1]
            own = slice(self.row, self.row + 1)
            mask = visibility.mask_BTS if visibility.mask_BTS is not None else visibility.chunk(0, T)
            store.update(x=hidden_BTD[own].detach(), rotary=(cos[own], sin[own]), mask=mask[self.row],
                         attended=output[self.row].detach())  # fmt: skip
            self._slope(store, "attended_slope", output, self.row)

        return hook

    def _moe(self, store: dict):
        def hook(module, inputs, output) -> None:
            if not self.active:
                return
            mixed, routing = output
            T = mixed.shape[1]
            rows = slice(self.row * T, (self.row + 1) * T)
            store.update(moe_x=inputs[0][self.row].detach(), mixed=mixed[self.row].detach())
            for name in ("logits_NE", "probs_NE", "expert_index_Nk", "gate_Nk"):
                store[name] = getattr(routing, name)[rows].detach()
            self._slope(store, "mixed_slope", mixed, self.row)
            self._slope(store, "logits_slope", routing.logits_NE, rows)

        return hook

    def _final(self, module, inputs, output) -> None:
        if self.active:
            self.end |= {"leaving": inputs[0][self.row].detach(), "h": output[self.row].detach()}

    # ---------------------------------------------------------------------------------------- answering

    @torch.no_grad()
    def attention(self, n: int, window: slice) -> dict[str, Any]:
        """Weights [H, W, W] of the window's keys, the sum over earlier ones [H, W], and d loss / d weight of both shapes."""
        store, module = self.layers[n], self.model.layers[n].attention
        c, x = module.config, store["x"]
        T, K, G = x.shape[1], c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
        q = rotate(module.q_proj(x).view(1, T, K, G, c.head_dim), *store["rotary"])[0].transpose(1, 2).flatten(0, 1).float()
        k = rotate(module.k_proj(x).view(1, T, K, 1, c.head_dim), *store["rotary"])[0].squeeze(2).float()
        v = module.v_proj(x).view(T, K, c.head_dim).transpose(0, 1).float().repeat_interleave(G, 0)
        scores = q[:, window] @ k.repeat_interleave(G, 0).transpose(-2, -1) * c.attn_output_multiplier
        capped = c.max_attn_value * torch.tanh(scores / c.max_attn_value)
        weights = torch.softmax(capped.masked_fill(~store["mask"][window], -1e30), -1)
        into_heads = (store["attended_slope"][window].float() @ module.o_proj.weight.float()).view(-1, K * G, c.head_dim)
        slopes = (into_heads.transpose(0, 1) @ v.transpose(-2, -1)).masked_fill(weights == 0, 0)
        earlier = weights[..., : window.start]
        return {"weights": weights[..., window], "earlier": earlier.sum(-1), "slopes": slopes[..., window],
                "visible": store["mask"][window].sum(-1), "scores": scores[..., window],
                "earlier_keys": (earlier[0] > 0).sum(-1)}  # fmt: skip

    @torch.no_grad()
    def fans(self, n: int, t: int) -> dict[str, Any]:
        """The weighted sums of layer n at position t: attention's output, the router's first choice, both experts."""
        store, layer, dtype = self.layers[n], self.model.layers[n], self.model.compute_dtype
        used = lambda weight: weight.detach().to(dtype).float()
        i = int(store["attended"][t].abs().argmax())
        attention = make_fan("attention", f"layers.{n}.attention.o_proj.weight", (i,),
                             used(layer.attention.o_proj.weight[i]), store["heads"][t].float(),
                             store["attended"][t, i].item(), store["attended_slope"][t, i].item())  # fmt: skip
        e = int(store["expert_index_Nk"][t, 0])
        router = make_fan("router", f"layers.{n}.moe.router.weight", (e,), layer.moe.router.weight[e].detach(),
                          store["moe_x"][t].float(), store["logits_NE"][t, e].item(), store["logits_slope"][t, e].item())  # fmt: skip
        channel = int(store["mixed"][t].abs().argmax())
        experts = [self._expert(n, t, choice, channel) for choice in range(store["gate_Nk"].shape[1])]
        return {"attention": attention, "router": router, "experts": experts, "channel": channel,
                "mixed": store["mixed"][t, channel].item(), "mixed_slope": store["mixed_slope"][t, channel].item()}  # fmt: skip

    def _expert(self, n: int, t: int, choice: int, channel: int) -> Fan:
        store, moe, dtype = self.layers[n], self.model.layers[n].moe, self.model.compute_dtype
        e, share = int(store["expert_index_Nk"][t, choice]), store["gate_Nk"][t, choice].item()
        gate, up = F.linear(store["moe_x"][t], moe.gate_up_proj[e].to(dtype)).float().chunk(2)
        inner = F.gelu(gate, approximate="tanh") * up
        weight = moe.down_proj[e, channel].detach().to(dtype).float()
        value = (weight.double() @ inner.double()).item()
        return make_fan("experts", f"layers.{n}.moe.down_proj", (e, channel), weight, inner, value,
                        share * store["mixed_slope"][t, channel].item(), gate=gate, up=up)  # fmt: skip

    @torch.no_grad()
    def scores(self, window: slice) -> Tensor:
        """[W, V] in fp32, as the model gives them; of a head [W, K]."""
        return self.model.logits(self.end["h"][window])

    @torch.no_grad()
    def output(self, t: int, target: int, score: float, slope: float) -> Fan:
        """The target's score at position t: its row of the embedding table, or of the head, times the final state."""
        name, scale = ("embedding", self.model.config.output_multiplier_scale) if self.model.score is None else ("score", 1.0)
        weight = getattr(self.model, name).weight[target].detach().to(self.model.compute_dtype).float()
        return make_fan("output", f"{name}.weight", (target,), weight, self.end["h"][t].float() * scale, score, slope)

    @torch.no_grad()
    def sizes(self, window: slice) -> list[dict[str, list[float]]]:
        """Root mean square of the residual stream and of each branch, by layer, for the window's positions."""
        rms = lambda x: x[window].float().square().mean(-1).sqrt().tolist()
        names = ("entering", "attention_branch", "between", "expert_branch")
        return [{name: rms(store[name]) for name in names} for store in self.layers]
