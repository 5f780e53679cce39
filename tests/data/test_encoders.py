"""Fast libraries behind a tokenizer: the engine's ids on anything, or refused. The engines themselves are the reference."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pellucid.config import TokenizerConfig, UserError, make_config
from pellucid.data import encoders
from pellucid.data.build import prepare
from pellucid.data.tokenizer import load_tokenizer
from pellucid.data.tokenizer_training import train_tokenizer

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "tokenizer" / "tokenizer.model"
SCRIPTS = [(0x20, 0x7F), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF),
           (0x900, 0x97F), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x2000, 0x206F), (0x2190, 0x21FF), (0x2580, 0x259F),
           (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFB4F), (0xFF00, 0xFFEF),
           (0x1F300, 0x1FAFF), (0x20000, 0x200FF), (0x10FF00, 0x10FFFF)]  # fmt: skip
SNIPPETS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "<|separator|>", "<|mask|>", "<|control7|>", "<|", "|>", "<s>", "</s>", "<pad>",
            "<eos>", "<0x41>", "<0xFF>", "\u2581", "\u2581\u2581", "  ", " " * 17, "\n" * 10, "\n" * 11, "\t" * 8, "\t" * 9,
            "\r\n", "\x00", "\x1c", "\u2028", "\ufeff", "0", "1234567890", "²①½५", "def f(x):\n\treturn x", "'s", "'LL", "e\u0301",
            "👩‍👩‍👧", "https://a.b/c?d=%20", "aaaaaaaaaaaaaaaaaaaaaaaa", "the", "The", "ing ", "Donaudampfschifffahrt"]  # fmt: skip


def adversarial_texts(count=1300):
    """One script alone, scripts mixed, runs of whitespace, names of special tokens; always the same ones."""
    rng = random.Random(7)
    texts = ["", " ", "[EOS][PAD][UNK]", "\n[PAD]\n", *SNIPPETS]
    while len(texts) < count:
        scripts = rng.sample(SCRIPTS, k=rng.choice((1, 1, 2, 5)))
        parts = []
        for _ in range(rng.randrange(30)):
            first, last = rng.choice(scripts)
            word = "".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 9)))
            parts += [rng.choice((word, word, rng.choice(SNIPPETS))), rng.choice(("", " ", " ", "\n", "  ", "\t", "\n\n    "))]
        texts.append("".join(parts))
    return texts


def encoder(tokenizer, name):
    choice = encoders.choose_encoder(tokenizer.engine, name)
    assert choice.encoder.name == name, choice.refused
    return lambda texts: [ids.tolist() for ids in choice.encoder(texts)]


@pytest.fixture(scope="module")
def official():
    return load_tokenizer(OFFICIAL)


@pytest.fixture(scope="module")
def trained():
    texts = adversarial_texts(80) + ["the cat sat on the mat, the café; we'll see\n\tdef f(x):\n\t\treturn 12\n"] * 40
    return {kind: train_tokenizer(TokenizerConfig(kind=kind, vocab_size=3000), texts)
            for kind in ("bpe", "sentencepiece", "unigram")}


@pytest.fixture(scope="module")
def fast(official, trained):
    """(tokenizer, encode) for every library on every kind of file it is for."""
    pairs = {"official gigatoken": (official, "gigatoken"), "official kitoken": (official, "kitoken"),
             "bpe splintr": (trained["bpe"], "splintr"), "sentencepiece gigatoken": (trained["sentencepiece"], "gigatoken"),
             "sentencepiece kitoken": (trained["sentencepiece"], "kitoken")}
    return {label: (tokenizer, encoder(tokenizer, name)) for label, (tokenizer, name) in pairs.items()}


FAST = ["official gigatoken", "official kitoken", "bpe splintr", "sentencepiece gigatoken", "sentencepiece kitoken"]


@pytest.mark.parametrize("label", FAST)
def test_adversarial_texts_get_the_reference_ids(fast, label):
    tokenizer, encode = fast[label]
    texts = adversarial_texts()
    for text, expected, got in zip(texts, tokenizer.encode_batch(texts), encode(texts), strict=True):
        assert got == expected, repr(text)


@pytest.mark.parametrize("label", FAST)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text() | st.lists(st.sampled_from(SNIPPETS)).map("".join), max_size=4))
@example(texts=["\n" * 11, "a\t\t\t\t\t\t\t\t\tb", "x<|mask|>y", "plain"])
def test_any_batch_gets_the_reference_ids(fast, label, texts):
    tokenizer, encode = fast[label]
    assert encode(texts) == tokenizer.encode_batch(texts)


def test_the_fastest_is_chosen_and_none_for_unigram(trained):
    assert encoders.choose_encoder(trained["sentencepiece"].engine).encoder.name == "gigatoken"
    assert encoders.choose_encoder(trained["bpe"].engine).encoder.name == "splintr"
    choice = encoders.choose_encoder(trained["unigram"].engine)
    assert "gigatoken" in choice.refused
    texts = adversarial_texts(200)
    assert [ids.tolist() for ids in choice.encoder(texts)] == trained["unigram"].encode_batch(texts)


def test_a_library_with_one_wrong_id_is_refused(trained, monkeypatch):
    tokenizer = trained["bpe"]

    def nearly(engine, reference):
        def batch(texts):
            ids = reference(texts)
            ids[-1] = np.append(ids[-1], np.uint32(5))
            return ids

        return encoders.Encoder("splintr", batch, reference)

    monkeypatch.setitem(encoders.CANDIDATES, "tokenizer.json", {"splintr": nearly})
    choice = encoders.choose_encoder(tokenizer.engine)
    assert choice.encoder.name == "reference" and "other ids for" in choice.refused["splintr"]
    with pytest.raises(UserError, match=r"data.tokenizer.encoder = 'splintr': refused: other ids for"):
        tokenizer.use_encoder("splintr")


def test_an_absent_library_is_a_sentence_or_passed_over(trained, monkeypatch):
    tokenizer = trained["sentencepiece"]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert encoders.choose_encoder(tokenizer.engine).encoder.name == "kitoken"
    with pytest.raises(UserError, match=r"encoder = 'gigatoken': not installed; pip install 'pellucid\[fast\]'"):
        tokenizer.use_encoder("gigatoken")
    with pytest.raises(UserError, match=r"encoder = 'splintr': cannot run a tokenizer.model"):
        tokenizer.use_encoder("splintr")


def test_little_text_loads_nothing_and_much_text_gives_the_same(trained, monkeypatch):
    tokenizer = load_tokenizer_again(trained["bpe"])
    monkeypatch.setattr(tokenizer.engine, "patience", 1000, raising=False)
    chosen = []
    monkeypatch.setattr(tokenizer, "use_encoder", lambda: chosen.append(1) or type(tokenizer).use_encoder(tokenizer))
    texts = adversarial_texts(50)
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts[:10])] == tokenizer.encode_batch(texts[:10])
    assert not chosen
    for _ in range(3):
        arrays = tokenizer.encode_arrays(texts)
        assert [ids.tolist() for ids in arrays] == tokenizer.encode_batch(texts)
        assert all(ids.dtype == np.uint32 for ids in arrays)
    assert chosen == [1]
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode_arrays(["a\ud800b"])


def load_tokenizer_again(tokenizer):
    return type(tokenizer)(type(tokenizer.engine)(tokenizer.engine.content))


def test_prepared_data_is_the_same_whichever_library_made_it(trained, tmp_path):
    trained["sentencepiece"].save(tmp_path / "tokenizer")
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "line {n} of a text\\n\\n\\tit goes on"}}\n' for n in range(60)))
    digests = set()
    for name in ("gigatoken", "kitoken", "reference"):
        config = make_config({"data": {"sources": [str(tmp_path / "text.jsonl")], "sequence_length": 16, "tokenizer": {
            "kind": "file", "path": str(tmp_path / "tokenizer"), "encoder": name}}}).data
        dataset = prepare(config, directory=tmp_path / name)
        assert dataset.manifest["tokenizer"]["trained_by"] is None
        digests.add((dataset.fingerprint, dataset.manifest["settings_hash"]))
    assert len(digests) == 1
