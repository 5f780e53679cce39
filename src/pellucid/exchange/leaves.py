"""One table of every weight of the model and its name in each format: the map all readers and writers share.

A leaf is one file of the official checkpoint. Leaves are moved matrix by matrix (one expert at a time), always as
[out, in], so that a conversion holds one matrix in memory, never a model.
Letters: V vocabulary, D hidden, H*d and K*d attention widths, E experts, F intermediate. Names: xai-org/grok-1
checkpoint.py; SGLang's grok.py; the hpcai-tech/grok-1 port, which vLLM reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pellucid.config import ModelConfig, UserError
from pellucid.exchange.pickle_walk import Spelling
from pellucid.exchange.quantize import Scales
from pellucid.model.grok import Grok1

ROW_PARALLEL = ("moe/linear_1/w", "multi_head_attention/linear/w")  # split over 8 devices in the release: 8 scale rows


@dataclass(frozen=True)
class Leaf:
    """One weight. `shape` is the official one ([in, out] for a matrix, with E in front for the experts)."""

    official: str
    shape: tuple[int, ...]
    parameter: str  # name in Grok1
    sglang: str  # "{e}" stands for the expert
    port: str
    half: int | None = None  # of gate_up_proj: 0 gate, 1 up

    @property
    def quantized(self) -> bool:
        return self.official.endswith("/w") and not self.official.endswith("router/w")

    @property
    def matrices(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def transposed(self) -> bool:
        return self.official.endswith("/w")

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """[out, in] of one matrix; the shape itself for the embedding [V, D] and the norms [D]."""
        return (self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def kept_in_fp32(self) -> bool:
        """Norms and router: small, and fp32 in every engine."""
        return not self.quantized and not self.official.endswith("embeddings")

    def groups(self) -> int:
        """Scale rows a new quantization gets: as in the release where that divides the input, else one."""
        return 8 if self.official.endswith(ROW_PARALLEL) and self.shape[-2] % 8 == 0 else 1

    def view(self, model: Grok1, matrix: int) -> Tensor:
        """Where this matrix lives in the model: [out, in], sharing its memory."""
        parameter = model.get_parameter(self.parameter).detach()
        if self.half is not None:
            parameter = parameter.unflatten(1, (2, -1))[:, self.half]
        return parameter[matrix] if len(self.shape) == 3 else parameter


class Source(Protocol):
    """Anything weights can be read from, one matrix at a time."""

    config: ModelConfig
    spelling: Spelling

    def dtype(self, leaf: Leaf) -> torch.dtype: ...
    def matrix(self, leaf: Leaf, matrix: int) -> Tensor: ...
    def scales(self, leaf: Leaf) -> Scales | None: ...
    def balance_bias(self, layer: int) -> Tensor | None: ...
    def score(self) -> Tensor | None: ...  # [K, D] of a model that labels documents


def leaf_count(num_layers: int) -> int:
    return 2 + 12 * num_layers


def leaves(config: ModelConfig) -> Iterator[Leaf]:
    """Every leaf in the order of the official files: layers sort as strings (0, 1, 10, 11, ..., 2, 20, ...)."""
    V, D = config.vocab_size, config.hidden_size
    table = "model.embed_tokens.weight"
    yield Leaf("language_model/in_out_embed/embeddings", (V, D), "embedding.weight", table, table)
    yield Leaf("language_model/rms_norm/scale", (D,), "final_norm.weight", "model.norm.weight", "model.norm.scale")
    for layer in sorted(range(config.num_hidden_layers), key=str):
        yield from _layer_leaves(config, layer)


def _layer_leaves(c: ModelConfig, layer: int) -> Iterator[Leaf]:
    D, E, F = c.hidden_size, c.num_experts, c.intermediate_size
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def leaf(official: str, shape: tuple, parameter: str, sglang: str, port: str, half: int | None = None) -> Leaf:
        return Leaf(f"transformer/decoder_layer_{layer}/{official}", shape, f"layers.{layer}.{parameter}",
                    f"model.layers.{layer}.{sglang}", f"model.layers.{layer}.{port}", half)

    def expert(name: str, shape: tuple, parameter: str, sglang: str, half: int | None = None) -> Leaf:
        return leaf(f"moe/{name}/w", shape, f"moe.{parameter}", f"block_sparse_moe.experts.{{e}}.{sglang}.weight",
                    f"moe_block.experts.{{e}}.{name}.weight", half)

    def attention(name: str, shape: tuple, ours: str) -> Leaf:
        return leaf(f"multi_head_attention/{name}/w", shape, f"attention.{ours}.weight", f"self_attn.{ours}.weight",
                    f"attn.{ours}.weight")

    yield expert("linear", (E, D, F), "gate_up_proj", "w1", half=0)
    yield expert("linear_1", (E, F, D), "down_proj", "w2")
    yield expert("linear_v", (E, D, F), "gate_up_proj", "w3", half=1)
    yield attention("key", (D, key), "k_proj")
    yield attention("linear", (query, D), "o_proj")
    yield attention("query", (D, query), "q_proj")
    yield attention("value", (D, key), "v_proj")
    for suffix, norm in zip(("", "_1", "_2", "_3"), ("pre_attn", "post_attn", "pre_moe", "post_moe"), strict=True):
        yield leaf(f"rms_norm{suffix}/scale", (D,), f"{norm}_norm.weight", f"{norm}_norm.weight", f"{norm}_norm.scale")
    yield leaf("router/w", (D, E), "moe.router.weight", "block_sparse_moe.gate.weight", "moe_block.gate.weight")


class ModelSource:
    """A model in memory. What it carries of an official checkpoint (`model.official`) comes along."""

    def __init__(self, model: Grok1):
        self.model = model
        self.config = model.config
        self._official: dict[str, Scales] = getattr(model, "official_scales", {})
        self.spelling: Spelling = getattr(model, "official_spelling", Spelling())

    def dtype(self, leaf: Leaf) -> torch.dtype:
        return self.model.get_parameter(leaf.parameter).dtype

    def matrix(self, leaf: Leaf, matrix: int) -> Tensor:
        return leaf.view(self.model, matrix)

    def scales(self, leaf: Leaf) -> Scales | None:
        return self._official.get(leaf.official)

    def balance_bias(self, layer: int) -> Tensor | None:
        bias = self.model.layers[layer].moe.balance_bias
        return bias if bool(bias.any()) else None

    def score(self) -> Tensor | None:
        return None if self.model.score is None else self.model.score.weight.detach()


@torch.no_grad()
def fill(model: Grok1, source: Source, progress=None) -> Grok1:
    """Copy every weight of `source` into `model`, one matrix at a time; official scales are carried along.

    A head is copied where both have the same labels; else the model's is left as it is.
    """
    carried: dict[str, Scales] = {}
    total = leaf_count(model.config.num_hidden_layers)
    for done, leaf in enumerate(leaves(model.config), start=1):
        for matrix in range(leaf.matrices):
            leaf.view(model, matrix).copy_(source.matrix(leaf, matrix))
        if (scales := source.scales(leaf)) is not None:
            carried[leaf.official] = scales
        if progress is not None:
            progress("loading", done, total)
    for index, layer in enumerate(model.layers):
        bias = source.balance_bias(index)
        layer.moe.balance_bias.zero_() if bias is None else layer.moe.balance_bias.copy_(bias)
    if model.score is not None and source.config.head is not None and source.config.head.labels == model.config.head.labels:
        model.score.weight.copy_(source.score())
    model.official_scales, model.official_spelling = carried, source.spelling
    return model


def refuse_what_has_no_place(source: Source, format_name: str) -> None:
    """Raises UserError for a head or a balance bias."""
    if source.config.head is not None:
        raise UserError(f"{format_name} has no place for the head of a model that labels documents; export to 'hf'")
    for layer in range(source.config.num_hidden_layers):
        if source.balance_bias(layer) is not None:
            raise UserError(
                f"layer {layer} has a nonzero balance bias, for which {format_name} has no place: without it the model "
                "would choose other experts; export to 'hf', or train anew with training.balance_bias_rate = 0, not from these weights"
            )
