"""What the experts of each layer do: which tokens they take, how alike they are, how long a token stays with them.

Specialisation is lift, P(expert | class of token) / P(expert), and the information in bits that the class gives about the
expert. Redundancy: cosines of weights, of their changes since the start of training, and of outputs for the same tokens.
Churn: share of tokens whose set of experts changed (Muennighoff et al. 2024, OLMoE, section 5).
Letters: G documents, N tokens, L layers, E experts, k per token, C classes of token.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.config import UserError, load_config
from pellucid.measure import intervals
from pellucid.measure.outcome import Outcome, spread
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.training import checkpoint

CLASSES = ("word start", "word part", "number", "punctuation", "space or line end", "other")
OUTPUT_TOKENS = 512  # on which experts' outputs are compared
DRAWS = 500


def measure_experts(
    model: Grok1, tokenizer: Any, streams: Sequence[np.ndarray], *, context: int, run: str | Path | None = None,
    seed: int = 0, progress: Callable[..., None] | None = None,
) -> Outcome:  # fmt: skip
    """streams: documents as eos + text + eos. run: where training started and its kept checkpoints are, if it is a run.

    Raises UserError for a model of one expert, or without text.
    """
    progress = progress or (lambda *_: None)
    began, E = time.perf_counter(), model.config.num_experts
    if E < 2:
        raise UserError("the model has one expert in each layer: there is nothing to compare")
    pieces = [(g, stream[s : s + context]) for g, stream in enumerate(streams) for s in range(0, len(stream) - 1, context)]
    if not pieces:
        raise UserError("there is no text to measure on; give some with --data")
    owners_N = np.concatenate([np.full(len(piece), g) for g, piece in pieces])
    tokens_N = np.concatenate([piece for _, piece in pieces])
    look = lambda network, name: _chosen(network, pieces, lambda done: progress(name, done, len(tokens_N)))
    final_LNk = look(model, "routing")
    classes_N = token_classes(tokenizer, model.config.vocab_size)[tokens_N]
    numbers = {"tokens": len(tokens_N), "documents": len(streams), "experts": E, "seed": seed}
    numbers["specialisation"] = specialisation(final_LNk, classes_N, owners_N, E)
    snapshots = list(_snapshots(run)) if run is not None else []
    start = next((make() for step, make in snapshots if step == 0), None)
    numbers["redundancy"] = redundancy(model, start, pieces)
    numbers["churn"] = churn([(step, look(make(), f"routing at step {step}")) for step, make in snapshots], owners_N, E,
                             model.config.num_experts_per_tok)  # fmt: skip
    settings = {"context": context, "seed": seed}
    outcome = Outcome("experts", "What the experts do", settings, numbers=numbers)
    _describe(outcome)
    outcome.seconds = time.perf_counter() - began
    return outcome


# ------------------------------------------------------------------------------------ specialisation


def token_classes(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """int64 [V]: the row of CLASSES that each token's text belongs to."""
    found = np.full(vocab_size, CLASSES.index("other"))
    for token in range(min(vocab_size, tokenizer.vocab_size)):
        found[token] = CLASSES.index(_class(tokenizer.decode([token])))
    return found


def _class(text: str) -> str:
    bare = text.strip()
    if "\ufffd" in text or not text:
        return "other"
    if not bare:
        return "space or line end"
    if bare[0].isalpha():
        return "word start" if text[0].isspace() else "word part"
    return "number" if bare[0].isdigit() else "punctuation"


def specialisation(chosen_LNk: np.ndarray, classes_N: np.ndarray, owners_N: np.ndarray, E: int) -> list[dict]:
    """Per layer: lift [C][E] (None for a class or expert never met), and information in bits with its interval.

    Information found in a sample is too high, by the chance in it. Documents drawn from it again add as much once more (Efron
    & Tibshirani 1993, chapter 10): that is taken off once from the information, and twice from that of the draws.
    """
    C, G = len(CLASSES), int(owners_N.max()) + 1
    weights = np.random.default_rng(0).multinomial(G, np.full(G, 1 / G), size=DRAWS)
    found = []
    for chosen_Nk in chosen_LNk:
        cell = (owners_N[:, None] * C + classes_N[:, None]) * E + chosen_Nk
        counts_GCE = np.bincount(cell.ravel(), minlength=G * C * E).reshape(G, C, E).astype(float)
        table = counts_GCE.sum(0)
        drawn = np.array([information(np.tensordot(w, counts_GCE, 1)) for w in weights])
        bias = drawn.mean() - information(table)
        bits = information(table) - bias
        low, high = intervals.around(bits, drawn - 2 * bias, G)
        with np.errstate(divide="ignore", invalid="ignore"):
            lift = table * table.sum() / (table.sum(1, keepdims=True) * table.sum(0))
        found.append({"lift": [[float(v) if np.isfinite(v) else None for v in row] for row in lift],
                      "bits": {"mean": float(bits), "low": float(low), "high": float(high)},
                      "load": (table.sum(0) / table.sum()).tolist()})
    return found


