"""What every measurement gives: sentences, numbers with intervals, tables, charts; as JSON, as pictures, as HTML.

The JSON says everything; pictures and the section of the report are drawn from it, at once or later.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from pellucid.config import UserError
from pellucid.measure.chart import draw

ORDER = ("context", "experts", "diversity", "robustness", "scaling", "capacity")
FORMAT = 1


@dataclass
class Outcome:
    """One measurement's result. numbers: all of it, with seeds and intervals; findings: what it says, in sentences."""

    name: str
    title: str
    settings: dict[str, Any]
    findings: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)  # title, columns, rows
    charts: list[dict[str, Any]] = field(default_factory=list)  # see chart.py
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        made = datetime.now(UTC).isoformat(timespec="seconds")
        return _strict({"format": FORMAT, "made": made, **asdict(self)})


def save(outcome: Outcome, folder: Path) -> Path:
    """NAME.json, NAME.html (a page of its own) and NAME-1.svg, ... in the folder; returns the JSON's path."""
    result = outcome.as_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for number, chart in enumerate(result["charts"], start=1):
        replace(folder / f"{outcome.name}-{number}.svg", draw(chart))
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(outcome.title)}</title>'
            "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem}"
            "table{border-collapse:collapse}td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
            f"td:first-child,th:first-child{{text-align:left}}</style>{section(result)}</html>\n")
    replace(folder / f"{outcome.name}.html", page)
    replace(folder / f"{outcome.name}.json", json.dumps(result, indent=1) + "\n")
    return folder / f"{outcome.name}.json"


def section(result: dict[str, Any]) -> str:
    """One measurement (its JSON) as an HTML fragment: sentences, pictures, tables; self-contained, no script."""
    parts = [f'<section class="measurement" id="measure-{escape(result["name"])}"><h2>{escape(result["title"])}</h2>']
    parts += [f"<p>{escape(sentence)}</p>" for sentence in result["findings"]]
    parts += [f"<figure>{draw(chart)}</figure>" for chart in result["charts"]]
    for table in result["tables"]:
        head = "".join(f"<th>{escape(str(name))}</th>" for name in table["columns"])
        rows = "".join("<tr>" + "".join(f"<td>{escape(shown(cell))}</td>" for cell in row) + "</tr>" for row in table["rows"])
        parts.append(f"<h3>{escape(table['title'])}</h3><table><tr>{head}</tr>{rows}</table>")
    return "".join(parts) + "</section>"


def sections(run_dir: str | Path) -> list[str]:
    """The sections of all measurements stored with a run (RUN/measure/*.json), for its report. Raises UserError."""
    folder, found = Path(run_dir) / "measure", []
    for name in ORDER:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_bytes())
            found.append(section(result))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a measurement this version can read ({error!r}); measure again") from None
    return found


def shown(value: Any) -> str:
    """A table's cell in words."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def spread(interval: dict[str, float], digits: int = 3) -> str:
    """'2.310 (2.290 to 2.331)'."""
    if not math.isfinite(interval["low"]):
        return f"{interval['mean']:.{digits}f} (no interval from one document)"
    return f"{interval['mean']:.{digits}f} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"


def replace(path: Path, text: str) -> None:
    """Write a file so that it is the old or the new one, never half."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _strict(value: Any) -> Any:
    """The same with None for what JSON has no word for (NaN, infinity)."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
