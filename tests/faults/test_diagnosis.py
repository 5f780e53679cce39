"""Planted faults are found through the real loop, a healthy run is left in peace, and the published table is today's."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def suite():
    """bench/faults.py and bench/diagnosis.py."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("faults"), importlib.import_module("diagnosis")
    finally:
        sys.path.remove(str(ROOT / "bench"))


@pytest.mark.parametrize("case", ["frozen expert", "ghost decay", "NaN in a batch"])
def test_a_planted_fault_is_found_in_time(case, suite, tmp_path):
    faults, _ = suite
    verdict = faults.run_case(case, 0, 0, tmp_path, unseen=False)
    assert verdict.found is not None and verdict.found <= faults.FAULTS[case].deadline, verdict
    assert verdict.before == [], "an alarm before anything was wrong"


def test_a_healthy_run_has_no_alarm(suite, tmp_path):
    faults, _ = suite
    verdict = faults.run_case("healthy", 100, 1, tmp_path, unseen=False)
    assert verdict.before == []


def test_the_published_table_is_that_of_these_rules_and_of_its_results(suite):
    """Whoever changes a rule or a limit runs the evaluation again."""
    _, diagnosis = suite
    report = json.loads(diagnosis.RESULTS.read_text())
    assert report["rules"] == diagnosis.fingerprint()
    assert diagnosis.table(report) in diagnosis.PAGE.read_text(encoding="utf-8")
    known = {case for case, _, _ in diagnosis.cases(unseen=True)}
    assert {run["case"] for run in report["runs"]} <= known