def information(table_CE: np.ndarray) -> float:
    """Mutual information in bits of a table of counts."""
    shares = table_CE / table_CE.sum()
    expected = shares.sum(1, keepdims=True) * shares.sum(0)
    met = shares > 0
    return float((shares[met] * np.log2(shares[met] / expected[met])).sum())


# ---------------------------------------------------------------------------------------- redundancy


@torch.no_grad()
def redundancy(model: Grok1, start: Grok1 | None, pieces: Sequence[tuple[int, np.ndarray]]) -> list[dict]:
    """Per layer: cosines [E][E] of the experts' weights, of their updates (None without a start) and of their outputs."""
    inputs = _expert_inputs(model, pieces)
    found = []
    for number, layer in enumerate(model.layers):
        flat = lambda moe: torch.cat([moe.gate_up_proj.flatten(1), moe.down_proj.flatten(1)], 1).double()
        weights = flat(layer.moe)
        cosines = {"weights": _cosines(weights).tolist(), "updates": None}
        if start is not None:
            cosines["updates"] = _cosines(weights - flat(start.layers[number].moe)).tolist()
        x_ND = inputs[number]
        gate, up = torch.einsum("nd,efd->enf", x_ND.double(), layer.moe.gate_up_proj.double()).chunk(2, -1)
        inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
        outputs = torch.einsum("enf,edf->end", inner, layer.moe.down_proj.double())
        unit = torch.nn.functional.normalize(outputs, dim=-1)
        cosines["outputs"] = (torch.einsum("end,fnd->ef", unit, unit) / len(x_ND)).tolist()
        found.append(cosines)
    return found


