"""Held-out loss: every target once, and equal to a direct computation; whole files likewise."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn import functional as F

from pellucid.config import DataConfig, NormalizeConfig, UserError, make_config
from pellucid.data.build import prepare
from pellucid.data.tokenizer import load_tokenizer
from pellucid.measure.files import evaluate_files
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.training.evaluate import Evaluation, evaluate_batches, split_batches

IGNORE = -100
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def loaded(tiny_run):
    model, tokenizer = tiny_run.load()
    return model, tokenizer, tiny_run.dataset()


def direct_nats(model, stream, T):
    """Σ -log p over windows of T, one window at a time, from the logits in float64."""
    nats = 0.0
    for start in range(0, len(stream) - 1, T):
        piece = stream[start : start + T + 1]
        logits = model(torch.tensor([piece[:-1]])).detach().double()[0]
        nats += float(F.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum"))
    return nats


@pytest.mark.parametrize("name", ["train", "validation"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_evaluating_a_split_counts_every_target_once(name, size, loaded):
    model, tokenizer, data = loaded
    split = data.split(name)
    documents = [split.document(i) for i in range(len(split.reader.starts))]
    result = evaluate_batches(model, split_batches(split, size), tokenizer.byte_lengths)
    assert result.tokens == sum(len(d["token_ids"]) for d in documents)
    assert result.text_bytes == sum(len(d["text"].encode()) for d in documents)
    rows = torch.cat([batch.sample_ids_B for batch in split_batches(split, size)])
    assert sorted(rows.tolist()) == list(range(len(split)))


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "official"])
def test_the_space_that_sentencepiece_puts_before_a_text_is_no_byte_of_it(kind, tmp_path):
    """Of a split that was trained on, of files, and by the tokenizer.json made of an official tokenizer.model."""
    rows = [f"the cat number {n} sat\non a mat" for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    official = {"kind": "file", "path": str(FIXTURES / "tokenizer" / "tokenizer.model")}
    chosen = official if kind == "official" else {"kind": kind, "vocab_size": 330}
    data = prepare(DataConfig.model_validate({
        "sources": [str(tmp_path / "corpus.jsonl")], "validation_fraction": 0.3, "sequence_length": 16, "tokenizer": chosen}),
        directory=tmp_path / "data")  # fmt: skip
    tokenizer = data.tokenizer
    model = initialize(Grok1(make_config({"model": {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_experts": 1,
        "num_experts_per_tok": 1}}).model))  # fmt: skip
    for split in (data.train, data.validation):
        texts = [split.text_of(n) for n in range(len(split.reader.starts))]
        assert evaluate_batches(model, split_batches(split, 8), tokenizer.byte_lengths).text_bytes == len("".join(texts))
    assert evaluate_files(model, tokenizer, str(tmp_path / "corpus.jsonl"), context=16).text_bytes == len("".join(rows))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.model").unlink()
    if (tmp_path / "saved" / "tokenizer.json").exists():  # not of unigram
        assert (load_tokenizer(tmp_path / "saved").byte_lengths == tokenizer.byte_lengths).all()


def test_bytes_of_files_are_of_their_text_whatever_the_tokenizer_leaves_out(loaded, tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[EOS]": 1, "[UNK]": 2, "cat": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("cat dog  cat\n")
    result = evaluate_files(loaded[0], load_tokenizer(tmp_path / "tokenizer.json"), str(tmp_path / "a.txt"), context=16)
    assert (result.tokens, result.text_bytes) == (4, 13)


def test_evaluating_a_split_equals_the_logits_own_cross_entropy(loaded):
    model, tokenizer, data = loaded
    nats = tokens = 0
    for batch in split_batches(data.validation, 2):
        logits = model(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT).detach().double()
        targets = batch.targets_BT.flatten()
        nats += float(F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"))
        tokens += int((targets != IGNORE).sum())
    result = evaluate_batches(model, split_batches(data.validation, 5), tokenizer.byte_lengths)
    assert (result.nats, result.tokens) == (pytest.approx(nats, rel=1e-6), tokens)


def test_some_rows_are_the_first_of_the_fixed_order(loaded):
    data = loaded[2]
    ids = torch.cat([b.sample_ids_B for b in split_batches(data.validation, 2, rows=3)])
    assert torch.equal(ids, data.validation.rows(0, 3).sample_ids_B)
    assert sum(len(b.sample_ids_B) for b in split_batches(data.validation, 2, rows=10**6)) == len(data.validation)


@pytest.mark.parametrize("context", [7, 32, 1000, 10**9])
def test_evaluating_files_predicts_every_token_of_every_document_once(context, loaded, tmp_path):
    model, tokenizer, _ = loaded
    texts = {"a.txt": "the cat sat on a mat\n" * 20, "b.txt": "naïve owls ünder the moon", "c.md": "x"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    streams = [[tokenizer.eos_token_id, *tokenizer.encode(t), tokenizer.eos_token_id] for t in texts.values()]
    seen = []
    result = evaluate_files(model, tokenizer, str(tmp_path), context=context, progress=lambda *told: seen.append(told))
    assert result.tokens == sum(len(stream) - 1 for stream in streams)
    assert result.text_bytes == sum(len(text.encode()) for text in texts.values())
    expected = sum(direct_nats(model, stream, context) for stream in streams)
    assert result.nats == pytest.approx(expected, rel=1e-6)  # fp32 logits in batches of other shapes
    assert seen[-1] == ("evaluating", result.text_bytes, result.text_bytes)
    assert len(seen) > 4 or context > 7, "one long file is told of as it goes"


def test_files_of_many_windows_are_the_same_in_pieces(loaded, tmp_path):
    """More windows than are predicted at once (16)."""
    model, tokenizer, _ = loaded
    text = "dogs ran past old trees in rain\n" * 40
    (tmp_path / "a.txt").write_text(text)
    stream = [tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    result = evaluate_files(model, tokenizer, str(tmp_path / "a.txt"), context=16)
    plain = evaluate_files(model, tokenizer, str(tmp_path / "a.txt"), context=16, normalization=NormalizeConfig(unicode="none"))
    assert plain == result, "here normalising changes nothing"
    (tmp_path / "b.txt").write_text((tmp_path / "a.txt").read_text().upper())
    lower = evaluate_files(model, tokenizer, str(tmp_path / "b.txt"), context=16, normalization=NormalizeConfig(lowercase=True))
    assert lower.text_bytes == evaluate_files(model, tokenizer, str(tmp_path / "b.txt"), context=16).text_bytes
    assert lower.loss != evaluate_files(model, tokenizer, str(tmp_path / "b.txt"), context=16).loss
    assert result.nats == pytest.approx(direct_nats(model, stream, 16), rel=1e-6)


def test_nothing_to_evaluate_is_a_sentence(loaded, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    expected_of = {"empty.txt": "the file is empty", "blank.jsonl": "holds no text", "none.txt": "no file matches"}
    for name, expected in expected_of.items():
        with pytest.raises(UserError, match=expected):
            evaluate_files(loaded[0], loaded[1], str(tmp_path / name))


def test_blank_documents_are_left_out_as_in_training(loaded, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the cat sat"}\n{"text": ""}\n{"text": " \\n "}\n{"text": "on a mat"}\n')
    result = evaluate_files(loaded[0], loaded[1], str(tmp_path / "a.jsonl"), context=16)
    assert (result.tokens, result.text_bytes) == (11 + 1 + 8 + 1, 11 + 8)


def test_measures_follow_from_their_sums():
    result = Evaluation(nats=20.0, tokens=10, text_bytes=40) + Evaluation(nats=4.0, tokens=2, text_bytes=8)
    assert result.loss == 2.0 and result.perplexity == pytest.approx(math.exp(2))
    assert result.bits_per_byte == pytest.approx(24 / math.log(2) / 48)
    assert result.as_dict() == {"loss": 2.0, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte,
                                "tokens": 12, "text_bytes": 48}  # fmt: skip
    assert Evaluation(nats=1e6, tokens=1).perplexity < math.inf


def test_evaluation_changes_nothing_and_leaves_no_gradient(loaded):
    model, tokenizer, data = loaded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_batches(model, split_batches(data.validation, 4), tokenizer.byte_lengths)
    assert all(np.array_equal(before[n].numpy(), t.numpy()) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
