"""Picture 2, labels: the class or the numbers that stand beside a document's text, from its record to the loader.

A label travels through all stages as one string: the name of a class, or a JSON list of numbers. The manifest sums up
those of the training documents (`summarize`): classes with their counts, or mean and standard deviation of each number.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pellucid.config import DataConfig, UserError
from pellucid.data.document import SourceFile, Unreadable, half_surrogate, kind_of, unreadable_field

SHOWN = 5  # names of classes in a sentence


def read_label(record: Mapping[str, Any], file: SourceFile, where: str) -> str | Unreadable | None:
    """The label in a record, as the file's settings say; None where no label is asked for."""
    if not file.label_fields:
        return None
    values: list[Any] = []
    for field in file.label_fields:
        if field not in record:
            return unreadable_field(where, field, list(record), "data.label_field")
        value = record[field]
        if value is None or value == "":
            return Unreadable("no label", f"{where}: field '{field}' is empty, so the document has no label")
        if file.label_type == "category":
            return _category(value, f"{where}: field '{field}'")
        found = _numbers(value, f"{where}: field '{field}'")
        if isinstance(found, Unreadable):
            return found
        values += found
    return json.dumps(values)


def _category(value: Any, where: str) -> str | Unreadable:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # what tables make of integers beside missing values
        value = int(value)
    if isinstance(value, str | int):
        return half_surrogate(str(value), where) or str(value)
    kind = "NaN" if value != value else kind_of(value)
    return Unreadable("wrong label", f"{where} is {kind}; a class is a name or an integer")


def _numbers(value: Any, where: str) -> list[float] | Unreadable:
    numbers = []
    for part in value if isinstance(value, list) and value else [value]:
        try:
            number = float(part) if isinstance(part, int | float | str) and not isinstance(part, bool) else None
        except (ValueError, OverflowError):
            number = None
        if number is None:
            shown = repr(part) if isinstance(part, str | bool) else kind_of(part)
            comma = "; write it with a point" if isinstance(part, str) and "," in part else ""
            return Unreadable("wrong label", f"{where} is {shown[:60]}, not a number{comma}")
        if not math.isfinite(number):
            return Unreadable("wrong label", f"{where} is {number}; a label must be finite: leave the record out or mend it")
        numbers.append(number)
    return numbers


def encode(labels: Sequence[str], kind: str, names: Sequence[str], mean: Sequence[float] = (), std: Sequence[float] = (),
           ) -> np.ndarray:
    """Labels [documents] as float32 [documents, K]: a class by its number, numbers in standard deviations from the mean.

    kind: "category" or "number". Raises UserError for another number of numbers than there are names, and for numbers that
    float32 cannot hold.
    """
    if kind == "category":
        number = {name: index for index, name in enumerate(names)}
        return np.array([[number[label]] for label in labels], dtype=np.float32)
    numbers = [json.loads(label) for label in labels]
    wrong = next((found for found in numbers if len(found) != len(names)), None)
    if wrong is not None:
        raise UserError(f"a label of {len(wrong)} numbers where there should be {len(names)}: {', '.join(names)}")
    with np.errstate(over="ignore"):
        standardized = ((np.array(numbers, dtype=np.float64) - mean) / std).astype(np.float32)
    if not (whole := np.isfinite(standardized).all(-1)).all():
        raise UserError(f"a label of {labels[int(whole.argmin())]}: not finite numbers of a size like those of the training documents")
    return standardized


def summarize(config: DataConfig, train: list[str], held_out: list[str]) -> dict[str, Any]:
    """The manifest's `labels`. Raises UserError for labels from which nothing can be learnt."""
    summary = {"fields": list(config.label_fields), "type": config.label_type}
    if config.label_type == "category":
        return summary | _classes(train, held_out)
    widths = Counter(len(json.loads(label)) for label in [*train, *held_out])
    if len(widths) > 1:
        raise UserError(f"data.label_field: some documents have {min(widths)} numbers and others {max(widths)}; "
                        "each must have as many")
    numbers = np.array([json.loads(label) for label in train], dtype=np.float64)
    names = list(config.label_fields) if numbers.shape[1] == len(config.label_fields) else \
        [f"{config.label_fields[0]}[{n}]" for n in range(numbers.shape[1])]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = numbers.mean(0), numbers.std(0)
    for name, value, spread in zip(names, mean, std, strict=True):
        if not math.isfinite(spread):
            raise UserError(f"data.label_field: '{name}' has numbers so large that their spread cannot be computed; give them in a "
                            "larger unit, or leave out those that are wrong")
        if not spread > 1e-12 * abs(value):
            raise UserError(f"data.label_field: '{name}' is {value:g} in every training document; there is nothing to learn")
    return summary | {"names": names, "mean": mean.tolist(), "std": std.tolist()}


def _classes(train: list[str], held_out: list[str]) -> dict[str, Any]:
    counts = Counter(train)
    if len(counts) < 2:
        raise UserError(f"data.label_field: every training document is of the class '{train[0]}'; give at least two classes")
    unseen = Counter(label for label in held_out if label not in counts)
    if unseen:
        shown = ", ".join(f"'{name}' ({count})" for name, count in unseen.most_common(SHOWN))
        raise UserError(f"data.label_field: classes that only held-out documents have, so none could be learnt: {shown}; "
                        "correct them, give more documents of them, or change data.validation_fraction")
    whole = all(re.fullmatch(r"-?[0-9]+", name) for name in counts)
    names = sorted(counts, key=int if whole else None)
    return {"names": names, "counts": [counts[name] for name in names]}