def _cosines(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return unit @ unit.T


def _expert_inputs(model: Grok1, pieces: Sequence[tuple[int, np.ndarray]]) -> list[Tensor]:
    """What the experts of each layer are given for the first tokens of the text: [N, D] each."""
    found: list[Tensor] = []
    parts, total = [], 0
    for _, piece in pieces:
        parts.append(piece)
        if (total := total + len(piece)) >= OUTPUT_TOKENS:
            break
    keep = lambda module, arguments: found.append(arguments[0].flatten(0, 1)[:OUTPUT_TOKENS].clone())
    gathered: list[list[Tensor]] = [[] for _ in model.layers]
    for part in parts:
        hooks = [layer.moe.register_forward_pre_hook(keep) for layer in model.layers]
        try:
            model.hidden_states(_row(part, model))
        finally:
            for hook in hooks:
                hook.remove()
        for rows, new in zip(gathered, found, strict=True):
            rows.append(new)
        found.clear()
    return [torch.cat(rows)[:OUTPUT_TOKENS] for rows in gathered]


# --------------------------------------------------------------------------------------------- churn


def churn(snapshots: Sequence[tuple[int, np.ndarray]], owners_N: np.ndarray, E: int, k: int) -> dict | None:
    """From each snapshot (step, experts [L, N, k]) to the next and to the last: share of tokens whose set changed, by layer.

    Two sets drawn by chance would differ for 1 - 1 / C(E, k) of the tokens. None for fewer than two snapshots.
    """
    if len(snapshots) < 2:
        return None
    G = int(owners_N.max()) + 1
    per_document = lambda values: np.bincount(owners_N, weights=values, minlength=G)
    counts = per_document(np.ones(len(owners_N)))
    sets = [(step, np.sort(chosen, axis=-1)) for step, chosen in snapshots]
    changed = lambda a, b: (a != b).any(-1)  # [L, N]
    share = lambda table: [intervals.share(per_document(layer)[counts > 0], counts[counts > 0], draws=DRAWS) for layer in table]
    rows = [{"from": before, "to": after, "layers": share(changed(a, b)), "to_last": share(changed(a, sets[-1][1]))}
            for (before, a), (after, b) in itertools.pairwise(sets)]
    ways = np.prod([(E - i) / (i + 1) for i in range(k)])
    return {"steps": rows, "chance": float(1 - 1 / ways)}


def _snapshots(run: str | Path) -> Iterator[tuple[int, Callable[[], Grok1]]]:
    """(step, how to make the model of then): from every kept checkpoint, and as initialized.

    A run that began from another model keeps that as its checkpoint of step 0; without it its beginning is not known.
    """
    run = Path(run)
    config = load_config(run / "config.toml")
    saved = checkpoint.saved_steps(run / "checkpoints")

    def restored(folder: Path) -> Grok1:
        model = Grok1(config.model, device="meta")
        model.load_state_dict(checkpoint.load(folder).tensors["model"], assign=True)
        return model

    if 0 not in saved and config.model.init_from is None:
        yield 0, lambda: initialize(Grok1(config.model), config.training.seed)
    for step in sorted(saved):
        yield step, lambda folder=saved[step]: restored(folder)


@torch.no_grad()
def _chosen(model: Grok1, pieces: Sequence[tuple[int, np.ndarray]], on_tokens: Callable[[int], None]) -> np.ndarray:
    """int64 [L, N, k]: the experts of every token, piece by piece."""
    found, done = [], 0
    for _, piece in pieces:
        _, routings = model.hidden_states(_row(piece, model))
        found.append(torch.stack([routing.expert_index_Nk for routing in routings]).cpu().numpy())
        done += len(piece)
        on_tokens(done)
    return np.concatenate(found, axis=1)


def _row(piece: np.ndarray, model: Grok1) -> Tensor:
    return torch.from_numpy(piece)[None].to(model.embedding.weight.device)


# ------------------------------------------------------------------------------------------ in words


def _describe(outcome: Outcome) -> None:
    found = outcome.numbers
    layers, E = range(len(found["specialisation"])), found["experts"]
    for layer in layers:
        special = found["specialisation"][layer]
        lift, c, e = max((v, c, e) for c, row in enumerate(special["lift"]) for e, v in enumerate(row) if v is not None)
        outcome.findings.append(
            f"Layer {layer}: the class of a token tells {spread(special['bits'])} bits about its experts; the strongest "
            f"preference is expert {e} for '{CLASSES[c]}', {lift:.2f} times as often as for all tokens.")
    apart = lambda table: np.array(table)[~np.eye(E, dtype=bool)]
    rows = []
    for layer, cosines in enumerate(found["redundancy"]):
        for kind, table in cosines.items():
            if table is not None:
                pairs = apart(table)
                rows.append([layer, kind, float(pairs.mean()), float(pairs.min()), float(pairs.max())])
    outcome.tables.append({"title": "Cosines between different experts (1: the same, 0: unrelated)",
                           "columns": ["layer", "of", "mean", "least", "most"], "rows": rows})
    of_outputs = max((row for row in rows if row[1] == "outputs"), key=lambda row: row[4])
    outcome.findings.append(
        f"For the same tokens the two most alike experts (layer {of_outputs[0]}) give outputs with a cosine of "
        f"{of_outputs[4]:.2f}: {'nearly one expert twice' if of_outputs[4] > 0.9 else 'no two are redundant'}.")
    if found["churn"] is not None:
        steps = found["churn"]["steps"]
        last = np.mean([layer["mean"] for layer in steps[-1]["layers"]])
        first = np.mean([layer["mean"] for layer in steps[0]["layers"]])
        outcome.findings.append(
            f"Routing: {first:.0%} of tokens changed experts from step {steps[0]['from']} to {steps[0]['to']}, {last:.0%} from "
            f"step {steps[-1]['from']} to {steps[-1]['to']} (by chance {found['churn']['chance']:.0%}).")
        curve = lambda part: [
            {"name": f"layer {n}", "x": [row["from" if part == "to_last" else "to"] for row in steps],
             **{key: [row[part][n][end] for row in steps] for key, end in (("y", "mean"), ("low", "low"), ("high", "high"))}}
            for n in layers]  # fmt: skip
        outcome.charts.append({"title": f"Share of tokens whose experts are not yet those of step {steps[-1]['to']}", "x": "step",
                               "y": "share", "level": ["by chance", found["churn"]["chance"]], "lines": curve("to_last")})
    for layer in layers:
        outcome.charts.append({
            "title": f"Layer {layer}: how often each expert takes a class of tokens (1: as often as all tokens)",
            "x": "expert", "centre": 1.0, "rows": list(CLASSES), "columns": list(range(E)),
            "heat": found["specialisation"][layer]["lift"]})
    if found["redundancy"][0]["updates"] is not None:
        outcome.charts.append({
            "title": "Layer 0: cosine of what training added to each expert", "x": "expert", "columns": list(range(E)),
            "rows": list(range(E)), "heat": found["redundancy"][0]["updates"]})
