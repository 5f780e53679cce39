"""Official checkpoints: against numpy's own dequantisation, the official logits, and the very bytes of the files."""

import re
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_writer import dequantized, dump, quantized, small_config, write_official

from pellucid.config import UserError
from pellucid.exchange.leaves import ModelSource, leaves
from pellucid.exchange.load import load
from pellucid.exchange.quantize import dequantize, quantize
from pellucid.exchange.xai import XaiSource, write_xai

OURS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "linear": "o_proj"}


def official_weight(model, path: str) -> torch.Tensor:
    """Our parameter for an official path, as [in, out]: names written out by hand from the reference."""
    weights = model.state_dict()
    if path == "language_model/in_out_embed/embeddings":
        return weights["embedding.weight"]
    if path == "language_model/rms_norm/scale":
        return weights["final_norm.weight"]
    layer, rest = re.fullmatch(r"transformer/decoder_layer_(\d+)/(.*)", path).groups()
    at = f"layers.{layer}."
    if rest.startswith("rms_norm"):
        index = int(rest[9]) if rest[8] == "_" else 0
        return weights[at + ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")[index] + ".weight"]
    if rest == "router/w":
        return weights[at + "moe.router.weight"].T
    if rest.startswith("multi_head"):
        return weights[at + f"attention.{OURS[rest.split('/')[1]]}.weight"].T
    if rest == "moe/linear_1/w":
        return weights[at + "moe.down_proj"].mT
    half = model.config.intermediate_size
    rows = slice(0, half) if rest == "moe/linear/w" else slice(half, None)
    return weights[at + "moe.gate_up_proj"][:, rows].mT


@pytest.mark.parametrize("layers, groups", [(2, 1), (12, 1), (3, 8), (21, 4)])
def test_every_weight_lands_where_it_belongs(tmp_path, layers, groups):
    """Twelve layers and more: files come as 0, 1, 10, 11, ..., 2, 20."""
    config = small_config(layers)
    tree = write_official(tmp_path / "ckpt-0", config, groups=groups)
    model, tokenizer = load(tmp_path / "ckpt-0", config=config)
    assert tokenizer is None and len(tree) == 2 + 12 * layers
    for path, value in tree.items():
        assert np.array_equal(official_weight(model, path).numpy(), dequantized(value)), path


@pytest.mark.parametrize("layers, groups", [(1, 1), (12, 8)])
def test_untouched_weights_are_written_back_byte_for_byte(tmp_path, layers, groups):
    config = small_config(layers)
    write_official(tmp_path / "ckpt-0", config, groups=groups)
    model, _ = load(tmp_path / "ckpt-0", config=config)
    (tmp_path / "again").mkdir()
    write_xai(ModelSource(model), tmp_path / "again")
    assert _bytes_of(tmp_path / "again") == _bytes_of(tmp_path / "ckpt-0")


def test_zero_and_extreme_scales_are_carried_too(tmp_path):
    """Where int8 cannot be recovered from weight and scale, it is carried itself."""
    config = small_config(1)
    write_official(tmp_path / "ckpt-0", config)
    for index, scale in ((2, 0.0), (5, 1e-39), (7, 2e36)):
        leaf = list(leaves(config))[index]
        value = quantized(np.random.default_rng(index), leaf.shape)
        value.scales[..., 1] = scale
        (tmp_path / "ckpt-0" / f"tensor{index:05d}_000").write_bytes(dump(value))
    model, _ = load(tmp_path / "ckpt-0", config=config)
    (tmp_path / "again").mkdir()
    write_xai(ModelSource(model), tmp_path / "again")
    assert _bytes_of(tmp_path / "again") == _bytes_of(tmp_path / "ckpt-0")


def test_a_changed_weight_is_quantized_anew_and_its_neighbours_stay(tmp_path):
    config = small_config(1)
    write_official(tmp_path / "ckpt-0", config)
    model, _ = load(tmp_path / "ckpt-0", config=config)
    with torch.no_grad():
        model.layers[0].attention.q_proj.weight[3, 5] += 1.0
    (tmp_path / "new").mkdir()
    write_xai(ModelSource(model), tmp_path / "new")
    old, new = _bytes_of(tmp_path / "ckpt-0"), _bytes_of(tmp_path / "new")
    assert [name for name in old if old[name] != new[name]] == ["tensor00007_000"]
    before, after = (XaiSource(tmp_path / name, config)._files for name in ("ckpt-0", "new"))
    path = "transformer/decoder_layer_0/multi_head_attention/query/w"
    differ = np.nonzero((before[path].scales.map() != after[path].scales.map())[0])[0]
    assert differ.tolist() == [3]
    again, _ = load(tmp_path / "new", config=config)
    error = (again.layers[0].attention.q_proj.weight - model.layers[0].attention.q_proj.weight).abs()
    assert error.max() < 1.0 / 127 and torch.count_nonzero(error.amax(1)) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 8]), st.floats(1e-6, 1e6))
