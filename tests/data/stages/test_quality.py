"""Quality rules at their thresholds (a value equal to its threshold passes), on texts made to sit there."""

import pytest

from pellucid.config import FineWebFilter, GopherQualityFilter, LengthFilter
from pellucid.data.stages.quality import fineweb, gopher_quality, length
from pellucid.data.stages.textview import TextView

PROSE = ["the", "ship", "went", "and", "came", "over", "wide", "open", "seas", "soon"]


def words(count: int, **replace: str) -> list[str]:
    return [replace.get(f"w{n}", PROSE[n % 10]) for n in range(count)]


def quality(text: str, **limits) -> str | None:
    return gopher_quality(TextView(text), GopherQualityFilter(**limits))


def test_number_of_words():
    assert quality(" ".join(words(49))) == "too few words"
    assert quality(" ".join(words(49)) + " ...") == "too few words"  # a symbol is no word
    assert quality(" ".join(words(50))) is None
    assert quality(" ".join(words(60)), max_words=60) is None
    assert quality(" ".join(words(61)), max_words=60) == "too many words"


def test_mean_word_length():
    assert quality(" ".join(["the", "and"] * 30)) is None  # exactly 3
    assert quality(" ".join(["the", "and"] * 30 + ["a"])) == "words too short"
    ten = ["the", "and", "a" * 17, "b" * 17]  # mean 10
    assert quality(" ".join(ten * 15)) is None
    assert quality(" ".join([*ten * 15, "c" * 11])) == "words too long"


@pytest.mark.parametrize(("sign", "reason"), [
    ("#", "too many hash signs"), ("...", "too many ellipses"), ("…", "too many ellipses")])
def test_symbols_per_word(sign, reason):
    assert quality(" ".join([*[sign] * 10, *words(90)])) is None  # 10 of 100
    assert quality(" ".join([*[sign] * 11, *words(90)])) == reason


def test_bullets_and_ellipses_at_line_ends():
    line = "the ship and the sea were seen"
    lines = [f"- {line}"] * 9 + [line]
    assert quality("\n".join(lines)) is None  # nine of ten
    assert quality("\n".join([f"  • {line}"] * 10)) == "too many bullets"
    full = "the ship and the sea were seen from far away by most of us"
    assert quality("\n".join([full + "..."] * 3 + [full] * 7)) is None
    assert quality("\n".join([full + " … "] * 4 + [full] * 6)) == "too many lines that end in an ellipsis"


def test_words_with_letters():
    assert quality(" ".join([*words(80), *["1234"] * 20])) is None
    assert quality(" ".join([*words(79), *["1234"] * 21])) == "too few words with letters"
    assert quality(" ".join([*words(79), *[","] * 21])) == "too few words with letters"


def test_stop_words():
    plain = ["ship"] * 60
    assert quality(" ".join(plain)) == "too few stop words"
    assert quality(" ".join([*plain, "the", "the"])) == "too few stop words"  # two different ones
    assert quality(" ".join([*plain, "The", "of"])) == "too few stop words"  # as in the paper: case counts
    assert quality(" ".join([*plain, "the.", "(of)"])) is None
    assert quality(" ".join([*plain, "the", "have-not"])) is None
    assert quality(" ".join([*plain, "the", "behave"])) == "too few stop words"
    assert quality(" ".join([*plain, "the", "that's"])) == "too few stop words"


def test_length_in_characters():
    limits = LengthFilter(min_characters=3, max_characters=5)
    assert [length(TextView("é" * n), limits) for n in (2, 3, 5, 6)] == ["too short", None, None, "too long"]


LONG = "The ship went over the wide and open seas and came back soon enough"


def web(lines: list[str], **limits) -> str | None:
    return fineweb(TextView("\n".join(lines)), FineWebFilter(**limits))


def test_lines_that_end_a_sentence():
    lines = [f"{LONG} number {n}" for n in range(25)]
    assert web([*(line + "." for line in lines[:3]), *lines[3:]]) is None  # 3 of 25 = 0.12
    assert web([*(line + "." for line in lines[:2]), *lines[2:]]) == "too few lines end a sentence"
    assert web([*(line + "。" for line in lines[:3]), *lines[3:]]) is None
    assert web([" ", "", "\t"]) == "empty"


def test_short_lines():
    short = [f"line {n:02d} has thirty characters"[:29] + "." for n in range(67)]
    assert {len(line) for line in short} == {30}
    long = [f"{LONG} number {n}." for n in range(33)]
    assert web([*short, *long]) is None  # 67 of 100
    assert web([*short, short[0][:-3] + "x.", *long[1:]]) == "too many short lines"
    assert web([*short, *long], short_line=29) is None


def test_characters_in_repeated_lines():
    lines = [f"A line of some forty characters, no. {n}." for n in range(10, 19)]
    assert {len(line) for line in lines} == {40}
    assert web([*lines, lines[0]]) is None  # 40 of 400
    assert web([*lines[:8], lines[0]]) == "characters in repeated lines"
    assert web([*lines, lines[0]], max_duplicate_characters=0.01) == "characters in repeated lines"


def test_line_breaks_per_word():
    lines = ["Unbelievably longwinded circumlocutions."] + [f"Uncharacteristically longwinded{n} word." for n in range(9)]
    assert web(lines, max_newlines_per_word=9 / 40) is None  # 9 breaks, 40 words and full stops
    assert web(lines, max_newlines_per_word=0.22) == "too many line breaks"
