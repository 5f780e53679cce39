"""What a model is trained to predict: the next token, the class of a document, or its numbers. A `Task` for each.

A document is judged by the hidden state of its last token: attention looks back only, so that state alone has seen the
whole text (Radford et al. 2018, section 3.2). Rows are packed as for language modelling, documents do not see each other,
and each has one prediction, at its end. All else of the training step is the same for every task.
Letters: B rows, T positions, N = B*T, M documents, C classes, K numbers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.config import HeadConfig, TrainingConfig
from pellucid.model.grok import Grok1
from pellucid.training import metrics
from pellucid.training.evaluate import evaluate_batches
from pellucid.training.losses import IGNORE, TokenLoss, linear_cross_entropy


@dataclass(frozen=True)
class Task:
    """predicts(batch) -> bool [N], where something is predicted; loss(model, hidden [B, T, D], batch, settings);
    evaluate(model, batches, settings, byte_lengths_V) -> an evaluation with `loss`, `as_dict()` and `in_words()`."""

    predicts: Callable[[Any], Tensor]
    loss: Callable[[Grok1, Tensor, Any, TrainingConfig], TokenLoss]
    evaluate: Callable[[Grok1, Iterable[Any], TrainingConfig, np.ndarray], Any]


# ------------------------------------------------------------------------------------------ the next token


def has_target(batch: Any) -> Tensor:
    return batch.targets_BT.reshape(-1) != IGNORE


def token_loss(model: Grok1, hidden_BTD: Tensor, batch: Any, settings: TrainingConfig) -> TokenLoss:
    """Cross-entropy of every next token, by the embedding table."""
    targets_N = batch.targets_BT.reshape(-1)
    return linear_cross_entropy(
        hidden_BTD.reshape(len(targets_N), -1), model.embedding.weight, targets_N,
        multiplier=model.config.output_multiplier_scale, z_loss_weight=settings.z_loss,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- a document's label


def has_label(batch: Any) -> Tensor:
    return ~batch.labels_BTK[..., 0].reshape(-1).isnan()


def document_loss(model: Grok1, hidden_BTD: Tensor, batch: Any, settings: TrainingConfig) -> TokenLoss:
    """What the head's answer at the end of each document costs."""
    outputs_MK, labels_MK, at_N = answers(model, hidden_BTD, batch)
    loss_M = label_loss(model.config.head, outputs_MK, labels_MK, settings)
    return TokenLoss(loss_M.sum(), at_N.sum(), loss_M.new_zeros(len(at_N)).masked_scatter(at_N, loss_M.detach()),
                     loss_M.new_zeros(()))  # fmt: skip


def label_loss(head: HeadConfig, outputs_MK: Tensor, labels_MK: Tensor, settings: TrainingConfig) -> Tensor:
    """[M]: cross-entropy of each document's class, or squared (or Huber) error of its standardised numbers."""
    if head.problem_type == "regression":
        return number_error(outputs_MK, labels_MK, settings.huber_delta)
    weights_C = None
    if settings.class_weights:
        weights_C = outputs_MK.new_tensor([settings.class_weights.get(name, 1.0) for name in head.labels])
    return class_cross_entropy(outputs_MK, labels_MK[:, 0].long(), weights_C, settings.label_smoothing)


