"""Training byte-level BPE: both trainers give what Hugging Face's own gives for the texts as they are."""

import json
import sys

import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from pellucid.config import TokenizerConfig
from pellucid.data import bpe_training
from pellucid.data.tokenizer_training import train_tokenizer

WORDS = ["the", "cat", "sat", " ", " ", "  ", "\n", "\n\n", "\t", "   ", "12", "0", "7", "²", "①", "½", "५", "'s", "'ll", "é", "日本",
         "😀", "-", "...", "\r", "\xa0", "\u2028", "\x85", "\x1c", "aaa", "ab", "_"]  # fmt: skip


def straight(texts, count):
    """Hugging Face's trainer on the texts themselves, with the word split our tokenizers have."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=4 + 256 + count, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"]))
    return json.loads(backend.to_str())["model"]


@settings(max_examples=120, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=40).map("".join), min_size=1, max_size=6), count=st.integers(0, 80))
@example(texts=["1 2  3\n4", "²³ ½ \n", " ", "x 1", ""], count=20)
@example(texts=["a  ", "a  ", "  1"], count=3)
def test_both_trainers_find_the_merges_of_the_texts_themselves(texts, count):
    expected = [tuple(merge) for merge in straight(texts, count)["merges"]]
    assert bpe_training._train(bpe_training._hugging_face, texts, count) == expected
    assert bpe_training._train(bpe_training._gigabpe, texts, count) == expected


def test_the_whole_vocabulary_is_hugging_faces_too():
    texts = ["the cat sat on the mat 123 times; naïve café\n\n\tdef f(x):  return '日本'\n" * 9, "we'll see the other cats  42\n" * 5]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=330), texts)
    model, expected = json.loads(tokenizer.engine.content)["model"], straight(texts, 70)
    assert model["vocab"] == expected["vocab"] and model["merges"] == expected["merges"]
    assert tokenizer.trained_by.startswith("gigabpe ")


def test_without_gigabpe_the_tokenizer_is_the_same(monkeypatch):
    texts = ["the cat sat on the mat\x0b 12 ² times\n" * 20, "and the dog\r\n too " * 20]
    fast = train_tokenizer(TokenizerConfig(vocab_size=300), texts)
    bpe_training.gigabpe_problem.cache_clear()
    try:
        monkeypatch.setitem(sys.modules, "gigabpe", None)
        slow = train_tokenizer(TokenizerConfig(vocab_size=300), texts)
    finally:
        bpe_training.gigabpe_problem.cache_clear()
    assert slow.trained_by.startswith("tokenizers ") and slow.fingerprint == fast.fingerprint


def test_a_trainer_with_other_merges_is_refused(monkeypatch):
    bpe_training.gigabpe_problem.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(bpe_training, "_gigabpe", lambda path, size: bpe_training._hugging_face(path, size)[::-1])
            assert bpe_training.gigabpe_problem() == "refused: its merges differ from those of tokenizers"
    finally:
        bpe_training.gigabpe_problem.cache_clear()
