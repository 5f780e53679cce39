"""The whole of `data.augment` on documents: determinism, independence of order, rate zero, records, and BPE-dropout."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from pellucid.config import DataConfig, TokenizerConfig, UserError, make_config
from pellucid.data.augment.bpe_dropout import BpeDropout
from pellucid.data.augment.pipeline import Augmentation
from pellucid.data.augment.seeding import generator, stream_key
from pellucid.data.tokenizer_training import train_tokenizer

TEXT_ONLY = ["random_swap", "random_deletion", "spelling", "keyboard", "characters", "fill_in_the_middle", "span_masking"]
CORPUS = [f"The {n} committee will announce its final decision about budget {n * 7} on Monday.\n\n  Naïve owls: {n}"
          for n in range(40)]
DOCUMENTS = [(f"{n:032x}", text) for n, text in enumerate(CORPUS)]


def make(*entries, **settings):
    return Augmentation(DataConfig(augment=[{"name": e} if isinstance(e, str) else e for e in entries], **settings))


def stream(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def test_a_stream_is_its_four_names_and_never_changes():
    keys = {stream_key(s, d, e, a) for s in (0, 1) for d in ("a", "b") for e in (1, 2) for a in ("x", "y")}
    assert len(keys) == 16
    first = stream_key(0, "ab", 1, "synonyms")
    assert first.hex() == "5fcef35359a74c6c40ca08976c73d687"  # fixed: old data can be made again
    assert generator(first).random(2) == pytest.approx([0.23271046, 0.24824366], abs=1e-8)
    assert generator(b"\0" * 16).random(3).tolist() == generator(b"\0" * 16).random(3).tolist()


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_the_same_document_and_epoch_give_the_same_version_in_any_order(name):
    versions = make({"name": name, "rate": 0.3}).versions(DOCUMENTS, 1)
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    other = make({"name": name, "rate": 0.3})
    alone = {v.parent: v for document in shuffled for v in other.versions([document], 1)}
    assert versions == [alone[document] for document, _ in DOCUMENTS]
    assert [v.text for v in versions] != CORPUS
    again = make({"name": name, "rate": 0.3}).versions(DOCUMENTS, 2)
    assert [v.text for v in again] != [v.text for v in versions]  # another epoch, another version
    seeded = make({"name": name, "rate": 0.3}, augment_seed=1).versions(DOCUMENTS, 1)
    assert [v.text for v in seeded] != [v.text for v in versions]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4))
def test_rate_zero_and_documents_zero_are_identity(texts):
    documents = [(f"{n:x}", text) for n, text in enumerate(texts)]
    for options in ({"rate": 0.0}, {"documents": 0.0, "rate": 0.9}):
        entries = [{"name": n, **options} for n in TEXT_ONLY if not (n == "fill_in_the_middle" and "documents" in options)]
        for version, text in zip(make(*entries).versions(documents, 1), texts, strict=True):
            assert version.text == text and version.steps == () and version.token_ids is None


def test_documents_is_the_share_of_documents_touched():
    documents = [(f"{n:x}", "some words to mistype here") for n in range(2000)]
    touched = sum(bool(v.steps) for v in make({"name": "keyboard", "rate": 1.0, "documents": 0.25}).versions(documents, 1))
    assert abs(touched - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5  # four standard deviations


def test_an_added_augmenter_leaves_the_draws_of_the_others_alone():
    one = make({"name": "spelling", "rate": 0.5}).versions(DOCUMENTS, 1)
    others = {"name": "fill_in_the_middle", "rate": 0.0}, {"name": "spelling", "rate": 0.2}
    two = make({"name": "spelling", "rate": 0.5}, *others).versions(DOCUMENTS, 1)
    assert [v.steps[0] for v in one if v.steps] == [v.steps[0] for v in two if v.steps and v.steps[0]["name"] == "spelling"]
    assert any(step["name"] == "spelling#2" for v in two for step in v.steps)


@pytest.mark.parametrize("entries", [("fill_in_the_middle", "keyboard"), ("span_masking", "fill_in_the_middle", "keyboard")])
def test_sentinels_stay_whole_and_only_one_kind_stands_in_a_version(entries):
    augment = make(*({"name": name, "rate": 0.9} for name in entries))
    rearranged = {"fill_in_the_middle": 0, "span_masking": 0}
    for version in augment.versions(DOCUMENTS, 1):
        names = [step["name"] for step in version.steps]
        assert names[0] == "keyboard" and len(names) <= 2
        marks = re.findall(r"<\|.*?\|>", version.text, re.DOTALL)
        if names[1:] == ["fill_in_the_middle"]:
            assert sorted(marks) == ["<|fim_middle|>", "<|fim_prefix|>", "<|fim_suffix|>"]
        else:
            assert sorted(marks) == sorted(f"<|mask_{n}|>" for n in range(len(marks) // 2) for _ in range(2))
        rearranged |= {name: rearranged[name] + 1 for name in names[1:]}
    refused = {step["name"]: step["rejected"].get("rearranged already", 0) for step in augment.describe()}
    assert rearranged[entries[0]] > 20
    if len(entries) == 3:
        assert refused["fill_in_the_middle"] > 20


def test_a_version_that_came_out_empty_is_no_version():
    versions = make({"name": "characters", "rate": 1.0}).versions([(f"{n:x}", "a") for n in range(99)], 1)
    assert all(version.text for version in versions)
    assert {bool(version.steps) for version in versions} == {True, False}
    assert all(bool(version.steps) == (version.text != "a") for version in versions)


def test_a_record_holds_parent_augmenter_settings_and_seed_and_makes_the_version_again():
    version = make({"name": "keyboard", "rate": 0.2}, augment_seed=9).versions(DOCUMENTS[3:4], 2)[0]
    record = json.loads(version.record)
    assert version.parent == DOCUMENTS[3][0] and (record["epoch"], record["seed"]) == (2, 9)
    (step,) = record["steps"]
    assert step["name"] == "keyboard" and step["settings"]["rate"] == 0.2 and step["changed"] > 0
    entries = [step["settings"] for step in record["steps"]]
    assert make(*entries, augment_seed=record["seed"]).versions(DOCUMENTS[3:4], record["epoch"])[0] == version


def test_synonyms_and_back_translation_run_together_on_the_real_lexicon_and_engine(tmp_path, need, wordnet, prose):
    need("/usr/share/apertium/modes/en-eo.mode", "apertium apertium-eo-en")
    entries = [{"name": "back_translation"}, {"name": "synonyms", "rate": 1.0}]
    augment = make(*entries, directory=str(tmp_path))
    documents = [("aa", prose), ("bb", "The physician bought an automobile.\n"), ("cc", "")]
    versions = augment.versions(documents, 1)
    assert versions[0].text != prose and versions[1].text != documents[1][1] and versions[2].text == ""
    assert versions[0].text.count("\n") == prose.count("\n") and "    def f(x):\treturn x" in versions[0].text
    assert {step["name"] for step in versions[0].steps} == {"back_translation", "synonyms"}
    described = augment.describe()
    assert described[0]["changed"] and described[1]["rejected"]["function word"] and all(d["fingerprint"] for d in described)
    cache = augment._caches[0]
    misses = cache.misses
    assert augment.versions(documents[::-1], 1)[::-1] == versions and cache.misses == misses and cache.hits
    augment.close()


@pytest.mark.parametrize("entry, sentence", [
    ({"name": "keyboard", "rat": 1}, r"unknown key 'data.augment\[0\].rat'; did you mean 'rate'"),
    ({"name": "keybord"}, r"data.augment\[0\]: .*'keybord'.*'keyboard'"),
    ({"name": "keyboard", "rate": 2}, r"data.augment\[0\].rate: .*less than or equal to 1"),
    ({"name": "span_masking", "sentinel": "x"}, r"data.augment\[0\].sentinel"),
])  # fmt: skip
def test_a_wrong_entry_is_one_sentence_that_names_its_key(entry, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config({"data": {"augment": [entry]}})


# --------------------------------------------------------------------------------------- bpe_dropout


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request):
    return train_tokenizer(TokenizerConfig(kind=request.param, vocab_size=420), CORPUS)


@settings(max_examples=120, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=80),
       seed=st.integers(0, 99))
def test_dropout_zero_gives_the_tokenizers_ids_and_any_dropout_the_text(tokenizer, text, seed):
    assert BpeDropout(tokenizer, 0.0).encode(text, stream(seed)) == tokenizer.encode(text)
    ids = BpeDropout(tokenizer, 0.4).encode(text, stream(seed))
    assert tokenizer.decode(ids) == text
    assert ids == BpeDropout(tokenizer, 0.4).encode(text, stream(seed))


def test_full_dropout_leaves_no_merge(tokenizer):
    ids = BpeDropout(tokenizer, 1.0).encode("announce its decision", stream())
    assert len(ids) == len("announce its decision") + (tokenizer.engine.file_name == "tokenizer.model")


def test_dropout_lengthens_as_the_librarys_own_does():
    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=420), CORPUS)
    settings_ = json.loads(tokenizer.engine.content)
    settings_["model"]["dropout"] = 0.2
    theirs = Backend.from_str(json.dumps(settings_))
    text = " ".join(CORPUS)
    ours = [len(BpeDropout(tokenizer, 0.2).encode(text, stream(seed))) for seed in range(4)]
    peers = [len(theirs.encode(text).ids) for _ in range(4)]
    assert np.mean(ours) > len(tokenizer.encode(text)) * 1.1
    # thousands of tokens each: run to run the means differ by about 0.5 %
    assert np.mean(ours) == pytest.approx(np.mean(peers), rel=0.03)


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_tokenizer_without_merges_is_refused(kind):
    with pytest.raises(UserError, match="cannot follow this tokenizer"):
        BpeDropout(train_tokenizer(TokenizerConfig(kind=kind), CORPUS), 0.1)


def test_the_pipeline_gives_ids_when_the_tokenizer_is_varied(tokenizer):
    augment = make({"name": "bpe_dropout", "rate": 0.3, "documents": 0.5})
    versions = augment.versions(DOCUMENTS, 1, tokenizer)
    varied = [v for v in versions if v.token_ids is not None]
    assert 8 < len(varied) < 32 and all(v.text == text for v, text in zip(versions, CORPUS, strict=True))
    assert all(tokenizer.decode(v.token_ids) == v.text and v.steps[-1]["name"] == "bpe_dropout" for v in varied)
    assert augment.versions(DOCUMENTS[::-1], 1, tokenizer)[::-1] == versions


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5])
def test_dropout_counts_the_tokens_it_changed_and_no_version_where_it_changed_none(tokenizer, rate):
    augment = make({"name": "bpe_dropout", "rate": rate})
    versions = augment.versions(DOCUMENTS, 1, tokenizer)
    places = lambda ids: [(sum(map(len, pieces[:n])), piece) for pieces in [[*map(tokenizer.token_bytes, ids)]]
                          for n, piece in enumerate(pieces)]
    for version, text in zip(versions, CORPUS, strict=True):
        usual, changed = tokenizer.encode(text), sum(step["changed"] for step in version.steps)
        varied = usual if version.token_ids is None else version.token_ids
        assert changed == len(set(places(varied)) - set(places(usual))) and (changed > 0) == (varied != usual) == bool(version.steps)
    assert len({v.token_ids is None for v in versions}) == (2 if rate == 0.02 else 1)
    [entry] = augment.describe()
    assert (entry["name"], entry["changed"]) == ("bpe_dropout", sum(step["changed"] for v in versions for step in v.steps))