def test_quantization_moves_no_weight_by_a_whole_scale(seed, groups, size):
    """Half a scale from the int8 (or its clipping at 127), less than half from rounding the product to bf16."""
    weight = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)) * size
    int8, scales = quantize(weight, groups)
    step = scales.float().repeat_interleave(16 // groups, 0)
    assert ((dequantize(int8, scales).float() - weight).abs() < step).all()


def test_every_int8_is_recovered_under_every_scale_of_an_octave():
    """All 256 int8 times all 128 bfloat16 mantissas: the whole of the claim but for the exponent."""
    scales = (1 + torch.arange(128) / 128).to(torch.bfloat16)[None]
    int8 = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, 128).contiguous()
    again, kept = quantize(dequantize(int8, scales), 1, scales)
    assert torch.equal(again, int8) and torch.equal(kept, scales)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(-36, 35))
def test_int8_is_recovered_from_weight_and_scale(seed, exponent):
    random = np.random.default_rng(seed)
    int8 = torch.from_numpy(random.integers(-128, 128, (64, 6), dtype=np.int8))
    scales = torch.from_numpy((random.uniform(1, 2, (4, 6)) * 10.0**exponent).astype(np.float32)).to(torch.bfloat16)
    again, kept = quantize(dequantize(int8, scales), 4, scales)
    assert torch.equal(again, int8) and torch.equal(kept, scales)


def test_all_256_values_dequantise_as_ml_dtypes_does():
    int8 = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, 50).contiguous()
    bits = np.random.default_rng(0).integers(0x3000, 0x4200, 50).astype(np.uint16)
    scales = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)[None]
    expected = int8.numpy().astype(ml_dtypes.bfloat16) * bits.view(ml_dtypes.bfloat16)[None]
    assert np.array_equal(dequantize(int8, scales).view(torch.int16).numpy(), expected.view(np.int16))


def test_new_quantizations_have_the_release_s_groups(tmp_path):
    model, _ = load("tiny")
    write_xai(ModelSource(model), tmp_path)
    source = XaiSource(tmp_path, model.config)
    for leaf in leaves(model.config):
        if leaf.quantized:
            rows = source.scales(leaf).scales.shape[-2]
            assert rows == (8 if leaf.official.endswith(("linear_1/w", "attention/linear/w")) else 1)


def test_without_a_config_it_is_a_grok_1(tmp_path):
    config = small_config(1, head_dim=128, num_attention_heads=2, num_key_value_heads=1)
    write_official(tmp_path / "ckpt-0", config)
    found = load(tmp_path)[0].config
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim, found.num_experts) == (2, 1, 128, 4)
    assert found.embedding_multiplier_scale == 78.38367176906169 and found.output_multiplier_scale == 0.5773502691896257
    assert found.attn_output_multiplier == 0.08838834764831845 and found.vocab_size == 40 and found.intermediate_size == 24


def test_without_a_config_other_heads_are_an_error(tmp_path):
    write_official(tmp_path / "ckpt-0", small_config(1))
    with pytest.raises(UserError, match=r"tensor00005_000.*heads of 128"):
        load(tmp_path)


