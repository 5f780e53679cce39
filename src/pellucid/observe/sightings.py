"""Which documents hold a text, and which steps of which runs saw them. Ties data/search.py to the runs on that data.

A run's order is a pure function of its seed, so the steps are computed, not looked up; the run's telemetry only says how
many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from pellucid.config import UserError
from pellucid.data.dataset import MANIFEST, Dataset
from pellucid.data.search import Found, Search, search
from pellucid.observe.reader import Reader
from pellucid.observe.trace import open_run

SHOWN = 12  # steps named in a line


@dataclass
class Sightings:
    """What was found in one folder of data. `steps[run][n]`: the steps of that run that saw found[n]'s places."""

    directory: str
    search: Search
    steps: dict[str, list[list[int]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"data": self.directory, **asdict(self.search), "steps": self.steps}


def find(text: str, places: Sequence[str | Path], *, limit: int = 20, progress: Callable[..., None] = lambda *call: None,
         ) -> list[Sightings]:
    """Search folders of prepared data and the data of runs; without places, the data of all runs in runs/.

    Raises UserError where a place is neither, or where there is nothing to search.
    """
    folders = [Path(place) for place in places] or sorted(path.parent for path in Path("runs").glob("*/config.toml"))
    if not folders:
        raise UserError("no runs in runs/ here: name runs, or folders of prepared data")
    found: dict[Path, Sightings] = {}
    for folder in folders:
        config, dataset = open_run(folder) if (folder / "config.toml").is_file() else (None, _data(folder))
        directory = dataset.directory.resolve()
        if directory not in found:
            found[directory] = Sightings(str(dataset.directory), search(dataset, text, limit=limit, progress=progress))
        if config is not None:
            split = dataset.split("train", config.training.seed)
            seen = _steps(split, found[directory].search.found, folder, config.training.batch_size)
            found[directory].steps[str(folder)] = seen
    return list(found.values())


def _data(folder: Path) -> Dataset:
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: neither a run nor a folder of prepared data")
    return Dataset(folder, verify=False)


def _steps(split: Any, found: list[Found], run: Path, batch_size: int) -> list[list[int]]:
    with Reader(run) as reader:
        recorded, _ = reader.series("run", "loss", stream="run")
    rows = {row for item in found if item.split == split.name for row in item.rows}
    steps = split.steps_of_rows(rows, int(recorded[-1]) + 1 if len(recorded) else 0, batch_size)
    return [sorted({step for row in item.rows for step in steps[row]} if item.split == split.name else ())
            for item in found]


def render(results: list[Sightings]) -> Text:
    """For the terminal."""
    text = Text()
    for result in results:
        counts = result.search
        text.append(f"{result.directory}: {counts.occurrences:,} places in {counts.documents:,} documents\n", style="bold")
        for number, item in enumerate(counts.found):
            where = f"bytes {item.byte_start}-{item.byte_end}" + ("" if item.exact else " (whole document)")
            kind = ", augmented" if item.augmented else ""
            text.append(f"{item.source} {where}", style="cyan")
            text.append(f"  {item.split} document {item.document}{kind}, {item.occurrences:,} times\n    ", style="dim")
            text.append(_line(item.before)).append(_line(item.text), style="bold yellow").append(_line(item.after) + "\n")
            for run, steps in result.steps.items():
                text.append(f"    {run}: {_named(steps[number], item.split)}\n", style="green" if steps[number] else "dim")
        if len(counts.found) < counts.documents:
            text.append(f"... and {counts.documents - len(counts.found):,} more documents (--limit)\n", style="dim")
    return text


def _line(part: str) -> str:
    return part.replace("\n", "⏎").replace("\t", " ")


def _named(steps: list[int], split: str) -> str:
    if not steps:
        return "held out" if split == "validation" else "not seen so far"
    more = f" ... {len(steps):,} in all" if len(steps) > SHOWN else ""
    return f"seen at step{'s' * (len(steps) > 1)} {', '.join(map(str, steps[:SHOWN]))}{more}"
