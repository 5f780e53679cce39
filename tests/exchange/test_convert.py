"""load and convert through every door, on the official fixtures and on whole runs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from official_writer import small_config, write_official
from typer.testing import CliRunner

from pellucid.cli import app
from pellucid.config import Config, ModelConfig, TokenizerConfig, UserError, preset
from pellucid.data.tokenizer import load_tokenizer
from pellucid.data.tokenizer_training import train_tokenizer
from pellucid.exchange.convert import convert, convert_tokenizer, verify
from pellucid.exchange.folder import file_hashes
from pellucid.exchange.huggingface import save_huggingface
from pellucid.exchange.load import load, open_source
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.training import checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture_config(name: str) -> ModelConfig:
    facts = json.loads((FIXTURES / name / "config.json").read_text())
    spec = facts["spec"]
    return ModelConfig(
        vocab_size=spec["vocab"], hidden_size=spec["emb"], intermediate_size=facts["ffn"], num_hidden_layers=spec["layers"],
        num_attention_heads=spec["q"], num_key_value_heads=spec["kv"], head_dim=spec["key"],
        attn_output_multiplier=spec["attn_mult"], embedding_multiplier_scale=spec["emb_mult"],
        output_multiplier_scale=spec["out_mult"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["f1_base", "f2_gqa3_pads"])
def test_official_to_hugging_face_and_back_is_byte_identical_and_keeps_the_logits(tmp_path, name):
    original = FIXTURES / name / "ckpt-0"
    seen = []
    manifest = convert(original, tmp_path / "hf", "hf", config=fixture_config(name), progress=lambda *a: seen.append(a))
    convert(tmp_path / "hf", tmp_path / "ckpt-0", "xai")
    for folder in (original, tmp_path / "ckpt-0"):
        assert file_hashes(folder) == file_hashes(original)
    assert seen[-1][1] == seen[-1][2] and seen[0][0] == "writing"
    record = json.loads(manifest.read_text())
    for file, digest in record["source"]["files"].items():
        assert hashlib.sha256((original / file).read_bytes()).hexdigest() == digest
    io = np.load(FIXTURES / name / "io.npz")
    for place in (tmp_path / "hf", tmp_path / "ckpt-0"):  # the second knows its multipliers from the manifest beside it
        model, _ = load(place)
        with torch.no_grad():
            logits = model(torch.from_numpy(io["tokens"]).long()).numpy()
        assert np.abs(logits - io["logits_fp32"]).max() < 2e-5 * np.abs(io["logits_fp32"]).max()


def test_a_changed_weight_byte_is_found_by_its_hash(tmp_path):
    write_official(tmp_path / "ckpt-0", small_config(1))
    convert(tmp_path / "ckpt-0", tmp_path / "hf", config=small_config(1))
    assert len(verify(tmp_path / "hf")) == 3
    file = tmp_path / "hf" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    load(tmp_path / "hf")  # a valid weight, only another one
    with pytest.raises(UserError, match=r"model\.safetensors.*sha256"):
        verify(tmp_path / "hf")
    with pytest.raises(UserError, match=r"model\.safetensors.*sha256"):
        convert(tmp_path / "hf", tmp_path / "new", "xai")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.manifest.json").exists()


def test_existing_destinations_and_unknown_formats_are_refused(tmp_path):
    write_official(tmp_path / "ckpt-0", small_config(1))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "ckpt-0", tmp_path / "there", config=small_config(1))
    with pytest.raises(UserError, match="no format 'onnx'; known: hf, xai"):
        convert(tmp_path / "ckpt-0", tmp_path / "new", "onnx")
    with pytest.raises(UserError, match="dtype"):
        convert(tmp_path / "ckpt-0", tmp_path / "new", "xai", dtype=torch.bfloat16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt-0", "there"]


def test_a_biased_model_leaves_no_half_written_checkpoint(tmp_path):
    model = initialize(Grok1(small_config(1)), 0)
    model.layers[0].moe.balance_bias[1] = 1.0
    save_huggingface(model, None, tmp_path / "hf")
    with pytest.raises(UserError, match="balance bias"):
        convert(tmp_path / "hf", tmp_path / "ckpt-0", "xai")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_run_is_loaded_finished_or_not(tmp_path):
    model, run = initialize(Grok1(small_config(1)), 5), tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(Config(model=small_config(1)).to_toml())
    checkpoint.save(run / "checkpoints", 7, {"model": dict(model.state_dict())}, {})
    found, tokenizer = load(run)
    assert tokenizer is None and torch.equal(found.embedding.weight, model.embedding.weight)
    (tmp_path / "data").mkdir()
    load_tokenizer(FIXTURES / "tokenizer" / "tokenizer.model").save(tmp_path / "data" / "tokenizer", convert=False)
    (run / "manifest.json").write_text(json.dumps({"data": {"directory": str(tmp_path / "data")}}))
    assert load(run)[1].vocab_size == 131072
    assert load(run, dtype="bf16")[0].layers[0].moe.down_proj.dtype == torch.bfloat16
    finished = initialize(Grok1(small_config(1)), 6)
    save_huggingface(finished, load_tokenizer(FIXTURES / "tokenizer" / "tokenizer.model"), run / "model")
    found, tokenizer = load(run)
    assert torch.equal(found.embedding.weight, finished.embedding.weight)
    assert tokenizer.vocab_size == 131072
    convert(run, tmp_path / "hf", "hf")
    assert load(tmp_path / "hf")[1].fingerprint == tokenizer.fingerprint


def test_presets_are_initialised_models():
    model, tokenizer = load("tiny")
    again, _ = load("tiny")
    assert tokenizer is None and model.config.hidden_size == preset("tiny")["model"]["hidden_size"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("given, sentence", [
    ({"device": "xyz"}, "device = 'xyz': not usable on this machine"), ({"device": "cuda:99"}, "device = 'cuda:99': not usable"),
    ({"config": "tiny"}, "config = 'tiny': give a Config"), ({"config": 3}, "config = 3: give a Config"),
])  # fmt: skip
def test_what_cannot_be_loaded_with_is_a_sentence(tmp_path, given, sentence):
    save_huggingface(initialize(Grok1(small_config(1)), 6), None, tmp_path / "hf")
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "hf", **given)


def test_a_name_that_no_file_can_have_is_no_model():
    for name in ("a" * 300, "a/" * 3000):
        with pytest.raises(UserError, match="neither a folder nor a preset"):
            load(name)


def test_a_hugging_face_directory_may_be_called_as_the_official_one(tmp_path):
    model = initialize(Grok1(small_config(1)), 6)
    save_huggingface(model, None, tmp_path / "ckpt-0")
    assert torch.equal(load(tmp_path / "ckpt-0")[0].embedding.weight, model.embedding.weight)
    (tmp_path / "empty" / "ckpt-0").mkdir(parents=True)
    with pytest.raises(UserError, match="holds 0 tensor files"):
        load(tmp_path / "empty" / "ckpt-0")


def test_other_files_called_tokenizer_are_none(tmp_path):
    save_huggingface(initialize(Grok1(small_config(1)), 6), None, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.tok.json").write_text("{}")
    (tmp_path / "hf" / "tokenizer.json").mkdir()
    assert load(tmp_path / "hf")[1] is None


def test_weights_that_are_a_folder_are_said(tmp_path):
    save_huggingface(initialize(Grok1(small_config(1)), 6), None, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors: not a file of weights: download it again"):
        load(tmp_path / "hf")


@pytest.mark.parametrize("what, sentence", [("tinny", "did you mean 'tiny'"), ("no/folder", "neither a folder nor")])
def test_what_is_not_there_is_said(what, sentence):
    with pytest.raises(UserError, match=sentence):
        load(what)


def test_the_current_folder_is_a_folder_too(tmp_path, monkeypatch):
    write_official(tmp_path / "ckpt-0", small_config(1))
    monkeypatch.chdir(tmp_path / "ckpt-0")
    assert load(".", config=small_config(1))[0].config == small_config(1)
    with pytest.raises(UserError, match=r"heads of 128.*`pellucid convert --config`"):
        load(".")
    with pytest.raises(UserError, match="exists already"):
        convert(".", ".", config=small_config(1))


def test_folders_and_files_without_a_model_are_said(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a model is a folder"):
        load(tmp_path / "file")
    with pytest.raises(UserError, match="nothere: there is nothing"):
        open_source(tmp_path / "nothere")
    with pytest.raises(UserError, match="dtype fp8"):
        load("tiny", dtype="fp8")


def test_a_tokenizer_model_becomes_a_folder_that_transformers_reads_with_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    texts = ["def f(x):\n    return x + 123\n\n" * 20, "the quick brown fox\tjumps over the lazy dog; " * 30]
    for kind in ("sentencepiece", "unigram"):
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=500), texts).save(tmp_path / kind, convert=False)
    arguments = ["convert", str(tmp_path / "sentencepiece" / "tokenizer.model"), str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "sentencepiece")
    for text in (*texts, "\n[PAD]\n <|mask|> naïve 😀  \t\t7", " leading", ""):
        assert theirs(text).input_ids == ours.encode(text)
    with pytest.raises(UserError, match=r"tokenizer.model: no tokenizer.json gives exactly its ids"):
        convert_tokenizer(tmp_path / "unigram" / "tokenizer.model", tmp_path / "no")
    assert not (tmp_path / "no").exists()
