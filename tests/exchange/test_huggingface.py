"""Hugging Face directories: names by hand from the engines' sources, both families, whole or absent."""

import json

import pytest
import torch
from official_writer import small_config, write_official
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pellucid.config import UserError
from pellucid.exchange.huggingface import HuggingFaceSource, engine_config, save_huggingface, write_huggingface
from pellucid.exchange.leaves import ModelSource
from pellucid.exchange.load import load
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize


@pytest.fixture
def model():
    return initialize(Grok1(small_config(2)), 3)


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def sglang_tensors(model) -> dict[str, torch.Tensor]:
    """What SGLang's load_weights asks for, spelt out."""
    w, c = model.state_dict(), model.config
    F = c.intermediate_size
    tensors = {"model.embed_tokens.weight": w["embedding.weight"], "model.norm.weight": w["final_norm.weight"],
               "lm_head.weight": w["embedding.weight"].clone()}  # fmt: skip
    for i in range(c.num_hidden_layers):
        for x in "qkvo":
            tensors[f"model.layers.{i}.self_attn.{x}_proj.weight"] = w[f"layers.{i}.attention.{x}_proj.weight"]
        for x in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
            tensors[f"model.layers.{i}.{x}_norm.weight"] = w[f"layers.{i}.{x}_norm.weight"]
        tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] = w[f"layers.{i}.moe.router.weight"]
        for e in range(c.num_experts):
            at = f"model.layers.{i}.block_sparse_moe.experts.{e}."
            tensors[at + "w1.weight"] = w[f"layers.{i}.moe.gate_up_proj"][e, :F].clone()
            tensors[at + "w3.weight"] = w[f"layers.{i}.moe.gate_up_proj"][e, F:].clone()
            tensors[at + "w2.weight"] = w[f"layers.{i}.moe.down_proj"][e].clone()
    return tensors


def port_tensors(model) -> dict[str, torch.Tensor]:
    """The same under the names of the hpcai-tech port and vLLM (tied: no lm_head)."""
    renames = [("self_attn.", "attn."), ("block_sparse_moe.", "moe_block."),
               ("w1.weight", "linear.weight"), ("w2.weight", "linear_1.weight"), ("w3.weight", "linear_v.weight"),
               ("norm.weight", "norm.scale")]  # fmt: skip
    tensors = {}
    for name, tensor in sglang_tensors(model).items():
        for old, new in renames:
            name = name.replace(old, new)
        tensors[name] = tensor
    del tensors["lm_head.weight"]
    return tensors


def test_written_names_and_values_are_those_sglang_reads(model, tmp_path):
    save_huggingface(model, None, tmp_path / "hf")
    found, expected = load_file(tmp_path / "hf" / "model.safetensors"), sglang_tensors(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_config_has_the_keys_of_both_families(model, tmp_path):
    save_huggingface(model, None, tmp_path / "hf", dtype=torch.bfloat16)
    values, c = json.loads((tmp_path / "hf" / "config.json").read_text()), model.config
    assert values["architectures"] == ["Grok1ForCausalLM"] and values["torch_dtype"] == "bfloat16"
    assert values["num_local_experts"] == values["num_experts"] == c.num_experts and values["head_dim"] == c.head_dim
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rope_theta",
                "num_key_value_heads", "num_experts_per_tok", "embedding_multiplier_scale", "output_multiplier_scale",
                "attn_output_multiplier", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "tie_word_embeddings"):
        assert values[key] == getattr(c, key)  # fmt: skip


def test_saved_and_loaded_is_the_same_model(model, tmp_path):
    save_huggingface(model, None, tmp_path / "hf")
    again, tokenizer = load(tmp_path / "hf")
    assert same(model, again) and again.config == model.config and tokenizer is None


def test_bfloat16_rounds_matrices_and_leaves_norms_and_router(model, tmp_path):
    save_huggingface(model, None, tmp_path / "hf", dtype=torch.bfloat16)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in sglang_tensors(model).items():
        small = "norm" in name or name.endswith("gate.weight")
        assert torch.equal(found[name], tensor if small else tensor.bfloat16()), name


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("family", [sglang_tensors, port_tensors])
def test_both_families_are_read_with_and_without_prefix(model, tmp_path, family, prefix):
    tensors = {name if prefix else name.removeprefix("model."): tensor for name, tensor in family(model).items()}
    save_file(tensors, tmp_path / "anything.safetensors")
    values = engine_config(model.config, torch.float32)
    drop = {"num_local_experts", "attn_logit_softcapping"} if family is port_tensors else {"num_experts", "max_attn_value"}
    (tmp_path / "config.json").write_text(json.dumps({key: values[key] for key in values if key not in drop}))
    assert same(load(tmp_path)[0], model)


