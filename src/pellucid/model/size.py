"""How large a model is and what a token costs, from its configuration alone.

Letters: D hidden, H query heads, K key/value heads, d head_dim, E experts, k per token, F intermediate, L layers,
V vocabulary, T sequence length.
"""

from __future__ import annotations

from pellucid.config import Config, ModelConfig


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by component, their `total`, and those `active` for one token (k of E experts)."""
    c = config
    D, L = c.hidden_size, c.num_hidden_layers
    expert = 3 * D * c.intermediate_size
    counts = {
        "embedding": c.vocab_size * D,
        "attention": L * 2 * D * c.head_dim * (c.num_attention_heads + c.num_key_value_heads),
        "experts": L * c.num_experts * expert,
        "routers": L * D * c.num_experts,
        "norms": (4 * L + 1) * D,
        "head": D * len(c.head.labels) if c.head is not None else 0,
    }
    total = sum(counts.values())
    idle = L * (c.num_experts - c.num_experts_per_tok) * expert
    return {**counts, "total": total, "active": total - idle}


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of one trained token, forward and backward: 6 per matrix weight, causal attention counted at half.

    The convention of NVIDIA's published Grok-1 numbers: 521.8 GFLOP at T = 8192. The embedding lookup is free, the
    tied head is not; the backward pass costs twice the forward.
    """
    c = config
    counts = parameter_counts(c)
    matrices = counts["active"] - counts["norms"] - counts["head"]  # a head works once a document: next to nothing
    if c.head is not None:
        matrices -= counts["embedding"]
    core = c.num_hidden_layers * 2 * c.num_attention_heads * c.head_dim * sequence_length  # q.k and weights.v, halved
    return 6.0 * matrices + 3.0 * core


def training_bytes(config: ModelConfig) -> int:
    """Memory of weights and optimizer, without activations: fp32 master, gradient and two Adam moments in fp32."""
    return 16 * parameter_counts(config)["total"]


def sizes(configs: dict[str, Config]) -> dict[str, dict[str, float]]:
    """Per name: its shape, parameters, FLOPs of one trained token at its own sequence length, bytes to train.

    Each configuration's model.vocab_size is known.
    """
    table = {}
    for name, settings in configs.items():
        config = settings.model
        counts = parameter_counts(config)
        table[name] = {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "vocabulary": config.vocab_size,
            "sequence": settings.data.sequence_length,
            "parameters": counts["total"],
            "active": counts["active"],
            "FLOP/token": flops_per_token(config, settings.data.sequence_length),
            "bytes to train": training_bytes(config),
        }
    return table
