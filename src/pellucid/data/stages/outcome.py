"""What a stage says about one text: the text to go on with, or the reason why it goes no further."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """Exactly one of the two is None."""

    text: str | None
    reason: str | None
