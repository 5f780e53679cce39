"""docs/telemetry.md tells the truth: its queries run and agree with each other, its tables are those of the file."""

import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest

import pellucid
from pellucid.observe.export import export
from pellucid.observe.reader import Reader

PAGE = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def answers(run_dir):
    run = sqlite3.connect(run_dir / "run.sqlite")
    found = [run.execute(query).fetchall() for query in blocks("sql")]
    run.close()
    return found


def test_four_queries_answer_with_sqlite_as_the_reader_does(answers, run_dir):
    worst, changed, idle, stages = answers
    with Reader(run_dir) as run:
        losses = run.series("run", "loss", stream="run")[1]
        ratios = {row["name"]: run.series(row["name"], "update_ratio")[1][-1] for row in run.rows("param") if row["expert"] is None}
        loads = run.frames("router")[1][:, :, [s["name"] for s in run.stats("router")].index("load")].astype(np.float64)
    assert [row[1] for row in worst] == sorted(losses.tolist(), reverse=True)[:10]
    del ratios["all"]
    assert [row[1] for row in changed] == sorted((float(r) for r in ratios.values()), reverse=True)[:10]
    assert [row[2] for row in idle] == pytest.approx(sorted(loads.mean(0))[:10])
    train = pellucid.Run(run_dir).dataset().train
    assert [row[0] for row in stages] == ["read", "normalize", "split", "tokenize", "pack"]
    assert stages[-1][-1] == pytest.approx(train.plan.tokens / (64 * len(train)))


def test_duckdb_answers_the_same_from_parquet(answers, run_dir, tmp_path, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(export(run_dir, "parquet", tmp_path / "parquet"))
    for query, expected in zip(blocks("duckdb"), answers[:3], strict=True):
        for row, other in zip(duckdb.sql(query).fetchall(), expected, strict=True):
            assert row == tuple(pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for v in other)


def test_the_page_names_every_table_with_its_columns_and_every_stream(run_dir):
    run = sqlite3.connect(run_dir / "run.sqlite")
    lines = re.findall(r"^\| `(\w+)`(?: \(view\))? \| ([\w, ]+) \|", PAGE, re.MULTILINE)
    named = {name: columns.split(", ") for name, columns in lines}
    tables = [name for (name,) in run.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    for table in tables:
        assert named[table] == [column[1] for column in run.execute(f"PRAGMA table_info({table})")], table
    streams = {name for (name,) in run.execute("SELECT name FROM stream")}
    assert streams <= set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    run.close()


def test_python_example_runs(run_dir):
    (example,) = blocks("python")
    scope: dict = {}
    exec(example.replace("runs/demo", str(run_dir)), scope)
    assert len(scope["steps"]) == len(scope["frames"]) and scope["parts"].shape[1] == 6
