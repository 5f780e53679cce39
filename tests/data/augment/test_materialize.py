"""What is stored: originals, versions, records; held-out documents untouched; records of parts add up."""

import json

import pytest

from pellucid.config import DataConfig, TokenizerConfig, UserError
from pellucid.data.augment.identity import identity, materialized
from pellucid.data.augment.materialize import Item, Materializer, merged
from pellucid.data.augment.pipeline import open_translator
from pellucid.data.document import Document
from pellucid.data.tokenizer_training import train_tokenizer

TEXTS = [f"Some words of document number {n}, and a few more." for n in range(30)]
BATCH = [Item(Document(text, "a.txt", 0, n, n * 50, n * 50 + 50, exact=True), bytes([n]) * 16,
          "validation" if n % 5 == 0 else "train")
         for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(kind="bytes"), [])


def config(**settings) -> DataConfig:
    return DataConfig(augment=[{"name": "keyboard", "rate": 0.1, "documents": 0.5}], augment_epochs=2, **settings)


def test_originals_stay_changed_versions_follow_and_held_out_documents_are_untouched(tokenizer):
    work = Materializer(config())
    items = work.expand(BATCH, tokenizer)
    originals = [item for item in items if item.version is None]
    assert originals == BATCH
    versions = [item for item in items if item.version]
    assert 10 < len(versions) < 40 and {i.split for i in versions} == {"train"}
    for item in versions:
        parent = next(d for d, content_hash in ((b.document, b.content_hash) for b in BATCH) if content_hash == item.parent)
        record = json.loads(item.augmentation)
        assert item.document.text != parent.text and len(item.document.text) == len(parent.text)
        assert not item.document.exact and item.document.byte_start == parent.byte_start and record["epoch"] in (1, 2)
    record = work.record()
    assert record["documents_in"] == 48 and record["documents_out"] == len(versions)
    assert record["dropped"] == {"unchanged": 48 - len(versions)} and record["augmenters"][0]["changed"] > 0


def test_versions_instead_of_originals_lose_no_document(tokenizer):
    items = Materializer(config(augment_originals=False)).expand(BATCH, tokenizer)
    train = [item for item in items if item.split == "train"]
    assert len(train) == 2 * 24 and len(items) - len(train) == 6
    same = [i for i in train if i.augmentation is None]
    assert same and all(i.document.exact and i.document.text == TEXTS[i.document.ordinal] for i in same)


def test_parts_give_what_the_whole_gives(tokenizer):
    whole = Materializer(config())
    items = whole.expand(BATCH, tokenizer)
    expected = merged(config(), [whole.record()])
    records, pieces = [], []
    for start in (0, 7, 20):
        part = Materializer(config())
        pieces += part.expand(BATCH[start : {0: 7, 7: 20, 20: 30}[start]], tokenizer)
        records.append(part.record())
    assert pieces == items and merged(config(), records) == expected
    assert expected["name"] == "augment" and expected["settings"]["augment_epochs"] == 2


def test_identity_names_what_the_result_depends_on_and_fails_early(tmp_path):
    assert identity(DataConfig()) == [] and not materialized(DataConfig(augment=[{"name": "token_masking"}]))
    path = tmp_path / "words.txt"
    entry = {"name": "synonyms", "source": "moby", "path": str(path)}
    path.write_text("big,large\n")
    before = identity(DataConfig(augment=[entry]))
    path.write_text("big,huge\n")
    assert identity(DataConfig(augment=[entry])) != before
    with pytest.raises(UserError, match="cannot read a wordnet lexicon"):
        identity(DataConfig(augment=[{"name": "synonyms", "path": str(tmp_path / "none")}]))


@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
def test_a_changed_model_is_another_identity_and_asks_anew(tmp_path, engine):
    pytest.importorskip(engine)
    (tmp_path / "weights").write_bytes(b"one")
    entry = {"name": "back_translation", "engine": engine, "models": {"*": str(tmp_path)}}
    settings = DataConfig(augment=[entry], directory=str(tmp_path / "data"))
    before = identity(settings), open_translator(settings.augment[0]).fingerprint
    assert before == (identity(settings), open_translator(settings.augment[0]).fingerprint)
    (tmp_path / "weights").write_bytes(b"two")
    assert identity(settings) != before[0] and open_translator(settings.augment[0]).fingerprint != before[1]