def test_shards_and_index_hold_every_tensor_once(model, tmp_path):
    write_huggingface(ModelSource(model), tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and [s.name for s in shards] == sorted(set(index["weight_map"].values()))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    found = {name: (shard.name, tensor) for shard in shards for name, tensor in load_file(shard).items()}
    assert {name: place for name, (place, _) in found.items()} == index["weight_map"]
    assert sum(tensor.nbytes for _, tensor in found.values()) == index["metadata"]["total_size"]
    assert same(load(tmp_path)[0], model)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        load(tmp_path)


def test_a_balance_bias_survives_and_engines_without_it_are_turned_away(model, tmp_path):
    model.layers[1].moe.balance_bias[0] = 0.25
    save_huggingface(model, None, tmp_path / "hf")
    assert same(load(tmp_path / "hf")[0], model)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] != ["Grok1ForCausalLM"]


def _altered(model, folder, change, config=None):
    tensors = sglang_tensors(model)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = {**engine_config(model.config, torch.float32), **(config or {})}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


NORM = "model.layers.1.pre_moe_norm.weight"
CHANGES = [
    (lambda t: t.pop(NORM), rf"'{NORM}' is missing"),
    (lambda t: t.update({NORM: torch.zeros(17)}), r"shape \(17,\).*\(16,\)"),
    (lambda t: t.update({NORM: torch.zeros(16, dtype=torch.int8)}), "stored as I8"),
    (lambda t: t.update({"model.extra.bias": torch.zeros(3)}), r"'model\.extra\.bias' does not belong"),
    (lambda t: t.update({"norm.weight": torch.zeros(16)}), r"'norm\.weight' does not belong"),
    (lambda t: t["lm_head.weight"].add_(1), "ties the two"),
]


@pytest.mark.parametrize("change, sentence", CHANGES)
def test_wrong_tensors_are_named(model, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        load(_altered(model, tmp_path, change))


@pytest.mark.parametrize("config, sentence", [
    ({"residual_moe": True}, "residual_moe"), ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
    ({"final_logit_softcapping": 50}, "final_logit_softcapping"), ({"num_local_experts": 5}, "contradicts"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"), ({"hidden_size": 32}, "shape"),
    ({"vocab_size": None}, "vocab_size"), ({"hidden_act": "silu"}, "hidden_act = 'silu'"), ({"sliding_window": 4096}, "sliding_window"),
    ({"norm_topk_prob": True}, "norm_topk_prob"), ({"num_shared_experts": 1}, "num_shared_experts"),
    ({"attention_bias": True}, "attention_bias"), ({"rope_parameters": {"rope_type": "yarn", "factor": 8}}, "rope_parameters"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"), ({"rope_parameters": 3}, "rope_param"),
    ({"rope_parameters": {"rope_theta": 500000}}, r"rope_theta = 10000\.0 contradicts rope_parameters: rope_theta = 500000"),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": float("inf")}}, "rope_theta = inf is not a number"),
])  # fmt: skip
def test_other_architectures_are_refused_not_miscomputed(model, tmp_path, config, sentence):
    with pytest.raises(UserError, match=sentence):
        load(_altered(model, tmp_path, lambda t: None, config))


def test_settings_that_say_what_grok_does_are_read(model, tmp_path):
    """As transformers writes them since version 5 (rope_parameters), and as others write them out."""
    said = {"hidden_act": "gelu_new", "norm_topk_prob": False, "sliding_window": None, "attention_bias": False, "num_shared_experts": 0,
            "rope_theta": None, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}  # fmt: skip
    again, _ = load(_altered(model, tmp_path, lambda t: None, said))
    assert again.config == model.config.model_copy(update={"rope_theta": 500000.0})


def test_an_existing_folder_is_kept_unless_replaced(model, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        save_huggingface(model, None, tmp_path / "hf")
    assert [p.name for p in tmp_path.rglob("*")] == ["hf", "mine"]
    save_huggingface(model, None, tmp_path / "hf", replace=True)
    assert not (tmp_path / "hf" / "mine").exists() and same(load(tmp_path / "hf")[0], model)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_failed_save_leaves_nothing(model, tmp_path):
    class Broken:
        def save(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        save_huggingface(model, Broken(), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_scales_of_another_model_are_refused(tmp_path):
    write_official(tmp_path / "ckpt-0", small_config(1))
    model, _ = load(tmp_path / "ckpt-0", config=small_config(1))
    save_huggingface(model, None, tmp_path / "hf")
    place = tmp_path / "hf" / "official" / "scales.safetensors"
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in load_file(place).items()}, place)
    with pytest.raises(UserError, match=r"scales\.safetensors"):
        HuggingFaceSource(tmp_path / "hf")
