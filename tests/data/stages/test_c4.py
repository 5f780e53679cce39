"""C4's rules, one at a time, on lines made for them."""

import pytest

from pellucid.config import C4Filter
from pellucid.data.stages.c4 import c4, count_sentences
from pellucid.data.stages.textview import TextView

GOOD = [f"This is sentence number {n}." for n in range(5)]


def run(*lines: str, **rules) -> tuple[str | None, str | None]:
    return tuple(c4(TextView("\n".join([*GOOD, *lines])), C4Filter(**rules)))


def kept(*lines: str, **rules) -> list[str]:
    text, reason = run(*lines, **rules)
    assert reason is None
    return text.split("\n")[len(GOOD):]


def test_lines_must_end_as_sentences_do():
    ends = ["It ends here.", "Does it end?", "It ends now!", 'He said "the end"', "She said 'the end'"]
    assert kept(*ends, "This one does not", "This one trails off...", "Nor this one;") == ends
    assert kept("This one does not", terminal_punctuation=False) == ["This one does not"]


def test_lines_need_three_words_of_at_most_a_thousand_characters():
    assert kept("One two.", "One two three.") == ["One two three."]
    assert kept("One two.", min_words_per_line=2) == ["One two."]
    fits, too_long = f"This word {'x' * 999}.", f"This word {'x' * 1000}."
    assert kept(too_long, fits) == [fits]


def test_citations_are_removed():
    assert kept("It is so[1] they say.[citation needed]", "See the end.[edit]") == ["It is so they say.", "See the end."]
    assert kept("It is so[1] they say.", citations=False) == ["It is so[1] they say."]
    assert kept("Empty brackets[] go too.") == ["Empty brackets go too."]


def test_lines_about_javascript_and_policies_are_removed():
    lines = ["Please enable JavaScript to go on.", "Read our Privacy Policy first.", "This page uses cookies as all do."]
    assert kept(*lines) == []
    assert kept(*lines, javascript=False, policy=False) == lines


@pytest.mark.parametrize(("line", "reason", "rule"), [
    ("Lorem ipsum dolor sit amet.", "lorem ipsum", "lorem_ipsum"),
    ("A set {a, b} of two.", "curly bracket", "curly_bracket")])
def test_pages_are_dropped(line, reason, rule):
    assert run(line) == (None, reason)
    assert kept(line, **{rule: False}) == [line]


def test_lines_that_are_removed_do_not_condemn_the_page():
    assert kept("{", "lorem ipsum") == []  # the order of the authors' code: neither line gets so far


def test_number_of_sentences():
    judge = lambda text, **rules: c4(TextView(text), C4Filter(**rules)).reason
    assert judge("\n".join(GOOD)) is None
    assert judge("\n".join(GOOD[:4])) == "too few sentences"
    assert judge(" ".join(GOOD)) is None  # five on one line
    assert judge("\n".join(GOOD[:3]), min_sentences=3) is None
    assert judge("no sentence", min_sentences=0) == "no line is a sentence"


def test_sentences_of_a_line_by_hand():
    assert count_sentences("One. Two! Three? Four.") == 4
    assert count_sentences("Mr. Brown met J. S. Bach, i.e. the composer, at 3.15 p.m. sharp.") == 1
    assert count_sentences('"Is it so?" he asked. "Yes."') == 3
    assert count_sentences("Wait... what?!") == 2
    assert count_sentences("The fury of Glengarry . . . rapidly abated.") == 1
    assert count_sentences("") == count_sentences("  ") == 0
