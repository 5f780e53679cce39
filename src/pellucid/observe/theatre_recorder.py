"""What one replayed step shows of the followed token: attention, experts, answers, and the whole update of each weight shown.

A theatre (theatre.py) lets the step run with a Recorder for its observer. Letters: W window of a row, V vocabulary, E experts,
k per token, K outputs of a head.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pellucid.observe.observer import SilentObserver
from pellucid.observe.passage import Fan, Passage
from pellucid.observe.proofs_of_step import Edge
from pellucid.observe.replay import Replay
from pellucid.training.optimizers import Update, explain_update, optimizer_parameters, update_settings
from pellucid.training.step import StepResult, count_predictions, idle_experts
from pellucid.training.tasks import as_told, label_loss

CHOICES = 8  # predicted tokens shown
MOST_EDGES = 1200  # beyond this only the followed token's weights are explained


class Recorder(SilentObserver):
    """Watches the replayed step: opens the passage for its micro-batch, then takes what the update did to each edge."""

    def __init__(self, replay: Replay, passage: Passage, micro: int, window: slice, batches: list[Any]):
        self.replay, self.passage, self.micro, self.window, self.batch = replay, passage, micro, window, batches[micro]
        self.tokens = count_predictions(batches, replay.config.training)
        self.now, self.last = 0, len(batches) - 1
        self.edges: list[Edge] = []
        self.layers: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self._updates: dict[str, Update] = {}
        passage.active = micro == 0

    def after_backward(self, batch) -> None:
        if self.now == self.micro:
            self.passage.active = False
            self._read_passage()
        if self.now == self.last:  # gradients are whole now, and not yet clipped
            parameters = dict(self.replay.model.named_parameters())
            for edge in self.edges:
                edge.gradient = parameters[edge.tensor].grad[edge.index].item()
        self.now += 1
        self.passage.active = self.now == self.micro

    def _read_passage(self) -> None:
        passage, window, layers = self.passage, self.window, len(self.passage.layers)
        W = window.stop - window.start
        sizes = passage.sizes(window)
        every = W * layers * (10 + 6 * self.replay.config.model.num_experts_per_tok) <= MOST_EDGES
        shown = range(window.start, window.stop) if every else [window.stop - 1]
        for n in range(layers):
            attention, store = passage.attention(n, window), passage.layers[n]
            part = lambda name, store=store: store[name][window].tolist()
            self.layers.append({
                "attention": {name: value.tolist() for name, value in attention.items()}, "rms": sizes[n],
                "router": {"logits": part("logits_NE"), "probs": part("probs_NE"), "chosen": part("expert_index_Nk"),
                           "gates": part("gate_Nk"), "slopes": part("logits_slope")},
                "fans": {str(t - window.start): self._fans(passage.fans(n, t), t) for t in shown},
            })  # fmt: skip
        opened = self.layers[-1]["fans"][str(W - 1)]["experts"][0]["terms"][0]["edge"]
        self.edges[opened].rank = -1  # the weight that the page shows first is proven first
        self._read_outputs(shown)

    def _fans(self, fans: dict[str, Any], t: int) -> dict[str, Any]:
        focus = t == self.window.stop - 1
        single = {kind: self._fan(fans[kind], focus) for kind in ("attention", "router")}
        return {**fans, **single, "experts": [self._fan(fan, focus) for fan in fans["experts"]]}

    def _fan(self, fan: Fan, focus: bool) -> dict[str, Any]:
        numbers = []
        for tensor, index in fan.edges():
            known = next((n for n, edge in enumerate(self.edges) if edge.key == (tensor, index)), None)
            if known is None:
                known = len(self.edges)
                self.edges.append(Edge(tensor, index))
            if focus:
                self.edges[known].rank = min(len(numbers), self.edges[known].rank)
            numbers.append(known)
        told = asdict(fan)
        for term, number in zip(told["terms"], numbers, strict=True):
            term["edge"] = number
        return told

    def _read_outputs(self, shown: Any) -> None:
        if self.replay.model.config.head is not None:
            self._read_answers(shown)
            return
        targets = self.batch.targets_BT[self.passage.row].tolist()
        scores_WV = self.passage.scores(self.window).float()
        probs_WV, normalizer_W = scores_WV.softmax(-1), scores_WV.logsumexp(-1)
        settings = self.replay.config.training
        for at, t in enumerate(range(self.window.start, self.window.stop)):
            target = targets[t]
            top = probs_WV[at].topk(min(CHOICES, probs_WV.shape[1])).indices.tolist()
            output: dict[str, Any] = {"target": target, "normalizer": normalizer_W[at].item(), "choices": [
                {"id": v, "text": token_text(self.replay, v), "score": scores_WV[at, v].item(), "p": probs_WV[at, v].item()}
                for v in [*top, *([target] if target >= 0 and target not in top else [])]]}  # fmt: skip
            if target >= 0:
                p, score = probs_WV[at, target].item(), scores_WV[at, target].item()
                slope = ((1 + 2 * settings.z_loss * normalizer_W[at].item()) * p - 1) / self.tokens
                output |= {"p": p, "score": score, "loss": normalizer_W[at].item() - score, "slope": slope,
                           "rank": int((probs_WV[at] > probs_WV[at, target]).sum()) + 1}  # fmt: skip
                if t in shown:
                    output["fan"] = self._fan(self.passage.output(t, target, score, slope), t == self.window.stop - 1)
            self.outputs.append(output)

    def _read_answers(self, shown: Any) -> None:
        """What the head would say after each token; at the document's end, where it is asked, also what that costs."""
        head, settings = self.replay.model.config.head, self.replay.config.training
        scores_WK = self.passage.scores(self.window).float()
        labels_WK = self.batch.labels_BTK[self.passage.row, self.window]
        for at, t in enumerate(range(self.window.start, self.window.stop)):
            numbers, asked = head.problem_type == "regression", not labels_WK[at, 0].isnan()
            told = list(range(len(head.labels))) if numbers else scores_WK[at].topk(min(CHOICES, len(head.labels))).indices.tolist()
            if asked and not numbers and int(labels_WK[at, 0]) not in told:
                told.append(int(labels_WK[at, 0]))
            choices = [{"id": k, "text": head.labels[k], "score": scores_WK[at, k].item()} for k in told]
            say_choices(choices, head, scores_WK[at], "")
            output: dict[str, Any] = {"target": -1, "normalizer": scores_WK[at].logsumexp(-1).item(), "choices": choices}
            if asked:
                with torch.enable_grad():
                    answer_1K = scores_WK[at : at + 1].detach().clone().requires_grad_()
                    loss = label_loss(head, answer_1K, labels_WK[at : at + 1], settings).sum()
                    (slope_1K,) = torch.autograd.grad(loss, answer_1K)
                if numbers:
                    target = int(slope_1K[0].abs().argmax())
                    for choice, true in zip(choices, as_told(head, labels_WK[at : at + 1].cpu().numpy())[0].tolist(), strict=True):
                        choice["true"] = true
                else:
                    target = int(labels_WK[at, 0])
                    rank = int((scores_WK[at] > scores_WK[at, target]).sum()) + 1
                    output |= {"p": scores_WK[at].softmax(-1)[target].item(), "rank": rank}
                slope, score = slope_1K[0, target].item() / self.tokens, scores_WK[at, target].item()
                output |= {"target": target, "score": score, "loss": loss.item(), "slope": slope}
                if t in shown:
                    output["fan"] = self._fan(self.passage.output(t, target, score, slope), t == self.window.stop - 1)
            self.outputs.append(output)

    def reads_gradients(self) -> bool:
        return True

    def before_update(self, result: StepResult) -> None:
        optimizer, idle = self.replay.optimizer, idle_experts(result.load_LE)
        parameters = {name: (weight, group) for name, weight, group in optimizer_parameters(optimizer)}
        for name in dict.fromkeys(edge.tensor for edge in self.edges):
            weight, group = parameters[name]
            settings = {k: v for k, v in update_settings(group, name).items() if k != "dtype"}
            self.settings[name] = {"rule": group["rule"], "settings": settings, "shape": list(weight.shape)}
            update = explain_update(optimizer, name, idle_E=idle.get(name))
            state = optimizer.state.get(weight, {})
            mine = [edge for edge in self.edges if edge.tensor == name]
            at = tuple(torch.tensor(axis) for axis in zip(*(edge.index for edge in mine), strict=True))
            pick = lambda tensors, at=at, shape=weight.shape: {
                k: v.detach()[at] if v.shape == shape else v.clone() for k, v in tensors.items()
                if isinstance(v, Tensor) and (v.shape == shape or v.ndim == 0)}  # fmt: skip
            self._updates[name] = Update(update.weight[at], update.weight_after[at], pick(update.terms), update.rounding[at],
                                         pick(state), pick(update.quantities))  # fmt: skip
            for edge, value in zip(mine, weight.grad[at].tolist(), strict=True):
                edge.clipped = value

    def after_update(self, result: StepResult) -> None:
        if not result.applied:
            return
        parameters = dict(self.replay.model.named_parameters())
        for name, update in self._updates.items():
            mine = [edge for edge in self.edges if edge.tensor == name]
            at = tuple(torch.tensor(axis) for axis in zip(*(edge.index for edge in mine), strict=True))
            settled = update.settle(parameters[name].detach()[at])
            for n, edge in enumerate(mine):
                edge.take(update, settled, n)


def say_choices(choices: list[dict[str, Any]], head: Any, scores_V: Tensor, when: str) -> None:
    """Adds the probability of each choice, or of numbers what is told in their own unit."""
    numbers = head is not None and head.problem_type == "regression"
    said = as_told(head, scores_V[None].cpu().numpy())[0] if numbers else scores_V.softmax(-1)
    for choice in choices:
        choice[("told" if numbers else "p") + when] = said[choice["id"]].item()


def token_text(replay: Replay, token: int) -> str:
    tokenizer = replay.dataset.tokenizer
    special = {tokenizer.pad_token_id: "<pad>", tokenizer.bos_token_id: "<bos>", tokenizer.eos_token_id: "<eos>"}
    return special.get(token) or tokenizer.token_bytes(token).decode("utf-8", errors="replace")
