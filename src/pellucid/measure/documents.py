"""A model with a head at work on files: what each document is, and how often the model is right.

A document is read as in training: the start mark, then its tokens, cut to the length of a training row on the side the
model was trained with. Letters: M documents, K classes or numbers, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from pellucid.config import HeadConfig, NormalizeConfig, SourceConfig, UserError, nearest
from pellucid.data.document import Document, Unreadable
from pellucid.data.labels import encode
from pellucid.data.sources import list_files, read_documents
from pellucid.data.stages.normalize import normalize
from pellucid.model.grok import Grok1
from pellucid.training.tasks import LabelEvaluation, as_told, class_cross_entropy, number_error

DOCUMENTS = 256  # read at once, and sorted by length
ROWS = 16  # documents in a forward pass
Progress = Callable[[str, int, int | None], None]


@torch.no_grad()
def answer(model: Grok1, tokenizer: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(outputs of the head [M, K], which documents were cut: bool [M]). Numbers are still standardised."""
    head, device, eos = model.config.head, model.embedding.weight.device, tokenizer.eos_token_id
    streams = [[eos, *ids] for ids in tokenizer.encode_batch(texts)]
    most = head.max_length
    cut_M = np.array([len(stream) > most for stream in streams], dtype=bool)
    streams = [stream[:most] if head.truncation_side == "right" else stream[-most:] for stream in streams]
    outputs_MK = np.zeros((len(texts), len(head.labels)))
    order = sorted(range(len(texts)), key=lambda n: len(streams[n]))
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        last = torch.tensor([len(streams[n]) - 1 for n in chosen])
        tokens = torch.full((len(chosen), int(last.max()) + 1), tokenizer.pad_token_id)
        for row, n in enumerate(chosen):
            tokens[row, : len(streams[n])] = torch.tensor(streams[n])
        segments = (torch.arange(tokens.shape[1]) <= last[:, None]).int()
        hidden, _ = model.hidden_states(tokens.to(device), segment_ids=segments.to(device))
        outputs_MK[chosen] = model.logits(hidden[torch.arange(len(chosen)), last.to(device)]).cpu().numpy()
    return outputs_MK, cut_M


def told(head: HeadConfig, outputs_K: np.ndarray) -> str:
    """What the head says of one document, for a person."""
    if head.problem_type == "regression":
        return in_digits(head, as_told(head, outputs_K[None])[0])
    probabilities_K = softmax(outputs_K)
    best = int(probabilities_K.argmax())
    return f"{head.labels[best]} ({probabilities_K[best]:.0%})"


def in_digits(head: HeadConfig, numbers_K: np.ndarray) -> str:
    """Numbers in their own unit for a person: four digits, or as many as show a hundredth of their standard deviation."""
    known = lambda x: x and math.isfinite(x)
    digits = lambda value, std: max(4, 3 + math.ceil(math.log10(abs(value)) - math.log10(std))) if known(value) and known(std) else 4
    return ", ".join(f"{value:.{digits(value, std)}g}" for value, std in zip(numbers_K.tolist(), head.std, strict=True))


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def predict_files(
    model: Grok1, tokenizer: Any, path: str, text_field: str = "text", normalization: NormalizeConfig | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One dict per document of `path`, in their order: source, record (its number in the file), truncated, and either
    label with probability and probabilities, or the numbers by name (one called as another column is: "predicted source").
    Raises UserError.
    """
    head = _head(model)
    for documents, outputs_MK, cut_M in _answers(model, tokenizer, path, text_field, (), normalization, progress):
        for document, outputs_K, cut in zip(documents, outputs_MK, cut_M, strict=True):
            yield {"source": document.source, "record": document.ordinal, **_facts(head, outputs_K), "truncated": bool(cut)}


def _facts(head: HeadConfig, outputs_K: np.ndarray) -> dict[str, Any]:
    if head.problem_type == "regression":
        names = [f"predicted {name}" if name in ("source", "record", "truncated") else name for name in head.labels]
        return dict(zip(names, as_told(head, outputs_K[None])[0].tolist(), strict=True))
    probabilities = softmax(outputs_K).tolist()
    best = int(np.argmax(probabilities))
    return {"label": head.labels[best], "probability": probabilities[best],
            "probabilities": dict(zip(head.labels, probabilities, strict=True))}  # fmt: skip


def evaluate_labels(
    model: Grok1, tokenizer: Any, path: str, label_fields: Sequence[str] = (), text_field: str = "text",
    normalization: NormalizeConfig | None = None, progress: Progress | None = None,
) -> tuple[LabelEvaluation, int]:  # fmt: skip
    """(the model's loss and measures over all documents of `path`, how many were cut to length).

    label_fields: none takes the names of the model's numbers, or "label". Raises UserError, also for an unknown class.
    """
    head = _head(model)
    numbers = head.problem_type == "regression"
    fields = tuple(label_fields) or (tuple(head.labels) if numbers and "[" not in head.labels[0] else ("label",))
    if sorted(fields) == sorted(head.labels):
        fields = tuple(head.labels)  # in whatever order they are named
    result, cut = LabelEvaluation(head), 0
    for documents, outputs_MK, cut_M in _answers(model, tokenizer, path, text_field, fields, normalization, progress):
        labels_MK = _true(head, documents)
        outputs, labels = torch.from_numpy(outputs_MK), torch.from_numpy(labels_MK)
        loss_M = number_error(outputs, labels) if numbers else class_cross_entropy(outputs, labels[:, 0].long())
        result.total += float(loss_M.sum())
        result.add(outputs_MK, labels_MK)
        cut += int(cut_M.sum())
    return result, cut


def _true(head: HeadConfig, documents: list[Document]) -> np.ndarray:
    """[M, K], as the head has them."""
    kind = "number" if head.problem_type == "regression" else "category"
    for document in documents if kind == "category" else ():
        if document.label not in head.labels:
            raise UserError(f"{document.source}: record {document.ordinal}: the model knows no class '{document.label}'"
                            f"{nearest(document.label, head.labels)}")  # fmt: skip
    return encode([document.label for document in documents], kind, head.labels, head.mean, head.std)


def _head(model: Grok1) -> HeadConfig:
    if model.config.head is None:
        raise UserError("this is a language model, which labels no documents: use `pellucid evaluate` or `pellucid generate`, or "
                        "train with training.task = 'classification' or 'regression'")  # fmt: skip
    return model.config.head


def _answers(model, tokenizer, path: str, text_field: str, label_fields: Sequence[str], normalization, progress,
             ) -> Iterator[tuple[list[Document], np.ndarray, np.ndarray]]:  # fmt: skip
    """(documents, outputs [M, K], cut [M]), some documents at a time."""
    kind = "number" if model.config.head.problem_type == "regression" else "category"
    files = list_files([SourceConfig(path=path, text_field=text_field)], "--data", labels=(tuple(label_fields), kind))
    total, done, documents = sum(file.size for file in files), 0, 0
    stream = (document for file in files for document in read_documents(file))
    normalization = normalization or NormalizeConfig()
    while chunk := list(islice(stream, DOCUMENTS)):
        for document in chunk:
            if isinstance(document, Unreadable):
                raise UserError(document.message_for_options)
        texts = [normalize(document.text, normalization) for document in chunk]
        yield chunk, *answer(model, tokenizer, texts)
        documents += len(chunk)
        done += sum(len(document.text.encode()) for document in chunk)
        if progress is not None:
            progress("reading documents", min(done, total), total or None)
    if not documents:
        raise UserError(f"{path}: holds no document")
