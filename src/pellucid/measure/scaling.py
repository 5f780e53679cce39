"""How loss falls with parameters and text: a ladder of sizes times amounts of text, a law through it, and its trial.

Every run has an own schedule that ends with its budget (Hoffmann et al. 2022, section 3). N is the number of parameters active
for a token, embedding included. The law is judged by a run larger than all it was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pellucid.config import Config, UserError, preset_names
from pellucid.data.dataset import Dataset
from pellucid.measure.outcome import Outcome
from pellucid.measure.plan import Job
from pellucid.measure.scaling_law import LEAST_EACH, bootstrap, constants, fit, interval
from pellucid.measure.training import TRAINING, estimate, fitted
from pellucid.model.size import parameter_counts

HEAD = 16  # head_dim of the ladder
LAYER_WIDTH = 24  # a layer for every so many of hidden size
LEAST_STEPS = 100  # of the shortest run: before, the loss falls faster with more text, not slower as a power law does
READ = {"sequence_length", "sources", "mixture", "prepared"}  # of [data]: what decides the order of prepared text
BUDGETS = (1.0, 10.0, 100.0, 1000.0)  # times the compute of the largest run


def shape(size: str, base: Config, option: str = "--sizes") -> dict[str, Any]:
    """The [model] table of a rung: a preset's name, or a hidden size (layers and heads in proportion). option: where it was given."""
    if size in preset_names():
        return {"preset": size}
    if not size.isdecimal() or int(size) < HEAD or int(size) % HEAD:
        raise UserError(f"{option}: '{size}' is neither a preset ({', '.join(preset_names())}) nor a hidden size, a multiple of {HEAD}")
    hidden = int(size)
    return {"hidden_size": hidden, "num_hidden_layers": max(1, round(hidden / LAYER_WIDTH)), "num_attention_heads": hidden // HEAD,
            "num_key_value_heads": 1, "num_experts": base.model.num_experts,
            "num_experts_per_tok": base.model.num_experts_per_tok}  # fmt: skip