def class_cross_entropy(
    scores_MC: Tensor, classes_M: Tensor, weights_C: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """[M]: -sum_c q_c w_c log softmax(scores)_c, with q = (1 - label_smoothing) onehot + label_smoothing / C.

    In nats. Label smoothing: Szegedy et al. 2016, section 7. A weight is a factor on its class's share of the loss; the
    mean is taken over documents, not over weights, as in scikit-learn's class_weight.
    """
    return F.cross_entropy(scores_MC, classes_M, weights_C, reduction="none", label_smoothing=label_smoothing)


def number_error(outputs_MK: Tensor, numbers_MK: Tensor, huber_delta: float | None = None) -> Tensor:
    """[M]: mean over the K numbers of (output - number)^2, both in standard deviations.

    With huber_delta: e^2 / 2 up to |e| = delta, beyond it delta (|e| - delta / 2) (Huber 1964): outliers pull less.
    """
    if huber_delta is not None:
        return F.huber_loss(outputs_MK, numbers_MK, reduction="none", delta=huber_delta).mean(-1)
    return (outputs_MK - numbers_MK).square().mean(-1)


def answers(model: Grok1, hidden_BTD: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(the head's outputs [M, K], the labels [M, K], where documents end: bool [N])."""
    at_N = has_label(batch)
    return model.logits(hidden_BTD.flatten(0, 1)[at_N]), batch.labels_BTK.flatten(0, 1)[at_N], at_N


# ------------------------------------------------------------------------------------- judging documents


@dataclass
class LabelEvaluation:
    """Documents with what is true of them and what the head said: scores of classes, or numbers in their own unit."""

    head: HeadConfig
    total: float = 0.0  # of the loss
    true_MK: list[np.ndarray] = field(default_factory=list)  # one array per batch
    outputs_MK: list[np.ndarray] = field(default_factory=list)

    def add(self, outputs_MK: np.ndarray, labels_MK: np.ndarray) -> None:
        """Both as the head has them: numbers standardised."""
        self.true_MK.append(as_told(self.head, labels_MK))
        self.outputs_MK.append(as_told(self.head, outputs_MK))

    @property
    def documents(self) -> int:
        return sum(map(len, self.true_MK))

    @property
    def loss(self) -> float:
        """Mean per document: nats, or squared standard deviations."""
        return self.total / max(1, self.documents)

    def as_dict(self) -> dict[str, Any]:
        """Loss, documents and the measures of the task, as JSON values; null where one is undefined."""
        true_MK, outputs_MK = np.concatenate(self.true_MK), np.concatenate(self.outputs_MK)
        facts = {"loss": self.loss, "documents": self.documents}
        if self.head.problem_type == "regression":
            names = ("rmse", "r2", "spearman")
            of_each = {name: getattr(metrics, name)(true_MK, outputs_MK) for name in names}
            facts |= {name: _number(values.mean()) for name, values in of_each.items()}
            if len(self.head.labels) > 1:
                del facts["rmse"]  # each has a unit of its own
                facts["numbers"] = {label: {name: _number(of_each[name][k]) for name in names}
                                    for k, label in enumerate(self.head.labels)}  # fmt: skip
            return facts
        table = metrics.confusion_matrix(true_MK[:, 0].astype(int), outputs_MK.argmax(-1), len(self.head.labels))
        f1 = dict(zip(self.head.labels, map(_number, metrics.f1_scores(table)), strict=True))
        return facts | {"accuracy": metrics.accuracy(table), "macro_f1": metrics.macro_f1(table), "f1": f1,
                        "labels": self.head.labels, "confusion_matrix": table.tolist()}  # fmt: skip

    def in_words(self) -> str:
        facts = self.as_dict()
        shown = [f"{label} {facts[key]:.3f}" for key, label in
                 (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("rmse", "RMSE"), ("r2", "R2"), ("spearman", "Spearman"))
                 if facts.get(key) is not None]  # fmt: skip
        shown += [f"RMSE of {label} {each['rmse']:.4g}" for label, each in facts.get("numbers", {}).items()]
        return f"held-out loss {self.loss:.4f} ({', '.join(shown)})"


def as_told(head: HeadConfig, values_MK: np.ndarray) -> np.ndarray:
    """Numbers in their own unit, from standard deviations (float32); classes as they are. float64.

    To the decimals that float32 could tell apart: a label of 0 is 0 again, not what its rounding left.
    """
    told_MK = values_MK.astype(np.float64)
    if head.problem_type != "regression":
        return told_MK
    told_MK = told_MK * head.std + head.mean
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN, infinities and what does not vary stay what they are
        grid_MK = 10 ** np.ceil(np.log10(np.spacing(np.abs(values_MK).astype(np.float32)) * np.float64(head.std)))
        return np.where(grid_MK > 0, np.round(told_MK / grid_MK) * grid_MK + 0.0, told_MK)  # + 0.0: no -0


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@torch.no_grad()
def _evaluate_labels(model: Grok1, batches: Iterable[Any], settings: TrainingConfig, byte_lengths_V: Any = None) -> LabelEvaluation:
    result, device = LabelEvaluation(model.config.head), model.embedding.weight.device
    for batch in batches:
        batch = batch.to(device)
        hidden, _ = model.hidden_states(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
        outputs_MK, labels_MK, _ = answers(model, hidden, batch)
        result.total += float(document_loss(model, hidden, batch, settings).total)
        result.add(outputs_MK.cpu().numpy(), labels_MK.cpu().numpy())
    return result


TASKS = {
    "language_modeling": Task(has_target, token_loss, lambda model, batches, _, lengths: evaluate_batches(model, batches, lengths)),
    "classification": Task(has_label, document_loss, _evaluate_labels),
    "regression": Task(has_label, document_loss, _evaluate_labels),
}
