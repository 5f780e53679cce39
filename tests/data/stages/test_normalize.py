"""Normalization: what each switch does, that doing it twice changes nothing, and what counts as personal data."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.config import NormalizeConfig, UserError
from pellucid.data.stages import normalize as module
from pellucid.data.stages.normalize import normalize, normalize_text
from pellucid.data.stages.privacy import luhn, mask

OFF = {"unicode": "none", "line_ends": False, "control_characters": False}


def only(text: str, **on) -> str:
    return normalize(text, NormalizeConfig(**OFF | on))


def test_each_step_does_its_own_work():
    text = "e\u0301 \ufb01\r\na\rb\x00\x1b\x85\tc\x7f\n"
    assert only(text) == text
    assert only(text, unicode="NFC") == text.replace("e\u0301", "é")
    assert only(text, unicode="NFKC") == text.replace("e\u0301 \ufb01", "é fi")
    assert only(text, line_ends=True) == "e\u0301 \ufb01\na\nb\x00\x1b\x85\tc\x7f\n"
    assert only(text, control_characters=True) == "e\u0301 \ufb01\r\na\rb\tc\n"
    assert only("“It’s” ‘so’ „low‟ «no»", quotes=True) == "\"It's\" 'so' \"low\" «no»"
    assert only("ÉTÉ ΣΑΣ İ", lowercase=True) == "été σας i̇"
    assert only("«Well—don't», e.g. 50% $5 <b>!", punctuation=True) == "Welldont eg 50 $5 <b>"


def test_white_space_is_trimmed_or_collapsed():
    text = "\n\n  a\u00a0\u2003b  c \t\n \n\n\n\td \n"
    assert only(text, whitespace="trim") == "  a  b  c\n\n\td"
    assert only(text, whitespace="collapse") == "a b c\n\nd"


def test_repair_undoes_a_wrong_decoding_and_nothing_else():
    pytest.importorskip("ftfy")
    assert only("schÃ¶n âœ”", repair=True) == "schön ✔"
    untouched = "“curly” ﬁ ｆｕｌｌ &amp; e\u0301 \x0b naïve à la carte\r\n"
    assert only(untouched, repair=True) == untouched


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    module._ftfy.cache_clear()
    with pytest.raises(UserError, match=r"data.normalize.repair: ftfy is not installed; pip install"):
        only("x", repair=True)
    module._ftfy.cache_clear()


SWITCHES = st.fixed_dictionaries({
    "unicode": st.sampled_from(["NFC", "NFKC", "none"]), "line_ends": st.booleans(), "control_characters": st.booleans(),
    "quotes": st.booleans(), "whitespace": st.sampled_from(["keep", "trim", "collapse"]), "lowercase": st.booleans(),
    "punctuation": st.booleans()})


@given(st.text() | st.text("aÉe\u0301\u0130.-'“ \u00a0\t\r\n\x00ﬁ", max_size=20), SWITCHES)
@settings(deadline=None)
def test_normalizing_twice_is_normalizing_once(text, switches):
    config = NormalizeConfig(**switches)
    once = normalize(text, config)
    assert normalize(once, config) == once


@pytest.mark.parametrize("text", ["\u200b\u200b", "\ufeff", "\u2060 \u00ad", "\u2028\u200e\n"])
def test_documents_without_a_visible_character_are_dropped(text):
    assert normalize_text(text, NormalizeConfig()) == (None, "empty")
    for visible in ("a", "\u0301", "数", "😀", ".", "\ue000", "\U0001fae9"):  # the last: private, and too new for Python
        assert normalize_text(text + visible, NormalizeConfig()) == (text + visible, None)


def test_empty_documents_are_dropped():
    assert normalize_text(" \n\t\u00a0", NormalizeConfig()) == (None, "empty")
    assert normalize_text("", NormalizeConfig()) == (None, "empty")
    assert normalize_text("a\r\n", NormalizeConfig()) == ("a\n", None)


@pytest.mark.parametrize(("kind", "found"), [
    ("email", "jane.doe+list@mail.example.co.uk"), ("email", "a@b.org"),
    ("ip", "8.8.8.8"), ("ip", "93.184.216.34"), ("ip", "2606:2800:220:1:248:1893:25c8:1946"), ("ip", "2001:4860:4860::8888"),
    ("phone", "+44 20 7946 0958"), ("phone", "(555) 010-1234"), ("phone", "555-010-1234"), ("phone", "+1-202-555-0143"),
    ("phone", "+4930901820"), ("phone", "1 800 555 0199"),
    ("card", "4111 1111 1111 1111"), ("card", "5500-0000-0000-0004"), ("card", "378282246310005"),
    ("card", "6011000990139424"),
])
def test_personal_data_is_masked(kind, found):
    assert mask(f"It is {found}, he said ({found}). {found}", [kind]) == \
        f"It is <{kind}>, he said (<{kind}>). <{kind}>"
    assert mask(f"It is {found}.", {"email", "ip", "phone", "card"}) == f"It is <{kind}>."
    assert mask(found, []) == found


@pytest.mark.parametrize("text", [
    "on 2024-01-31 at 10:20:30", "version 1.2.3", "999.8.8.8", "1.2.3.4.5", "192.168.0.1 and 10.0.0.7",
    "127.0.0.1 ::1 fe80::1",
    "user @ host", "@name", "f(x)@", "4111 1111 1111 1112", "ISBN 978-3-16-148410-0", "3.14159 26535 89793", "12:34:56",
    "std::vector::size", "0x5500000000000004", "pages 100-200", "1,000,000 or 555-0101", "2**10 = 1024", "call 911",
    "1234567890123", "a::b", "sum = 555 + 010 - 1234", "matrix[1][2]",
])
def test_what_only_looks_like_it_stays(text):
    assert mask(text, ["email", "ip", "phone", "card"]) == text


def test_the_checksum_of_cards():
    """The worked example of ISO/IEC 7812-1's annex, and every single wrong digit of it."""
    number = "79927398713"
    assert luhn(number)
    wrong = [number[:i] + d + number[i + 1 :] for i in range(11) for d in "0123456789" if d != number[i]]
    assert not any(map(luhn, wrong))
