"""Our model against outputs of the official JAX implementation (tests/fixtures, see docs/promises)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pellucid.config import ModelConfig
from pellucid.exchange.load import load

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ["f1_base", "f2_gqa3_pads"]


def config_of(name: str) -> ModelConfig:
    facts = json.loads((FIXTURES / name / "config.json").read_text())
    spec = facts["spec"]
    return ModelConfig(
        vocab_size=spec["vocab"],
        hidden_size=spec["emb"],
        intermediate_size=facts["ffn"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["q"],
        num_key_value_heads=spec["kv"],
        head_dim=spec["key"],
        attn_output_multiplier=spec["attn_mult"],
        embedding_multiplier_scale=spec["emb_mult"],
        output_multiplier_scale=spec["out_mult"],
    )


def open_fixture(name: str, dtype=torch.float32):
    model, tokenizer = load(FIXTURES / name / "ckpt-0", config=config_of(name), dtype=dtype)
    assert tokenizer is None
    arrays = np.load(FIXTURES / name / "io.npz")
    return model, {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files if arrays[key].dtype != "V2"}


def relative_to_max(ours: torch.Tensor, official: torch.Tensor) -> float:
    return ((ours - official).abs().max() / official.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_equal_the_official_ones(name):
    model, io = open_fixture(name)
    with torch.no_grad():
        logits = model(io["tokens"].long())
    assert relative_to_max(logits, io["logits_fp32"]) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_listed_activation_equals_the_official_one(name):
    model, io = open_fixture(name)
    official = np.load(FIXTURES / name / "acts.npz")
    seen: dict[str, torch.Tensor] = {}

    def keep(key, pick=lambda out: out):
        return lambda module, args, out: seen.__setitem__(key, pick(out).detach())

    model.final_norm.register_forward_hook(keep("final_normed"))
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.__setitem__("embed", args[0].detach()))
    for i, layer in enumerate(model.layers):
        first = lambda out: out[0]
        for part, module, pick in [
            ("attn_in", layer.pre_attn_norm, None), ("attn_out", layer.attention, None),
            ("attn_out_normed", layer.post_attn_norm, None), ("moe_in", layer.pre_moe_norm, None),
            ("moe_out", layer.moe, first), ("moe_out_normed", layer.post_moe_norm, None), ("out", layer, first),
        ]:  # fmt: skip
            module.register_forward_hook(keep(f"layer{i}.{part}", pick) if pick else keep(f"layer{i}.{part}"))
    with torch.no_grad():
        _, routings = model.hidden_states(io["tokens"].long())
    for i, routing in enumerate(routings):
        seen |= {
            f"layer{i}.router_logits": routing.logits_NE,
            f"layer{i}.router_probs": routing.probs_NE,
            f"layer{i}.top2_idx": routing.expert_index_Nk,
            f"layer{i}.top2_gate": routing.gate_Nk,
        }
    listed = {key for key in official.files if key.startswith("fp32.")}
    assert {f"fp32.{key}" for key in seen} == listed, "an official activation is not compared"
    for key, ours in seen.items():
        theirs = torch.from_numpy(np.asarray(official[f"fp32.{key}"]))
        if key.endswith("top2_idx"):
            assert torch.equal(ours.view(theirs.shape), theirs.long()), key
        else:
            assert relative_to_max(ours.view(theirs.shape), theirs) < 2e-5, key


def official_layout(model) -> dict[str, torch.Tensor]:
    """Our gradients, renamed and transposed to the official [in, out] tree."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    tree = {
        "language_model/in_out_embed/embeddings": grads["embedding.weight"],
        "language_model/rms_norm/scale": grads["final_norm.weight"],
    }
    for i in range(model.config.num_hidden_layers):
        ours, official = f"layers.{i}.", f"transformer/decoder_layer_{i}/"
        for suffix, norm in zip(("", "_1", "_2", "_3"), ("pre_attn", "post_attn", "pre_moe", "post_moe"), strict=True):
            tree[f"{official}rms_norm{suffix}/scale"] = grads[f"{ours}{norm}_norm.weight"]
        for theirs, mine in (("query", "q"), ("key", "k"), ("value", "v"), ("linear", "o")):
            tree[f"{official}multi_head_attention/{theirs}/w"] = grads[f"{ours}attention.{mine}_proj.weight"].T
        gate, up = grads[f"{ours}moe.gate_up_proj"].chunk(2, dim=1)
        tree[f"{official}router/w"] = grads[f"{ours}moe.router.weight"].T
        tree[f"{official}moe/linear/w"] = gate.transpose(1, 2)
        tree[f"{official}moe/linear_v/w"] = up.transpose(1, 2)
        tree[f"{official}moe/linear_1/w"] = grads[f"{ours}moe.down_proj"].transpose(1, 2)
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_the_official_one(name):
    model, io = open_fixture(name)
    mask = io["loss_mask"].float()
    losses = F.cross_entropy(model(io["tokens"].long()).flatten(0, 1), io["targets"].long().flatten(), reduction="none")
    loss = (losses.view_as(mask) * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(float(io["loss_fp32"]), rel=1e-5)
    loss.backward()
    official = np.load(FIXTURES / name / "grads.npz")
    ours = official_layout(model)
    assert {f"params/{path}" for path in ours} == set(official.files)
    for path, gradient in ours.items():
        theirs = torch.from_numpy(np.asarray(official[f"params/{path}"]))
        assert ((gradient - theirs).norm() / theirs.norm()).item() < 1e-4, path


@pytest.mark.parametrize("name", NAMES)
def test_bf16_error_is_at_most_twice_the_official_one(name):
    model, io = open_fixture(name, dtype=torch.bfloat16)
    assert model.parity, "a model loaded in bf16 follows the official casts"
    with torch.no_grad():
        ours = model(io["tokens"].long())
    official = (io["logits_bf16"].float() - io["logits_fp32"]).abs().max()
    assert (ours - io["logits_fp32"]).abs().max() <= 2 * official


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_equal_the_official_decode(name):
    model, io = open_fixture(name)
    prompt, continuation = io["decode_prompt"].long()[None], io["decode_cont"].long()[None]
    cache = model.new_cache()
    with torch.no_grad():
        steps = [model(prompt, cache=cache)[:, -1:]]
        steps += [model(token[None, None], cache=cache) for token in continuation[0]]
    assert relative_to_max(torch.cat(steps, dim=1)[0], io["decode_logits_fp32"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bf16_decode_is_at_most_twice_as_far_from_fp32_as_the_official_one(name):
    model, io = open_fixture(name, dtype=torch.bfloat16)
    prompt, continuation = io["decode_prompt"].long()[None], io["decode_cont"].long()[None]
    cache = model.new_cache()
    with torch.no_grad():
        steps = [model(prompt, cache=cache)[:, -1:]]
        steps += [model(token[None, None], cache=cache) for token in continuation[0]]
    official = (io["decode_logits_bf16"].float() - io["decode_logits_fp32"]).abs().max()
    assert (torch.cat(steps, dim=1)[0] - io["decode_logits_fp32"]).abs().max() <= 2 * official
