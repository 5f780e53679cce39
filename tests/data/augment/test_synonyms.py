"""Lexicons and the gates between a word and its synonym: a small lexicon worked by hand, and the real ones."""

import numpy as np
import pytest

from pellucid.config import UserError
from pellucid.data.augment.lexicons import Sense, open_source
from pellucid.data.augment.synonyms import Insertion, Lookup, Synonyms


def stream(seed=0):
    return np.random.Generator(np.random.Philox(seed))


TABLE = {
    "doctor": [Sense("n", ("physician",), 90), Sense("v", ("repair",), 2)],
    "physician": [Sense("n", ("doctor",), 40)],
    "repair": [Sense("v", ("doctor", "mend"), 50)],
    "bank": [Sense("n", ("slope",), 25), Sense("n", ("lender",), 20)],  # which of the two?
    "run": [Sense("v", ("sprint",), 50), Sense("n", ("sprint",), 40)],  # verb or noun?
    "car": [Sense("n", ("auto", "machine", "motor car", "Wagon", "cr"), 70)],
    "machine": [Sense("n", ("device",), 30), Sense("n", ("car",), 1)],  # its own first sense is another
    "cr": [Sense("n", ("car",), 3)],
    "big": [Sense("a", ("large",), 100)],
    "large": [Sense("a", ("big",), 100)],
    "found": [Sense("v", ("start",), 9)],
    "start": [Sense("v", ("found",), 9)],
}


class Small:
    """The senses above."""

    fingerprint = "small"

    def senses(self, word):
        return TABLE.get(word, [])

    def is_inflected(self, word):
        return word == "found"


@pytest.mark.parametrize("word, synonyms, why", [
    ("doctor", ("physician",), ""),  # 90 of 92 uses are the noun's
    ("big", ("large",), ""),
    ("run", (), "part of speech uncertain"),
    ("bank", (), "sense uncertain"),
    ("car", (), "no fitting synonym"),  # a vowel, another first sense, two words, a name, an abbreviation
    ("found", (), "inflected"),
    ("the", (), "function word"),
    ("zebra", (), "unknown"),
])  # fmt: skip
def test_each_gate_refuses_what_it_is_for(word, synonyms, why):
    assert Lookup(Small(), 0.8)(word) == (synonyms, why)


def test_capitals_and_layout_stay_and_names_are_left_alone():
    augment = Synonyms(Lookup(Small(), 0.8), 1.0)
    text = "Doctor!  The big\tDOCTOR met\n\n  a Doctor, Mr. Big. Big it was"
    outcome = augment(text, stream())
    assert outcome.text == "Physician!  The large\tPHYSICIAN met\n\n  a Doctor, Mr. Big. Large it was"
    assert outcome.changed == 4 and outcome.rejected["name"] == 3  # Mr. counts as one


def test_insertion_puts_synonyms_of_the_sentence_before_its_words():
    outcome = Insertion(Lookup(Small(), 0.8), 1.0)("The big doctor came.", stream())
    words = outcome.text.split()
    assert [w for w in words if w not in ("large", "physician")] == "The big doctor came.".split()
    assert outcome.changed == len(words) - 4 == 3


def test_wordnet_gives_the_synonyms_it_is_known_for(wordnet):
    assert Lookup(wordnet, 0.8)("physician")[0] == ("doctor",)
    assert "auto" in Lookup(wordnet, 0.8)("automobile")[0]
    first = wordnet.senses("dog")[0]
    assert first.part == "n" and "domestic dog" in first.synonyms and first.count == 42  # cntlist.rev of WordNet 3.0
    assert wordnet.is_inflected("found") and not wordnet.is_inflected("physician")


def test_gates_keep_wordnet_from_its_known_blunders(wordnet):
    lookup = Lookup(wordnet, 0.8)
    assert lookup("while")[0] == ()  # the noun: "spell", "patch"
    assert "freshly" not in lookup("new")[0]
    assert [lookup(word) for word in ("holding", "projecting", "studied", "planned", "glasses")] == [((), "inflected")] * 5
    assert lookup("well")[0] == () and lookup("year")[0] == ()  # "yr"


def test_mythes_reads_parts_of_speech_and_leaves_related_terms_out(need):
    source = open_source("mythes", need("/usr/share/mythes/th_en_US_v2.dat", "mythes-en-us"))
    quick = source.senses("quick")
    assert quick[1] == Sense("a", ("flying", "fast"))  # "hurried (similar term)" is not a synonym
    assert Lookup(source, 0.8)("unbearable")[0] == ("intolerable", "unendurable")
    assert Lookup(source, 0.8)("quick") == ((), "part of speech uncertain")


def test_moby_reads_a_head_and_its_synonyms_per_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("big,large,great big\nlarge,big\n")
    assert Lookup(open_source("moby", str(path)), 0.8)("big") == (("large",), "")


@pytest.mark.parametrize("kind, content, sentence", [
    ("wordnet", None, "apt-get install wordnet-base"), ("mythes", None, "apt-get install mythes-en-us"),
    ("mythes", "UTF-8\nno bar here\n", "not in the mythes format"), ("moby", "", "not in the moby format"),
])  # fmt: skip
def test_a_missing_or_wrong_lexicon_is_one_sentence(tmp_path, kind, content, sentence):
    path = tmp_path / "lexicon"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_source(kind, str(path))
