"""Replayed steps for the page: one tensor's update weight by weight, and plays (observe/theatre.py), made on request.

Of a tensor's thousands of weights the page draws those that changed most; all others are summed, and said to be.
A play is made by a process of its own, at low priority: neither this server nor a training waits for it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pellucid.config import UserError
from pellucid.observe.replay import MOST_REPLAYED
from pellucid.observe.theatre import staged_steps, theatre_path
from pellucid.training.checkpoint import saved_steps

EDGES = 8  # weights drawn


def read_capsule(run_dir: Path, step: int) -> dict[str, Any]:
    """Weights that changed most in the step, each with gradient and terms; and the sum over all others.

    For each weight: index, before, after, gradient (after clipping), terms by name, change = after - before in float64.
    Raises UserError if the step has no capsule or it is damaged.
    """
    path = run_dir / "capsules" / f"step-{step}.safetensors"
    if not path.is_file():
        raise UserError(f"step {step} has no capsule; `pellucid explain {shlex.quote(str(run_dir))} --step {step}` makes one")
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


class Plays:
    """The plays of one run: which there are, which can be made, and the one that is being made."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.making: dict[str, Any] | None = None  # {step, phase, done, total} or {step, problem}
        self._lock = threading.Lock()

    def list(self, latest: int | None) -> dict[str, Any]:
        """Steps with a play, spans [first, last] of steps up to `latest` that can be replayed, and what is being made."""
        return {"steps": staged_steps(self.run_dir), "spans": self._spans(latest), "latest": latest, "making": self.making}

    def _spans(self, latest: int | None) -> list[list[int]]:
        """From each checkpoint, and from the beginning, as far as a replay goes."""
        spans: list[list[int]] = []
        for start in sorted({0, *saved_steps(self.run_dir / "checkpoints")}):
            last = min(start + MOST_REPLAYED, -1 if latest is None else latest)
            if spans and start <= spans[-1][1] + 1:
                spans[-1][1] = max(last, spans[-1][1])
            elif start <= last:
                spans.append([start, last])
        return spans

    def read(self, step: int) -> dict[str, Any]:
        """The play of a step. Raises UserError if there is none, or if it is damaged."""
        path = theatre_path(self.run_dir, step)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            again = f"pellucid explain {shlex.quote(str(self.run_dir))} --step {step}"
            raise UserError(f"step {step} has no play; `{again}` makes one") from None
        except ValueError as error:
            raise UserError(f"{path}: the play is damaged ({error}); remove the file and make it again") from None

    def make(self, step: int, latest: int | None) -> dict[str, Any]:
        """Begin to make the play of a step; `list` tells how far it is. Raises UserError if that cannot be."""
        spans = self._spans(latest)
        if not any(first <= step <= last for first, last in spans):
            known = ", ".join(f"{first} to {last}" for first, last in spans) or "none yet"
            raise UserError(f"step {step} cannot be replayed: no checkpoint lies near enough before it. Steps that can be: {known}")
        with self._lock:
            if self.making and "problem" not in self.making and self.making["step"] != step:
                raise UserError(f"step {self.making['step']} is being made; ask again when it is ready")
            if not self.making or "problem" in self.making:
                self.making = {"step": step, "phase": "opening the run", "done": 0, "total": 1}
                command = [sys.executable, "-P", "-m", "pellucid.observe.theatre", str(self.run_dir), str(step)]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
                threading.Thread(target=self._follow, args=(process, step), daemon=True).start()
        return self.making

    def _follow(self, process: subprocess.Popen, step: int) -> None:
        """What the process says: a JSON object a line; anything else is a library's, and told only if the process fails."""
        told, last_words = {}, "the process ended"
        for line in process.stdout:
            try:
                told = dict(json.loads(line))
            except (ValueError, TypeError):
                last_words = line.strip() or last_words
                continue
            if "phase" in told:
                self.making = {"step": step, **told}
        process.wait()
        problem = told.get("problem") or (None if "ready" in told else last_words)
        self.making = {"step": step, "problem": problem} if problem else None
