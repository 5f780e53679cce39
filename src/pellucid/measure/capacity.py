"""How many bits the parameters can hold (Morris et al. 2025, arXiv 2505.24832: about 3.6 a parameter of dense models).

Models are trained on uniformly random tokens, more and more of them. What is remembered is length * log2 V minus the
cross-entropy in bits, summed over the sequences; its plateau over the number of parameters is the capacity. The tied
embedding counts among the parameters; the router of a single expert, which decides nothing, does too.
Letters: P parameters, V vocabulary, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pellucid.config import ModelConfig, UserError, grok_intermediate_size
from pellucid.measure.intervals import student
from pellucid.measure.outcome import Outcome, spread
from pellucid.measure.plan import Job
from pellucid.measure.random_tokens import RESERVED
from pellucid.measure.training import TRAINING, estimate
from pellucid.model.size import parameter_counts

REFERENCE = 3.6  # bits per parameter, Morris et al. 2025
NEARLY = 0.9  # share of the random bits from which on what is remembered says more of the load than of the model
VOCABULARY, LENGTH, HEAD = 2048, 64, 16  # the first two as in the paper
EXPERTS, CHOSEN = 4, 2  # of the mixtures
BATCH = 64  # sequences
# Tuned for adamw. Weights that a norm follows grow with every step and so slow themselves down: only large steps keep learning
# to the end (bits a parameter after the same 2,000 epochs of a model of 38,496: 3.02 at 0.06, 3.05 at 0.15).
LEARNING_RATE = {"adamw": 1.5e-1, "adam": 1.5e-1, "muon": 6e-2, "lion": 6e-3, "adafactor": 6e-2, "sgd": 1.0}
LEAST = 36_100  # parameters, of which the embedding is most


def dense_shape(parameters: int, vocab_size: int = VOCABULARY) -> dict[str, int]:
    """The one-layer dense model nearest to so many parameters: the widest whose F can be half of Grok-1's rule; F takes the rest.

    Width counts: with hidden 16 and F 960 a model of 79,968 parameters holds less than one of 85,696 with 32 and 176.
    """
    for hidden in range(HEAD, parameters, HEAD):
        table = {"vocab_size": vocab_size, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": hidden // HEAD,
                 "num_key_value_heads": 1, "num_experts": 1, "num_experts_per_tok": 1}  # fmt: skip
        if parameter_counts(ModelConfig(**table, intermediate_size=grok_intermediate_size(hidden) // 2))["total"] > parameters:
            break
        best = table
    room = parameters - parameter_counts(ModelConfig(**best, intermediate_size=8))["total"]
    return {**best, "intermediate_size": 8 + 8 * max(0, round(room / (3 * best["hidden_size"] * 8)))}


def variants(parameters: int, optimizers: Sequence[str], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """name -> {"model", "precision", "optimizer"}: the dense model, and what is compared with it at its size."""
    dense = dense_shape(parameters)
    F = dense["intermediate_size"]
    mixture = lambda size: {**dense, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "intermediate_size": size}
    plain = {"precision": "fp32", "optimizer": "adamw"}
    known = {"dense": {"model": dense, **plain},
             "mixture, equal active": {"model": mixture(F // CHOSEN), **plain},
             "mixture, equal total": {"model": mixture(F // EXPERTS), **plain},
             "dense, bf16": {"model": dense, "precision": "bf16", "optimizer": "adamw"},
             **{f"dense, {name}": {"model": dense, "precision": "fp32", "optimizer": name} for name in optimizers}}
    return {name: value for name, value in known.items() if name == "dense" or any(kind in name for kind in kinds)}


def capacity_jobs(
    parameters: Sequence[int], loads: Sequence[float], *, epochs: int, seeds: int = 2, compare: Sequence[str] = (),
    progress: Callable[..., None] | None = None,
) -> list[Job]:  # fmt: skip
    """A run for each model, each load (random bits over 3.6 times its parameters) and each seed.

    compare: of "mixture", "bf16" and optimizers' names: also these, at the smallest size. Raises UserError.
    """
    unknown = set(compare) - {"mixture", "bf16", *LEARNING_RATE}
    if unknown:
        raise UserError(f"--compare: unknown {', '.join(sorted(unknown))}; known: mixture, bf16, {', '.join(LEARNING_RATE)}")
    if min(parameters) < LEAST:
        raise UserError(f"--parameters {min(parameters)}: the smallest model with {VOCABULARY} tokens has {LEAST:,}; give more")
    bits = LENGTH * math.log2(VOCABULARY - RESERVED)
    optimizers = [name for name in compare if name in LEARNING_RATE]
    jobs, known = [], {}
    models = [(size, name, entry) for size in parameters
              for name, entry in variants(size, optimizers, compare if size == min(parameters) else ()).items()]
    for number, (size, name, entry) in enumerate(models):
        if progress is not None:
            progress("estimating", number, len(models))
        total = parameter_counts(ModelConfig(**entry["model"]))["total"]
        for load in loads:
            count = max(2, round(load * REFERENCE * total / bits))
            for seed in range(seeds):
                settings = _settings(entry, count, epochs, seed)
                seconds = estimate(settings["config"], settings["data"], known)
                jobs.append(Job(f"{name.replace(', ', '-').replace(' ', '-')}-{size}-load-{load:g}-seed-{seed}", TRAINING,
                                {**settings, "about": {"model": name, "size": size, "load": load, "seed": seed}}, seconds))
    return jobs


def _settings(entry: dict[str, Any], count: int, epochs: int, seed: int) -> dict[str, Any]:
    batch = min(count, BATCH)
    steps = max(1, round(epochs * count / batch))
    rate = LEARNING_RATE[entry["optimizer"]]
    config = {
        "model": entry["model"], "data": {"sequence_length": LENGTH},
        "training": {"max_steps": steps, "batch_size": batch, "precision": entry["precision"], "seed": seed},
        "optimizer": {"name": entry["optimizer"], "learning_rate": rate, "weight_decay": 0.0, "beta2": 0.99},
        "schedule": {"name": "cosine", "warmup_steps": min(100, steps // 10), "final_factor": 0.0},
    }  # fmt: skip
    data = {"count": count, "length": LENGTH, "vocab_size": VOCABULARY, "seed": seed}
    return {"config": config, "data": data, "points": 4, "rows": count}


def capacity_outcome(jobs: Sequence[Job], results: dict[str, Any]) -> Outcome:
    """Remembered bits of every run; of every model the most, per parameter with intervals over seeds, and if the load bounds it."""
    runs = []
    for job in jobs:
        result, data = results[job.name], job.settings["data"]
        tokens = data["count"] * data["length"]
        entropy = math.log2(data["vocab_size"] - RESERVED)
        remembered = lambda loss, n=tokens, h=entropy: n * (h - loss / math.log(2))
        runs.append({**job.settings["about"], "total": result["parameters"]["total"], "active": result["parameters"]["active"],
                     "random_bits": tokens * entropy, "bits": remembered(result["held_out"]),
                     "earlier": remembered(result["curve"][-2]["train"]) if len(result["curve"]) > 1 else None})
    models = []
    for name, size in dict.fromkeys((run["model"], run["size"]) for run in runs):
        mine = [run for run in runs if (run["model"], run["size"]) == (name, size)]
        by_load = {load: [run["bits"] for run in mine if run["load"] == load] for load in dict.fromkeys(r["load"] for r in mine)}
        most = max(by_load, key=lambda load: np.mean(by_load[load]))
        bits, first = np.array(by_load[most]), mine[0]
        given = float(np.mean([run["random_bits"] for run in mine if run["load"] == most])) / first["total"]
        gain = [run["bits"] / run["earlier"] - 1 for run in mine if run["load"] == most and run["earlier"]]
        models.append({"model": name, "size": size, "total": first["total"], "active": first["active"], "load": most,
                       "given": given, "bounded": bool(bits.mean() / first["total"] > NEARLY * given or given < NEARLY * REFERENCE),
                       "per_parameter": student(bits / first["total"]), "per_active": student(bits / first["active"]),
                       "seeds": len(bits), "last_quarter": float(np.mean(gain)) if gain else None})
    numbers = {"reference": REFERENCE, "vocabulary": VOCABULARY, "length": LENGTH, "runs": runs, "models": models}
    outcome = Outcome("capacity", "How many bits the parameters hold", {"vocabulary": VOCABULARY, "length": LENGTH}, numbers=numbers)
    _describe(outcome)
    return outcome


def _describe(outcome: Outcome) -> None:
    found = outcome.numbers
    words = lambda i: f"{i['mean']:.2f}" if i["low"] is None else spread(i, 2)
    for model in found["models"]:
        name = f"{model['model'].capitalize()}, {model['total']:,} parameters"
        if model["bounded"]:
            outcome.findings.append(
                f"{name}: {words(model['per_parameter'])} bits a parameter of the {model['given']:.2f} there were: the load bounds it, "
                f"so it is no capacity to compare with the published {REFERENCE}; give larger --loads.")
        elif model["model"] == "dense":
            away = model["per_parameter"]["mean"] / REFERENCE - 1
            still = model["last_quarter"]
            outcome.findings.append(
                f"{name}: {words(model['per_parameter'])} bits a parameter, {100 * abs(away):.1f} % "
                f"{'below' if away < 0 else 'above'} the published {REFERENCE}"
                + (f"; the last quarter of training still added {100 * still:.1f} %." if still is not None else "."))
        else:
            outcome.findings.append(f"{name}, {model['active']:,} active: {words(model['per_parameter'])} bits a parameter, "
                                    f"{words(model['per_active'])} an active one.")
    ends = ("mean", "low", "high")
    outcome.tables.append({
        "title": "Most bits a parameter remembered",
        "columns": ["model", "parameters", "active", "given", "a parameter", "low", "high", "an active one", "low", "high", "seeds"],
        "rows": [[m["model"], m["total"], m["active"], m["given"], *(m["per_parameter"][e] for e in ends),
                  *(m["per_active"][e] for e in ends), m["seeds"]] for m in found["models"]]})
    lines, several = [], len({run["load"] for run in found["runs"]}) > 1
    for model in found["models"]:
        mine = [run for run in found["runs"] if (run["model"], run["size"]) == (model["model"], model["size"])]
        loads = sorted({run["load"] for run in mine})
        at = lambda load, key, mine=mine: [run[key] for run in mine if run["load"] == load]
        origin = [0.0] if len(loads) > 1 or not several else []  # beside curves, one load is one point
        lines.append({"name": f"{model['model']} {model['total']:,}",
                      "x": [*origin, *(float(np.mean(at(load, "random_bits"))) / model["total"] for load in loads)],
                      "y": [*origin, *(float(np.mean(at(load, "bits"))) / model["total"] for load in loads)]})
    outcome.charts.append({"title": "What is remembered of more and more random bits", "x": "random bits per parameter",
                           "y": "remembered bits per parameter", "level": ["published: 3.6", REFERENCE], "lines": lines})
