"""A replayed step's tensors (capsules/step-N.safetensors, written by `pellucid explain`), told weight by weight.

Of a tensor's thousands of weights the page draws those that changed most; all others are summed, and said to be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pellucid.config import UserError

EDGES = 8  # weights drawn


def read_capsule(run_dir: Path, step: int) -> dict[str, Any]:
    """Weights that changed most in the step, each with gradient and terms; and the sum over all others.

    For each weight: index, before, after, gradient (after clipping), terms by name, change = after - before in float64.
    Raises UserError if the step has no capsule or it is damaged.
    """
    path = run_dir / "capsules" / f"step-{step}.safetensors"
    if not path.is_file():
        raise UserError(f"step {step} has no capsule; `pellucid explain {run_dir} --step {step}` makes one")
    try:
        with safe_open(path, framework="pt") as file:
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            name = facts["parameter"]
            tensors = {key: file.get_tensor(key).double().numpy() for key in file.keys() if key.endswith("." + name)}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: the capsule is damaged ({error}); make it again with `pellucid explain`") from None
    before, after = tensors["before." + name], tensors["after." + name]
    change = after - before
    terms = {key[len("term."): -len(name) - 1]: value for key, value in tensors.items() if key.startswith("term.")}
    largest = np.argsort(-np.abs(change), axis=None, kind="stable")[:EDGES]
    value = lambda tensor, at: float(tensor[at]) if tensor.shape == change.shape else None
    weights = []
    for flat in largest:
        at = np.unravel_index(flat, change.shape)
        weights.append({
            "index": [int(i) for i in at], "before": float(before[at]), "after": float(after[at]), "change": float(change[at]),
            "gradient": value(tensors["gradient." + name], at),
            "terms": {key: value(tensor, at) for key, tensor in terms.items()},
        })  # fmt: skip
    rest = np.delete(change.reshape(-1), largest)
    return {**facts, "step": step, "shape": list(change.shape), "weights": weights,
            "others": {"count": int(rest.size), "sum": float(rest.sum()), "norm": float(np.linalg.norm(rest))},
            "norm": float(np.linalg.norm(change))}  # fmt: skip
