"""How good the rules are: faults.py's planted faults and healthy runs, and the confusion table in docs/diagnosis.md.

    python bench/diagnosis.py --calibrate       # one small run of each fault and six healthy ones, to look at
    python bench/diagnosis.py                   # unseen seeds, shapes and texts -> results/diagnosis.json, docs/diagnosis.md
    python bench/diagnosis.py --table           # the page again, from the results
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import platform
import statistics
import subprocess
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "diagnosis.json", HERE.parent / "docs" / "diagnosis.md"
BEGIN, END = "<!-- made by bench/diagnosis.py from here -->", "<!-- to here -->"


def cases(unseen: bool, first_seed: int = 1000) -> list[tuple[str, int, int]]:
    """(case, seed, shape or number of the healthy run)."""
    from faults import FAULTS, UNSEEN_SHAPES

    if not unseen:
        return [("healthy", 100 + n, n) for n in range(6)] + [(name, 0, 0) for name in FAULTS]
    planted = [(name, first_seed + 100 * shape + i, shape) for shape in range(len(UNSEEN_SHAPES)) for i, name in enumerate(FAULTS)]
    healthy = [("healthy", first_seed + 500 + n, n) for n in range(24)]
    turns = itertools.zip_longest(planted[: len(FAULTS)], healthy)
    return [case for turn in turns for case in turn if case] + planted[len(FAULTS) :]


def fingerprint() -> str:
    """Of the thresholds and the rules that apply them; comments behind code do not count."""
    files = sorted((HERE.parent / "src" / "pellucid" / "observe").glob("rule*.py"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return hashlib.sha256("\n".join(line.partition("  #")[0].rstrip() for line in lines).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run, beginning with i; then --publish")
    parser.add_argument("--keep", type=Path, default=Path("diagnosis.jsonl"), help="finished runs: an interrupted evaluation goes on")
    parser.add_argument("--publish", action="store_true", help="results and page from what is kept")
    options = parser.parse_args()
    if options.table:
        write_page(json.loads(RESULTS.read_text()))
        return
    if not options.publish:
        part, parts = map(int, options.part.split("/"))
        jobs = [j for j in cases(not options.calibrate, options.first_seed) if not options.only or options.only in j[0]]
        run(jobs[part::parts], options.keep, unseen=not options.calibrate)
    if options.publish or not (options.calibrate or options.only or options.part != "0/1"):
        publish(kept(options.keep), options.first_seed)


def kept(path: Path) -> list[dict]:
    """Finished runs of today's rules."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["run"] for line in lines if line["rules"] == fingerprint()]


def run(jobs: list[tuple], path: Path, *, unseen: bool) -> None:
    from faults import run_case

    done = [(r["case"], r["seed"], r["shape"]) for r in kept(path)]
    for case, seed, shape in jobs:
        if (case, seed, shape) in done:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                verdict = dataclasses.asdict(run_case(case, seed, shape, Path(folder), unseen=unseen))
        except Exception:  # a mistake of the suite itself: told, not counted; the rest goes on
            traceback.print_exc()
            continue
        print(json.dumps(verdict), flush=True)
        with path.open("a") as file:
            file.write(json.dumps({"rules": fingerprint(), "run": verdict}) + "\n")


def publish(verdicts: list[dict], first_seed: int) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    report = {
        "command": f"python bench/diagnosis.py --first-seed {first_seed}", "commit": commit.stdout.strip(),
        "rules": fingerprint(), "machine": f"{platform.machine()}, one thread a run",
        "runs": sorted(verdicts, key=lambda r: (r["case"], r["seed"])),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    write_page(report)


def write_page(report: dict) -> None:
    """Replaces what stands between the marks in docs/diagnosis.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n\n" + table(report) + "\n" + END + after, encoding="utf-8")


def table(report: dict) -> str:
    from faults import FAULTS

    lines = ["| planted fault | found in time | after (steps) | deadline | spoke first | also spoke | false alarms before |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    in_time = total = 0
    reasons = []
    for name, fault in FAULTS.items():
        runs = [r for r in report["runs"] if r["case"] == name]
        good = [r for r in runs if r["found"] is not None and r["found"] <= fault.deadline]
        in_time, total = in_time + len(good), total + len(runs)
        after = ", ".join("never" if r["found"] is None else str(r["found"]) for r in runs)
        words = lambda values: ", ".join(sorted({v for v in values if v})) or "-"
        mark = f"[^{len(reasons) + 1}]" if fault.why else ""
        if fault.why:
            reasons.append(f"{mark}: {fault.why}")
        share = f"{len(good)} of {len(runs)}" if runs else "not measured yet"
        lines.append(f"| {name} | {share} | {after} | {fault.deadline}{mark} | {words(r['by'] for r in runs)} | "
                     f"{words(o for r in runs for o in r['others'])} | {sum(len(r['before']) for r in runs)} |")  # fmt: skip
    healthy = [r for r in report["runs"] if r["case"] == "healthy"]
    loud = [r for r in healthy if r["before"]]
    delays = [r["found"] for r in report["runs"] if r["found"] is not None]
    if len(runs_of := {(r["case"], r["seed"], r["shape"]) for r in report["runs"]}) < len(cases(True)):
        reasons.append(f"\nNot complete: {len(runs_of)} of {len(cases(True))} runs of the evaluation are in this table.")
    alarms = [f"- healthy run {r['shape']} (seed {r['seed']}): {text}" for r in healthy for text in r["before"]]
    warned = [f"- warning in healthy run {r['shape']} (seed {r['seed']}): {text}" for r in healthy for text in r["warnings"]]
    summary = (f"{in_time} of {total} planted faults were found in time, half of those found within {statistics.median(delays):.0f} "
               f"steps. {len(loud)} of {len(healthy)} healthy runs had an alarm, "
               f"{sum(bool(r['warnings']) for r in healthy)} a warning. (Commit {report['commit']}, {report['machine']}.)")  # fmt: skip
    return "\n".join([summary, "", *lines, "", *reasons, *([""] if reasons else []), *alarms, *warned, ""])


if __name__ == "__main__":
    main()