@pytest.mark.parametrize("change, file", [({"vocab_size": 41}, 0), ({"intermediate_size": 32}, 2), ({"head_dim": 8}, 5),
                                          ({"num_attention_heads": 2}, 6), ({"num_experts": 8}, 2),
                                          ({"hidden_size": 12}, 0)])  # fmt: skip
def test_a_mismatch_names_the_file_and_both_shapes(tmp_path, change, file):
    write_official(tmp_path / "ckpt-0", small_config(1))
    with pytest.raises(UserError, match=rf"tensor{file:05d}_000.*\(.*\).*\(.*\)"):
        load(tmp_path / "ckpt-0", config=small_config(1, **change))


def test_missing_surplus_and_misnamed_files_are_named(tmp_path):
    folder = tmp_path / "ckpt-0"
    write_official(folder, small_config(2))
    with pytest.raises(UserError, match=r"26 tensor files.*3 layers need 38"):
        load(folder, config=small_config(3))
    (folder / "tensor00026_000").write_bytes(b"")
    with pytest.raises(UserError, match="27 tensor files"):
        load(folder)
    (folder / "tensor00026_000").rename(folder / "tensor00026_001")
    with pytest.raises(UserError, match="tensor00026_001"):
        load(folder)
    (folder / "tensor00026_001").unlink()
    (folder / "tensor00013_000").unlink()
    with pytest.raises(UserError, match="tensor00013_000"):
        load(folder)


def test_swapped_files_are_refused(tmp_path):
    folder = tmp_path / "ckpt-0"
    write_official(folder, small_config(1))
    (folder / "tensor00005_000").write_bytes((folder / "tensor00013_000").read_bytes())
    with pytest.raises(UserError, match="tensor00005_000"):
        load(folder, config=small_config(1))


def test_scales_that_do_not_fit_are_refused(tmp_path):
    folder, random = tmp_path / "ckpt-0", np.random.default_rng(0)
    write_official(folder, small_config(1))
    value = quantized(random, (4, 16, 24))
    value.scales = value.scales[:, :, :23].copy()
    (folder / "tensor00002_000").write_bytes(dump(value))
    with pytest.raises(UserError, match=r"tensor00002_000.*scales"):
        load(folder, config=small_config(1))
    value.scales = np.ones((4, 3, 24), ml_dtypes.bfloat16)  # 16 rows are not 3 blocks
    (folder / "tensor00002_000").write_bytes(dump(value))
    with pytest.raises(UserError, match=r"tensor00002_000.*scales"):
        load(folder, config=small_config(1))


def test_a_balance_bias_has_no_place_in_the_official_layout(tmp_path):
    model, _ = load("tiny")
    model.layers[1].moe.balance_bias[2] = 0.01
    with pytest.raises(UserError, match=r"layer 1 .*balance bias"):
        write_xai(ModelSource(model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_cannot_be_quantized(tmp_path):
    model, _ = load("tiny")
    with torch.no_grad():
        model.layers[0].attention.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="multi_head_attention/key/w holds NaN"):
        write_xai(ModelSource(model), tmp_path)


def test_loading_holds_the_model_and_at_most_one_tensor(tmp_path):
    """Accounted: every allocation of torch (its profiler) and of numpy and Python (tracemalloc) while loading."""
    config = small_config(4, vocab_size=2000, hidden_size=64, intermediate_size=256, num_experts=8)
    write_official(tmp_path / "ckpt-0", config)
    largest = max(np.prod(leaf.shape) * 4 for leaf in leaves(config))
    tracemalloc.start()
    load(tmp_path / "ckpt-0", config=config)
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model, _ = load(tmp_path / "ckpt-0", config=config)
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    model_bytes = sum(t.nbytes for t in model.state_dict().values())
    scales = sum(s.scales.nbytes for s in model.official_scales.values())
    assert model_bytes < peak < model_bytes + scales + largest
    assert numpy_peak < largest + 2_000_000


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
