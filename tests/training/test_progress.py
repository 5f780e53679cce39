"""What a person sees of a long stage: how far it is, what it counted, how long it will take."""

import io

import pytest
from rich.console import Console

from pellucid.training.progress import Shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_tells_its_counts_and_the_time_left(terminal):
    now, out = [0.0], io.StringIO()
    shown = Shown(Console(file=out, force_terminal=terminal, width=120, get_time=lambda: now[0], color_system=None))
    for second in range(21):  # a resumed stage: the first 100 of 200 were done before
        now[0] = float(second)
        shown.stage("reading", 100 + second, 200, f"{second} documents")
    shown.close()
    if terminal:
        assert "reading 20 documents" in out.getvalue() and "60 % left 0:01:20" in out.getvalue()
    else:
        assert out.getvalue().splitlines() == [
            "reading ...", "reading 55 % · 10 documents · left 0:01:30", "reading 60 % · 20 documents · left 0:01:20"]


def test_a_stage_of_unknown_length_tells_its_counts_alone():
    now, out = [0.0], io.StringIO()
    shown = Shown(Console(file=out, get_time=lambda: now[0]))
    for now[0] in (0.0, 12.0):
        shown.stage("dry steps", 0, None, "7 tokens")
    shown.close()
    assert out.getvalue().splitlines() == ["dry steps ...", "dry steps · 7 tokens"]


def test_where_only_the_answer_counts_a_stage_is_told_after_a_minute_and_not_at_once():
    out, now = io.StringIO(), [0.0]
    shown = Shown(Console(file=out, get_time=lambda: now[0], width=120), seconds=60.0, begin=False)
    for second in range(0, 150, 10):
        now[0] = float(second)
        shown.stage("measuring", second, 200, "0 of 2 jobs, 3 min left")
    shown.close()
    assert out.getvalue().splitlines() == [f"measuring {share} % · 0 of 2 jobs, 3 min left" for share in (30, 60)]
