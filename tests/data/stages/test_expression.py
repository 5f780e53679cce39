"""The user's own rule: what it can say, and that it can do nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.config import UserError
from pellucid.data.stages.expression import VARIABLES, compile_expression
from pellucid.data.stages.textview import TextView

VIEW = TextView("The cat sat.\nThe cat sat.\nA dog barked, twice!")  # 10 words, 4 symbols, 46 characters


@pytest.mark.parametrize("rule", [
    "words == 10 and symbols == 4", "characters == 46", "lines == 3", "bytes >= characters",
    "mean_word_length == 33 / 10", "mean_line_length == (12 + 12 + 20) / 3", "repeated_lines == 1 / 3",
    "distinct_words == 0.7", "alphabetic_words == 10 / 14", "not (words < 10 or words > 10)", "1 < words <= 10 < 11",
    "-words + 20 == words", "words * 2 - 1 == 19", "True", "language in ('en', 'de') or words > 0", "language != 'xx'",
])
def test_true_rules_keep(rule):
    assert compile_expression(rule)(VIEW) is None
    assert compile_expression(f"not ({rule})")(VIEW) == "expression"


def test_dividing_by_zero_says_nothing():
    judge = compile_expression("characters / words < 100 and words / symbols >= 0")
    assert judge(TextView("")) == judge(TextView("no symbols")) == "expression undefined"


def test_every_variable_has_a_value_for_every_text():
    for text in ("", " \n", "a", "漢字", "!!!", "x" * 5000):
        for name, (meaning, value) in VARIABLES.items():
            assert meaning and isinstance(value(TextView(text)), str if name == "language" else int | float)


@pytest.mark.parametrize("rule", [
    "__import__('os').system('true')", "words.__class__", "(lambda: 1)()", "[w for w in words]", "words if 1 else 2",
    "words := 3", "9 ** 9", "'a' * 9 > 1", "words[0] > 1", "f'{words}' == 'x'", "words", "'en'", "1", "", "words >",
    "language > 'a'", "language in words", "words in (1, 2)", "language == 3", "words is 3", "words == True", "x > 1",
    "words > 1; words", "not words", "words and 1", "()", "language in ()", "-language == 'en'", "words % 2 == 0",
    "(" * 300 + "words" + ")" * 300, "not " * 450 + "True" * 1, "words > 1" + " and words > 1" * 500, "\0", "await words",
    "words > 1j", "language == b'en'", "words > ...", "print(words) > 1", "words << 2 > 1",
])
def test_everything_else_is_one_sentence(rule):
    try:
        compile_expression(rule)(VIEW)
    except UserError as error:
        assert str(error).startswith("data.filter.expression: ") and "\n" not in str(error).replace(rule, "")
    else:
        assert rule.startswith("not not")  # long, but a rule


def test_a_misspelt_variable_is_told_the_nearest():
    with pytest.raises(UserError, match="'word', which is no variable; did you mean 'words'"):
        compile_expression("word > 3")


@given(st.text(st.sampled_from("words()<>=! 12.andornot'[]+-*/,:_\\"), max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_text_is_a_rule_or_a_sentence(rule):
    try:
        assert compile_expression(rule)(VIEW) in (None, "expression", "expression undefined")
    except UserError:
        pass
