"""Our filters drop what datatrove drops: its verdicts on small texts, stored by bench/filter_agreement.py --golden."""

import json
from pathlib import Path

import pytest

from pellucid.config import C4Filter, FineWebFilter, GopherQualityFilter, GopherRepetitionFilter
from pellucid.data.stages.c4 import c4
from pellucid.data.stages.quality import fineweb, gopher_quality
from pellucid.data.stages.repetition import gopher_repetition
from pellucid.data.stages.textview import TextView

CASES = json.loads(Path(__file__).with_name("filter_verdicts.json").read_text(encoding="utf-8"))["cases"]
JUDGES = {
    "gopher_quality": lambda view: gopher_quality(view, GopherQualityFilter()),
    "gopher_repetition": lambda view: gopher_repetition(view, GopherRepetitionFilter()),
    "c4": lambda view: c4(view, C4Filter()).reason, "fineweb": lambda view: fineweb(view, FineWebFilter()),
}


@pytest.mark.parametrize("name", JUDGES)
def test_verdicts_are_those_of_datatrove(name):
    differ = [case["name"] for case in CASES
              if (JUDGES[name](TextView(case["text"])) is None) != (case["verdicts"][name] is None)]
    assert differ == []


def test_the_stored_verdicts_reach_most_rules():
    reached = {verdict for case in CASES for verdict in case["verdicts"].values()}
    assert len(reached) >= 20