def scaling_jobs(
    base: Config, dataset: Dataset, sizes: Sequence[str], tokens: Sequence[int], trial: tuple[str, int], seed: int = 0,
    progress: Callable[..., None] | None = None,
) -> list[Job]:  # fmt: skip
    """A run for each size and amount, and the trial run last. Raises UserError where the text or the ladder is too small."""
    step = base.training.batch_size * base.data.sequence_length
    most = max([*tokens, trial[1]])
    if dataset.train.tokens_per_epoch < most:
        raise UserError(f"the plan's largest run takes {most:,} tokens but the text has {dataset.train.tokens_per_epoch:,}; a scaling "
                        "law is about text seen once: give more text, or smaller --tokens and --trial")
    if min(tokens) < LEAST_STEPS * step:
        raise UserError(f"--tokens {min(tokens)}: under {LEAST_STEPS} steps of {step} tokens, too few to tell how loss falls; give "
                        "more, or a smaller training.batch_size")
    rungs = [*(shape(size, base) for size in sizes), shape(trial[0], base, "--trial")]
    *active, largest = (parameter_counts(fitted({"model": rung}, dataset).model)["active"] for rung in rungs)
    if min(len(set(active)), len({amount // step for amount in tokens})) < LEAST_EACH:
        raise UserError("through two points goes a power law with any exponent: give three or more --sizes and --tokens, of different "
                        f"active parameters and whole steps of {step} tokens")
    if largest <= max(active) or trial[1] // step <= max(tokens) // step:
        raise UserError(f"--trial {trial[0]}:{trial[1]}: the run that judges the law must be larger than all others, in active "
                        f"parameters ({largest:,}; the largest has {max(active):,}) and in steps of {step} tokens")
    known: dict[str, float] = {}
    runs = [(size, amount) for size in sizes for amount in tokens] + [trial]
    jobs = []
    for number, (size, amount) in enumerate(runs):
        if progress is not None:
            progress("estimating", number, len(runs))
        tables = base.model_dump(mode="json", exclude={"model", "data", "observe", "checkpoint"})
        tables["training"] |= {"max_steps": max(1, amount // step), "max_tokens": None, "max_epochs": None, "seed": seed}
        tables["schedule"]["warmup_steps"] = min(base.schedule.warmup_steps, amount // step // 5)
        tables |= {"model": shape(size, base), "data": base.data.model_dump(mode="json", include=READ)}
        settings = {"config": tables, "data": str(dataset.directory.resolve()), "data_fingerprint": dataset.fingerprint, "points": 0,
                    "rows": 0}  # fmt: skip
        name = f"{'trial' if number == len(runs) - 1 else 'run'}-{size}-{amount}"
        jobs.append(Job(name, TRAINING, settings, estimate(tables, settings["data"], known)))
    return jobs


def scaling_outcome(
    results: dict[str, Any], *, draws: int = 200, seed: int = 0, progress: Callable[..., None] = lambda *_: None,
) -> Outcome:  # fmt: skip
    """The law of the runs, its intervals, what it says of the trial run and of larger budgets."""
    runs = [{"name": name, "N": result["parameters"]["active"], "D": result["tokens"], "loss": result["held_out"]}
            for name, result in results.items()]
    trial, fitted = runs[-1], runs[:-1]
    N, D, loss = (np.array([run[key] for run in fitted], float) for key in ("N", "D", "loss"))
    law = fit(N, D, loss)
    laws = bootstrap(N, D, loss, law, draws, seed, lambda n: progress("fitting the law", n, draws))
    expected = float(law.loss(trial["N"], trial["D"]))
    low, high = interval(laws, lambda other: float(other.loss(trial["N"], trial["D"])))
    error = expected / trial["loss"] - 1
    naive = float(loss.min()) / trial["loss"] - 1  # who says "no better than the best so far"
    largest = 6.0 * trial["N"] * trial["D"]
    budgets = []
    for factor in BUDGETS:
        best_N, best_D = law.optimal(factor * largest)
        span = interval(laws, lambda other, c=factor * largest: other.optimal(c)[0])
        budgets.append({"flops": factor * largest, "N": best_N, "N_low": span[0], "N_high": span[1], "D": best_D,
                        "loss": float(law.loss(best_N, best_D))})
    residual = float(np.sqrt(np.mean((np.log(law.loss(N, D)) - np.log(loss)) ** 2)))
    numbers = {"seed": seed, "draws": draws, "runs": runs, "still_falling": still_falling(N, D, loss),
               "law": constants(law, laws), "residual": residual, "budgets": budgets,
               "trial": {**trial, "predicted": expected, "low": low, "high": high, "error": error, "error_of_no_gain": naive}}
    outcome = Outcome("scaling", "How loss falls with size and text", {"seed": seed, "draws": draws}, numbers=numbers)
    _describe(outcome, law)
    return outcome


def still_falling(N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> bool:
    """Whether, over most sizes, each doubling of the text gains more than the one before: no power law does that."""
    bends = []
    for size in np.unique(N):
        order = np.argsort(D[N == size])
        slopes = np.diff(loss[N == size][order]) / np.diff(np.log(D[N == size][order]))
        bends += [np.mean(np.diff(slopes))] if len(slopes) > 1 else []
    return bool(bends) and float(np.median(bends)) < 0


def _describe(outcome: Outcome, law: Any) -> None:
    found = outcome.numbers
    trial, budgets, table = found["trial"], found["budgets"], found["law"]
    wide = [name for name, value in table.items() if value["high"] > 3 * value["low"]]
    outcome.findings += [
        f"L(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f} over {len(found['runs']) - 1} runs; "
        f"it misses them by {found['residual']:.2%} (root mean square).",
        f"Trial: a run larger than all of these (N = {trial['N']:,}, D = {trial['D']:,} tokens) was predicted {trial['predicted']:.3f} "
        f"({trial['low']:.3f} to {trial['high']:.3f}) and reached {trial['loss']:.3f}: an error of {trial['error']:+.1%} "
        f"(saying 'no better than the best so far' errs by {trial['error_of_no_gain']:+.1%}).",
        f"For the compute of that run ({budgets[0]['flops']:.2g} FLOP) the law would take N = {budgets[0]['N']:.3g} "
        f"({budgets[0]['N_low']:.2g} to {budgets[0]['N_high']:.2g}) and D = {budgets[0]['D']:.3g} tokens.",
    ]
    if found["still_falling"]:
        outcome.findings.append("The loss still falls faster and faster with more text, as it does early in training and as no power "
                                "law can: these runs are too short for a law. Give larger --tokens.")
    if wide:
        outcome.findings.append(f"These runs hardly fix {', '.join(wide)}: their intervals span more than a factor of three. Trust the "
                                "law near its runs; more sizes and amounts would tell.")
    outcome.tables += [
        {"title": "Constants", "columns": ["", "value", "low", "high"],
         "rows": [[name, value["mean"], value["low"], value["high"]] for name, value in table.items()]},
        {"title": "Runs", "columns": ["run", "N active", "tokens", "held-out loss", "law"],
         "rows": [[run["name"], run["N"], run["D"], run["loss"], float(law.loss(run["N"], run["D"]))] for run in found["runs"]]},
        {"title": "Compute-optimal size", "columns": ["FLOP", "N", "low", "high", "tokens", "loss"],
         "rows": [[f"{b['flops']:.2g}", *(float(b[key]) for key in ("N", "N_low", "N_high", "D", "loss"))] for b in budgets]}]
    sizes = sorted({run["N"] for run in found["runs"]})
    reach = np.geomspace(min(run["D"] for run in found["runs"]), max(run["D"] for run in found["runs"]), 30)
    lines = []
    for size in sizes:
        mine = [run for run in found["runs"] if run["N"] == size]
        lines.append({"name": f"N = {size:,}", "points": True, "x": [run["D"] for run in mine], "y": [run["loss"] for run in mine]})
    curves = [{"name": "", "x": reach.tolist(), "y": law.loss(size, reach).tolist(), "dashed": True} for size in sizes]
    outcome.charts.append({"title": "Runs (points) and the law (dashes)", "x": "tokens of text", "y": "held-out nats per token",
                           "log_x": True, "lines": [*lines, *({**curve, "colour": n} for n, curve in enumerate(curves))]})
