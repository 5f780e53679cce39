"""Predictions as CSV or JSON lines, and the measures of labelled documents as text."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pellucid.config import UserError

WIDEST = 12  # classes whose confusion matrix is printed; --json has any


def write_rows(rows: Iterable[dict[str, Any]], out: Path | None, kind: str) -> None:
    """kind: "csv" or "jsonl". To `out`, complete or not at all, or to stdout as they come."""
    lines = _csv(rows) if kind == "csv" else (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        for line in lines:
            sys.stdout.write(line)
        return
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8", newline="") as file:
            file.writelines(lines)
        os.replace(unfinished, out)
    except OSError as error:
        if error.filename != str(unfinished):
            raise  # of what is read
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another name or folder") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _csv(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A header, then a line a row; probabilities become columns `p(CLASS)`."""
    first = True
    for row in rows:
        flat = {key: value for key, value in row.items() if key != "probabilities"}
        flat |= {f"p({name})": f"{p:.6g}" for name, p in row.get("probabilities", {}).items()}
        line = io.StringIO()
        writer = csv.writer(line, lineterminator="\n")
        if first:
            writer.writerow(flat)
        writer.writerow(flat.values())
        yield line.getvalue()
        first = False


def describe_labels(facts: dict[str, Any]) -> str:
    """The measures of `LabelEvaluation.as_dict` in lines."""
    number = lambda value: "undefined" if value is None else f"{value:.4f}"
    names = {"loss": "loss", "accuracy": "accuracy", "macro_f1": "macro-F1", "rmse": "RMSE", "r2": "R2", "spearman": "Spearman"}
    lines = [f"{shown:<15} {number(facts[key])}" for key, shown in names.items() if key in facts]
    lines += [f"  {label}: RMSE {number(each['rmse'])}, R2 {number(each['r2'])}, Spearman {number(each['spearman'])}"
              for label, each in facts.get("numbers", {}).items()]  # fmt: skip
    cut = facts["truncated_documents"]
    lines.append(f"{'over':<15} {facts['documents']:,} documents" + (f", {cut:,} of them cut to length" if cut else ""))
    if 0 < len(facts.get("labels", ())) <= WIDEST:
        lines += ["", "true \\ predicted", *_matrix(facts["labels"], facts["confusion_matrix"], facts["f1"])]
    return "\n".join(lines)


def _matrix(labels: list[str], counts: list[list[int]], f1: dict[str, float | None]) -> Iterator[str]:
    width = max(6, *(len(label) for label in labels))
    yield " ".join([" " * width, *(label.rjust(width) for label in labels), "F1".rjust(6)])
    for label, row in zip(labels, counts, strict=True):
        score = "-" if f1[label] is None else f"{f1[label]:.3f}"
        yield " ".join([label.ljust(width), *(str(count).rjust(width) for count in row), score.rjust(6)])
