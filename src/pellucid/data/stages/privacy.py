"""Picture 2, normalize: personal data that patterns can find: e-mail, IP addresses, telephone and card numbers.

A candidate found by a loose pattern is masked only if an exact check agrees: Luhn's checksum (ISO/IEC 7812) for
cards, a public address for IP. Names and street addresses cannot be found by patterns; this does not claim to.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
                   r"[A-Za-z]{2,24}(?![\w-])")
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")  # 2000::/3
PHONE = re.compile(
    r"(?<![\w.+/-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"  # +44 20 7946 0958
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # (555) 010-1234
    r")(?![\w-]|\.\d)")
CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\w-]|\.\d)"
                  r"|(?<![\w.-])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?![\w-]|\.\d)")


def mask(text: str, kinds: Iterable[str]) -> str:
    """The text with <email>, <ip>, <card> and <phone> in the place of what was found of the kinds asked for."""
    kinds = set(kinds)
    if "email" in kinds and "@" in text:
        text = EMAIL.sub("<email>", text)
    if "ip" in kinds:
        text = IPV4.sub(_public, text)
        if "::" in text or text.count(":") >= 7:
            text = IPV6.sub(_public, text)
    if "card" in kinds:  # before phones: a card's groups of four look like one
        text = CARD.sub(_card, text)
    if "phone" in kinds:
        text = PHONE.sub(_phone, text)
    return text


def luhn(digits: str) -> bool:
    """Luhn's checksum: from the right, every second digit doubled, digit sums add up to a multiple of ten."""
    return sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


def _public(match: re.Match[str]) -> str:
    try:
        return "<ip>" if ipaddress.ip_address(match[0]).is_global else match[0]
    except ValueError:
        return match[0]


def _card(match: re.Match[str]) -> str:
    digits = re.sub(r"\D", "", match[0])
    return "<card>" if 13 <= len(digits) <= 19 and luhn(digits) else match[0]


def _phone(match: re.Match[str]) -> str:
    return "<phone>" if 8 <= sum(map(str.isdigit, match[0])) <= 15 else match[0]  # ITU-T E.164: 15 at most
