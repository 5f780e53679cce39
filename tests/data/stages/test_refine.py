"""Corpus passes over blocks on disk: what is left, what is recorded, and going on after a kill."""

from hashlib import blake2b

import pytest

from pellucid.config import DecontaminateConfig, DeduplicateConfig
from pellucid.data.blocks import BlockWriter
from pellucid.data.document import Document
from pellucid.data.stages.corpus import Deduplicate
from pellucid.data.stages.decontaminate import HeldOut
from pellucid.data.stages.refine import refine
from pellucid.data.stages.repeats import CutRepeats


def make_blocks(folder, texts: list[list[str]], splits: dict[str, str] | None = None):
    folder.mkdir()
    blocks = []
    for number, group in enumerate(texts):
        writer = BlockWriter(folder, f"{number:03d}")
        for ordinal, text in enumerate(group):
            split = (splits or {}).get(text, "train")
            writer.add(Document(text, f"f{number}", 0, ordinal, 0, len(text), True, split), text.encode(),
                       blake2b(text.encode(), digest_size=16).digest())
        blocks.append(writer.finish(last=True, files={"0": len(group)}))
    return blocks


def refine_one(blocks, stage, folder, progress):
    left, records = refine(blocks, [stage], folder, progress)
    return left, records[0]


def texts_of(blocks) -> list[list[str]]:
    return [[document.text for document, _ in block] for block in blocks]


def silent(*_):
    pass


TEXTS = [["one", "two", "one"], ["Two"], ["three", "one"]]


def test_blocks_of_what_is_left_keep_their_names_and_facts(tmp_path):
    blocks = make_blocks(tmp_path / "blocks", TEXTS)
    seen = []
    left, record = refine_one(blocks, Deduplicate(DeduplicateConfig(exact=True), tmp_path), tmp_path,
                          lambda *progress: seen.append(progress))
    assert [block.name for block in left] == ["000", "001", "002"]
    assert sorted(text.lower() for group in texts_of(left) for text in group) == ["one", "three", "two"]
    assert sum(block.facts["documents"] for block in left) == 3 and left[0].facts["files"] == {"0": 3}
    assert record["documents_in"] == 6 and record["dropped"] == {"exact duplicate": 3}
    assert seen[-1][1] == seen[-1][2] == 2 * 20


def test_a_finished_pass_is_used_again_and_an_unfinished_one_is_not(tmp_path, monkeypatch):
    blocks = make_blocks(tmp_path / "blocks", TEXTS)
    make = lambda: Deduplicate(DeduplicateConfig(exact=True), tmp_path)
    first, record = refine_one(blocks, make(), tmp_path, silent)
    fresh = make()
    monkeypatch.setattr(fresh, "see", None)
    again, same = refine_one(blocks, fresh, tmp_path, silent)
    assert texts_of(again) == texts_of(first) and same == record
    (tmp_path / "deduplicate" / "record.json").unlink()
    with pytest.raises(TypeError):
        refine_one(blocks, fresh, tmp_path, silent)


def test_texts_that_are_cut_get_a_new_hash(tmp_path):
    blocks = make_blocks(tmp_path / "blocks", [["a b c d e and so on"], ["before it a b c d e"]])
    left, _ = refine_one(blocks, CutRepeats(DeduplicateConfig(substring_words=5), tmp_path), tmp_path, silent)
    for block in left:
        for document, content_hash in block:
            assert content_hash == blake2b(document.text.encode(), digest_size=16).digest()
    assert sum(len(text.split()) for group in texts_of(left) for text in group) == 8 + 7 - 5


def test_training_documents_that_hold_held_out_text_leave(tmp_path):
    held, copy, clean = "a b c d e f", "it says: A b, c d!", "a b c x d e f"
    blocks = make_blocks(tmp_path / "blocks", [[copy, held], [clean, "short"]], {held: "validation"})
    is_held_out = lambda document, _: document.split == "validation"
    stage = HeldOut(DecontaminateConfig(held_out=True, ngram=4), tmp_path, is_held_out)
    left, record = refine_one(blocks, stage, tmp_path, silent)
    assert texts_of(left) == [[held], [clean, "short"]]
    assert record["dropped"] == {"shares text with held-out documents": 1}
    stage = HeldOut(DecontaminateConfig(held_out=True, ngram=3, max_overlap=0.5), tmp_path / "b", is_held_out)
    left, _ = refine_one(blocks, stage, tmp_path / "b", silent)
    assert texts_of(left) == [[copy, held], [clean, "short"]]  # 2 of 4 and 2 of 5 are not more than half
