"""Which tokens each expert takes, and which sibling it resembles: read from a run's newest checkpoint when asked.

A token's preference for an expert is how much more often it is sent there than tokens are on the whole (lift); shown are
those that weigh most in the log-likelihood ratio, count * ln(lift) (Dunning 1993). Letters: L layers, E experts,
V tokens of the vocabulary, N tokens looked at, k experts per token.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.config import UserError, load_config
from pellucid.data.dataset import Dataset
from pellucid.model.grok import Grok1
from pellucid.training import checkpoint

ROWS, SHOWN = 64, 10  # rows looked at, tokens shown of each expert
MOST_PARAMETERS = 50_000_000  # beyond it reading them would be felt beside a training


@torch.no_grad()
def preferences(run_dir: Path, dataset: Dataset, text_of: Any, parameters: int) -> dict[str, Any]:
    """{step, tokens, held_out, layers: [[{tokens: [{text, count, lift}], sibling, cosine}]]}; [layer][expert].

    Raises UserError without a checkpoint, and for a model too large to be read beside a training.
    """
    saved = checkpoint.saved_steps(run_dir / "checkpoints")
    if not saved:
        raise UserError("no checkpoint is kept yet; the experts' tokens are read from the newest one")
    if parameters > MOST_PARAMETERS:
        raise UserError(f"{parameters:,} parameters are too many to read beside a training; measure them with "
                        f"`pellucid measure experts {shlex.quote(str(run_dir))}`")  # fmt: skip
    step, folder = max(saved.items())
    model = Grok1(load_config(run_dir / "config.toml").model)
    model.load_state_dict(checkpoint.load(folder).tensors["model"])
    split = dataset.validation or dataset.train
    batch = split.rows(0, ROWS)
    _, routings = model.hidden_states(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
    read = batch.segment_ids_BT.reshape(-1) > 0
    tokens_N = batch.tokens_BT.reshape(-1)[read]
    layers = []
    for layer, routing in zip(model.layers, routings, strict=True):
        liked = _liked(tokens_N, routing.expert_index_Nk[read], model.config.num_experts, text_of)
        cosine_EE = _cosines(layer.moe).fill_diagonal_(-2)
        layers.append([{"tokens": words, "sibling": int(row.argmax()), "cosine": float(row.max())}
                       for words, row in zip(liked, cosine_EE, strict=True)])  # fmt: skip
    return {"step": step, "tokens": len(tokens_N), "held_out": dataset.validation is not None, "layers": layers}


def _liked(tokens_N: Tensor, chosen_Nk: Tensor, E: int, text_of: Any) -> list[list[dict[str, Any]]]:
    V, k = int(tokens_N.max()) + 1, chosen_Nk.shape[1]
    cells = (tokens_N[:, None] * E + chosen_Nk).reshape(-1)
    counts_VE = torch.bincount(cells, minlength=V * E).view(V, E).double()
    expected_VE = counts_VE.sum(1, keepdim=True) * counts_VE.sum(0) / (len(tokens_N) * k)
    lift_VE = torch.where(counts_VE > 0, counts_VE / expected_VE, 1.0)
    weight_VE = counts_VE * lift_VE.log()
    found = []
    for e in range(E):
        best = weight_VE[:, e].topk(min(SHOWN, V)).indices.tolist()
        found.append([{"text": text_of(v), "count": int(counts_VE[v, e]), "lift": float(lift_VE[v, e])}
                      for v in best if lift_VE[v, e] > 1])  # fmt: skip
    return found


def _cosines(moe: Any) -> Tensor:
    """Between the weights of experts, all matrices together; [E, E]."""
    rows = torch.cat([moe.gate_up_proj.flatten(1), moe.down_proj.flatten(1)], 1).double()
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return unit @ unit.T
