"""Tokenizers: exact round trips, no text that becomes a special token, the official ids, the same twice."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from pellucid.config import TokenizerConfig, UserError
from pellucid.data import tokenizer_training
from pellucid.data.tokenizer import load_tokenizer
from pellucid.data.tokenizer_training import train_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"
TEXTS = ["def f(x):\n    return x + 123  # a comment\n\n\n" * 20,
         "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich. 😀 " * 20,
         "the quick brown fox\tjumps over the lazy dog, the lazy dog sleeps; " * 30]
SPECIAL = "<pad><bos><eos><unk> <s></s> [PAD] [EOS] <|endoftext|> <0x41> <0xFF>"


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(TokenizerConfig(kind=kind, vocab_size=500), TEXTS)
            for kind in ("bpe", "bytes", "characters", "sentencepiece", "unigram")}


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters"])
@given(text=st.text())
@example(text=SPECIAL)
@example(text="\u2581 \ufeff\x00\x85\u2028 \u200d  \t\r\n\ud7ff\ue000\U0010ffff")
@example(text=" \n" * 40)
def test_every_string_comes_back_exactly(trained, kind, text):
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert not set(ids) & {0, 1, 2, 3}
    assert all(i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
@given(text=st.text())
@example(text=SPECIAL)
def test_sentencepiece_brings_back_all_but_its_own_mark_for_a_space(trained, kind, text):
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == (" " * bool(text) + text.replace("\u2581", " ")).encode()
    assert not set(ids) & {0, 1, 2, 3}


def test_reserved_ids_and_all_bytes(trained):
    for kind, tokenizer in trained.items():
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        assert {bytes([byte]) for byte in range(256)} <= single, kind
        assert [tokenizer.token_bytes(i) for i in range(4)] == [b""] * 4
        assert tokenizer.decode([0, 1, 2, *tokenizer.encode("hello"), 2, 0]) == "hello"
    assert train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS).vocab_size == 300
    assert trained["bytes"].vocab_size == 260 and trained["bytes"].encode("\x00é") == [4, 4 + 0xC3, 4 + 0xA9]
    assert trained["characters"].vocab_size == 260 + len(set("".join(TEXTS)))
    assert len(trained["characters"].encode("über")) == 4


def test_digits_stand_alone(trained):
    for kind in ("bpe", "sentencepiece", "unigram"):
        assert len(trained[kind].encode("1234567890")) >= 10


@pytest.mark.parametrize("kind", ["bpe", "characters", "sentencepiece", "unigram"])
def test_the_same_texts_give_the_same_tokenizer(trained, kind):
    again = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=500), iter(TEXTS))
    assert again.fingerprint == trained[kind].fingerprint
    other = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=500), ["something else entirely 99 ☃"] * 99)
    assert other.fingerprint != trained[kind].fingerprint


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters", "sentencepiece", "unigram"])
def test_saved_and_loaded_it_is_the_same(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == tokenizer.vocab_size
    text = TEXTS[1] + SPECIAL
    assert loaded.encode(text) == tokenizer.encode(text)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] in ("<eos>", "[EOS]") and settings["split_special_tokens"] is True


def test_the_saved_file_alone_tokenizes_alike_for_others(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode(TEXTS[1]).ids == trained["bpe"].encode(TEXTS[1])
    trained["sentencepiece"].save(tmp_path / "spm")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm" / "tokenizer.model"))
    assert model.encode(TEXTS[1]) == trained["sentencepiece"].encode(TEXTS[1])


@given(text=st.text())
@example(text=SPECIAL)
@example(text="a\n<0x41>\n[PAD]b 12\t\t\n\n\n   x\u2581 ")
def test_the_converted_sentencepiece_gives_the_same_ids(converted, trained, text):
    ids = trained["sentencepiece"].encode(text)
    assert converted.encode(text).ids == ids
    assert converted.decode(ids) == trained["sentencepiece"].decode(ids)


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    trained["sentencepiece"].save(folder)
    assert load_tokenizer(folder).fingerprint == trained["sentencepiece"].fingerprint
    return as_written(folder)


def as_written(folder):
    """The tokenizer.json as other programs read it, with split_special_tokens of its configuration."""
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = json.loads((folder / "tokenizer_config.json").read_text())["split_special_tokens"]
    return plain


def test_the_official_tokenizer_is_converted_exactly(tmp_path):
    load_tokenizer(FIXTURES / "tokenizer.model").save(tmp_path)
    plain = as_written(tmp_path)
    for case in json.loads((FIXTURES / "tokenizer_cases.json").read_text())["cases"]:
        assert plain.encode(case["text"]).ids == case["ids"]
        assert plain.decode(case["ids"]) == case["decoded"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / "tokenizer.model"))
    around = ["", "\n", "\n\n\n", "\t", "7", "<|mask|>", " ", "x", "|>", "[", "]"]
    texts = [left + name + right for left in around for right in around for name in ("[PAD]", "[BOS]", "[UNK]", "[PAD][EOS]", "[PA")]
    assert [item.ids for item in plain.encode_batch(texts)] == reference.encode(texts)


def test_what_cannot_be_converted_exactly_is_not(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="unigram", vocab_size=60, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)  # without a pad: it gets one
    assert tokenizer.pad_token_id == 60 and tokenizer.vocab_size == 61
    tokenizer.save(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_training_stops_reading_at_its_memory_bound(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 1000)
    given_out = []

    def texts():
        for n in range(1000):
            given_out.append(n)
            yield "x" * 100

    train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), texts())
    assert len(given_out) <= 11


def test_the_official_tokenizer_gives_the_official_ids():
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.model")
    cases = json.loads((FIXTURES / "tokenizer_cases.json").read_text())["cases"]
    assert len(cases) == 54
    assert tokenizer.vocab_size == 131072
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for case in cases:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"]
        assert tokenizer.decode(ids) == case["decoded"]
    assert tokenizer.encode_batch([case["text"] for case in cases]) == [case["ids"] for case in cases]
    assert tokenizer.token_bytes(4) == b"\n" and tokenizer.token_bytes(2) == b""


def word_level(**special):
    return {"version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": None, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
            "trim_offsets": True, "use_regex": True}, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for name, i in special.items()],
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {"a": 0, "b": 1, "ab": 2} | special, "merges": [["a", "b"]]}}


@pytest.mark.parametrize(("special", "config", "pad_bos_eos", "size"), [
    ({}, None, (4, 3, 3), 5),  # nothing: eos and pad are new ids, bos is eos
    ({"</s>": 3}, None, (4, 3, 3), 5),  # pad is new
    ({"</s>": 3}, {"eos_token": "</s>", "pad_token": "</s>"}, (4, 3, 3), 5),  # pad must not be eos
    ({"</s>": 3, "[PAD]": 4}, {"eos_token": "</s>", "pad_token": "</s>"}, (5, 3, 3), 6),  # also beside a name known for it
    ({"<s>": 3, "</s>": 4, "<pad>": 5}, None, (5, 3, 4), 6),
    ({"<x>": 3, "<y>": 4}, {"eos_token": {"content": "<y>"}, "pad_token": "<x>"}, (3, 4, 4), 5),
])
def test_foreign_tokenizers_get_what_they_lack(tmp_path, special, config, pad_bos_eos, size):
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_level(**special)))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == pad_bos_eos
    assert tokenizer.vocab_size == size
    assert tokenizer.encode("ababa") == [2, 2, 0]  # its own truncation is not ours
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("kind", "before"), [("Unigram", {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never"}),
                                              ("WordLevel", {"type": "WhitespaceSplit"})])
def test_a_vocabulary_of_whole_words_gives_no_text_a_special_id(tmp_path, kind, before):
    """Where the pieces themselves are looked up in the text, the names of special tokens are among them."""
    names = ["<pad>", "</s>", "<unk>", "a", "b", "\u2581", "<", "/", "s", ">"]
    model = {"vocab": [[name, -2.0] for name in names], "unk_id": 2} if kind == "Unigram" else \
        {"vocab": {name: i for i, name in enumerate(names)}, "unk_token": "<unk>"}
    made = word_level(**{name: names.index(name) for name in ("<pad>", "</s>", "<unk>")}) | {"pre_tokenizer": before, "decoder": None}
    made["added_tokens"].append(made["added_tokens"][0] | {"id": 10, "content": "word", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(made | {"model": {"type": kind} | model}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (0, 1, 11)
    plain, special = tokenizer.encode("a b word"), tokenizer.encode("a </s> <pad> b")
    assert plain == ([3, 5, 4, 5, 10] if kind == "Unigram" else [3, 4, 10])
    assert special == ([3, 5, 6, 7, 8, 9, 5, 6, 2, 3, 2, 9, 5, 4] if kind == "Unigram" else [3, 2, 2, 4])
    assert tokenizer.decode([3, 1, 4, 0, 10]) == "a b word" and tokenizer.token_bytes(1) == b""


@pytest.mark.parametrize(("name", "data", "says"), [
    ("tokenizer.json", b"{not json", "not a json file that can be read"),
    ("tokenizer.json", b'{"a": 1}', "not a json file that can be read"),
    ("tokenizer.json", b"", "the file is empty"),
    ("tokenizer.model", b"nonsense", "not a model file that can be read"),
    ("tokenizer.model", b"", "the file is empty"),
])
def test_bad_tokenizer_files_are_one_sentence(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name) as error:
        load_tokenizer(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_vocabulary_too_small_for_sentencepiece_is_a_sentence():
    with pytest.raises(UserError, match=r"data.tokenizer.vocab_size = 260.*try a larger one"):
        train_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=260), TEXTS)


def test_half_a_surrogate_pair_is_a_sentence(trained):
    for tokenizer in trained.values():
        with pytest.raises(UserError, match="surrogate"):
            tokenizer.encode("a\ud800b")
