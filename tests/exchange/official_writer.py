"""Official checkpoints made by Python's own pickle, numpy and ml_dtypes: the reference our reader is held to."""

import pickle
import sys

import ml_dtypes
import numpy as np

from pellucid.config import ModelConfig


class QuantizedWeight8bit:
    """Stands for the official class of this name."""

    def __init__(self, weight, scales):
        self.weight, self.scales = weight, scales


def dump(value, owner="__main__") -> bytes:
    """What `pickle.dump(value, file)` of the official program writes."""
    QuantizedWeight8bit.__module__ = owner
    module = sys.modules.setdefault(owner, type(sys)(owner))
    had = hasattr(module, "QuantizedWeight8bit")
    module.QuantizedWeight8bit = QuantizedWeight8bit
    try:
        return pickle.dumps(value, protocol=4)
    finally:
        if not had:
            del module.QuantizedWeight8bit


def quantized(generator, shape, groups=1) -> QuantizedWeight8bit:
    scales = generator.uniform(0.001, 0.02, (*shape[:-2], groups, shape[-1])).astype(ml_dtypes.bfloat16)
    return QuantizedWeight8bit(generator.integers(-128, 128, shape, dtype=np.int8), scales)


def small_config(layers=2, **changes) -> ModelConfig:
    fields = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, num_experts=4, embedding_multiplier_scale=3.0,
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def write_official(folder, config: ModelConfig, seed=0, groups=1):
    """A random checkpoint; returns {official path: value}. Names are listed and sorted here, independently of ours."""
    c, random = config, np.random.default_rng(seed)
    D, F, E, d = c.hidden_size, c.intermediate_size, c.num_experts, c.head_dim
    floats = lambda *shape: random.normal(0, 0.5, shape).astype(np.float32)
    tree = {
        "language_model/in_out_embed/embeddings": floats(c.vocab_size, D),
        "language_model/rms_norm/scale": floats(D),
    }
    for i in range(c.num_hidden_layers):
        layer = f"transformer/decoder_layer_{i}/"
        tree[layer + "moe/linear/w"] = quantized(random, (E, D, F))
        tree[layer + "moe/linear_v/w"] = quantized(random, (E, D, F))
        tree[layer + "moe/linear_1/w"] = quantized(random, (E, F, D), groups)
        H, K = c.num_attention_heads, c.num_key_value_heads
        for name, heads in (("query", H), ("key", K), ("value", K)):
            tree[layer + f"multi_head_attention/{name}/w"] = quantized(random, (D, heads * d))
        tree[layer + "multi_head_attention/linear/w"] = quantized(random, (c.num_attention_heads * d, D), groups)
        for suffix in ("", "_1", "_2", "_3"):
            tree[layer + f"rms_norm{suffix}/scale"] = floats(D)
        tree[layer + "router/w"] = floats(D, E)
    folder.mkdir(parents=True)
    for index, key in enumerate(sorted(tree, key=lambda path: path.split("/"))):
        (folder / f"tensor{index:05d}_000").write_bytes(dump(tree[key]))
    return tree


def dequantized(value) -> np.ndarray:
    """The release's rule in numpy: int8 * scale per block of in/G rows, rounded to bfloat16; float32 as it is."""
    if isinstance(value, np.ndarray):
        return value
    *lead, rows, columns = value.weight.shape
    groups = value.scales.shape[-2]
    blocks = value.weight.reshape(*lead, groups, rows // groups, columns).astype(ml_dtypes.bfloat16)
    return (blocks * value.scales[..., :, None, :]).reshape(value.weight.shape).astype(np.float32)
