"""Runs on a terminal, live: `pellucid watch --terminal`, for those on ssh. Reads run.sqlite only, so it works during a run,
after it, and after a kill. A trend line shows the highest value of each span, and x where one was not finite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pellucid.config import UserError
from pellucid.observe.columns import PHASES
from pellucid.observe.reader import Reader, is_missing
from pellucid.observe.store import FAN, FILE_NAME, LEVELS
from pellucid.training.lock import is_trained

BARS = "▁▂▃▄▅▆▇█"
TREND = 24  # characters
MOST_FRAMES = 2000  # read for a trend; longer runs are read from their rollups
EVENTS = 8
SILENT = 10.0  # seconds, and five steps, without a frame: the run no longer trains
STYLES = {"alarm": "bold red", "warning": "yellow", "note": "dim"}


@dataclass
class Summary:
    """One run at one moment. numbers: statistics of the stream `run` at the last step; what was not measured is absent."""

    name: str
    state: str
    step: int | None = None
    max_steps: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    trend: str = ""
    held_out: float | None = None
    update_ratio: float | None = None
    busiest: float | None = None  # highest load of an expert
    idle: int | None = None  # experts without a token
    events: list[dict] = field(default_factory=list)  # newest first


def watch_terminal(
    run_dirs: Sequence[str | Path], *, once: bool = False, interval: float = 1.0, console: Console | None = None,
) -> None:  # fmt: skip
    """Show the runs until Ctrl-C; `once`, or where the output is no terminal, show them one time. interval: seconds.

    A folder whose telemetry has not begun is waited for. Raises UserError for a folder that does not exist.
    """
    for folder in run_dirs:
        if not Path(folder).exists():
            raise UserError(f"{folder}: no such run; give a run's folder, such as runs/demo")
    console = console or Console(highlight=False)
    if once or not console.is_terminal:
        console.print(render([summarize(folder) for folder in run_dirs]))
        return
    picture = lambda: render([summarize(folder) for folder in run_dirs], console.height)
    try:
        with Live(picture(), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(picture(), refresh=True)
    except KeyboardInterrupt:
        console.print(picture())  # what was last seen stays on the terminal


def summarize(run_dir: str | Path) -> Summary:
    """The run's present state. Opens and closes the file: nothing is held while the trainer writes."""
    folder = Path(run_dir)
    name = folder.resolve().name
    try:
        reader = Reader(folder)
    except UserError as error:
        begun = (folder / FILE_NAME).is_file() or not folder.is_dir()
        return Summary(name, str(error) if begun else "no telemetry yet")
    with reader:
        try:
            return _read(reader, name, folder)
        except UserError as error:  # a damaged file; the other runs stay on the screen
            return Summary(name, str(error))


def _read(run: Reader, name: str, folder: Path) -> Summary:
    step = run.latest_step() if "run" in run.streams() else None
    if step is None:
        return Summary(name, "starting")
    values = run.frames("run", since=step - 1)[1][0, 0]
    missing = is_missing(values)
    numbers = {s["name"]: float(values[s["id"]]) for s in run.stats("run") if not missing[s["id"]]}
    written = run.query("SELECT time FROM frame WHERE stream = 'run' AND step = ?", (step,))[0]["time"]
    summary = Summary(name, "", step, run.meta.get("max_steps"), numbers, _trend(run, step))
    summary.state = _state(summary, folder, time.time() - written)
    summary.held_out = _last(run, "evaluation", "loss", "max")
    summary.update_ratio = _last(run, "param", "update_ratio", "last")
    summary.busiest, idle = _last(run, "router", "load", "max"), _last(run, "layer", "idle_experts", "sum")
    summary.idle = None if idle is None else int(idle)
    summary.events = run.query("SELECT * FROM event WHERE severity != 'note' ORDER BY id DESC LIMIT ?", (EVENTS,))
    return summary


def _state(summary: Summary, folder: Path, silent: float) -> str:
    finished = summary.max_steps is not None and summary.step + 1 >= summary.max_steps
    if finished or (folder / "model").is_dir():
        return "finished"
    trained = is_trained(folder)
    if trained is False:
        return "stopped"
    if trained or silent < max(SILENT, 5 * summary.numbers.get("step_seconds", 0.0)):
        return "training"
    return f"silent for {_duration(silent)}"


def _last(run: Reader, stream: str, stat: str, how: str) -> float | None:
    """One number of a stream's newest frame: its last row, or the largest or sum of its rows; None if not measured."""
    newest = run.latest_step(stream)
    if newest is None:
        return None
    column = next(s["id"] for s in run.stats(stream) if s["name"] == stat)
    values = run.frames(stream, since=newest - 1)[1][0, :, column]
    known = values[~is_missing(values)]
    choose = {"last": lambda v: v[-1], "max": np.max, "sum": np.sum}[how]
    return float(choose(known)) if len(known) else None


def _trend(run: Reader, step: int) -> str:
    """The loss of the whole run in TREND characters: the highest of each span."""
    level = next((n for n in (0, *LEVELS) if step < MOST_FRAMES * FAN**n), LEVELS[-1])
    column = next(s["id"] for s in run.stats("run") if s["name"] == "loss")
    if level == 0:
        high = run.frames("run")[1][:, 0, column]
        broken = ~np.isfinite(high)
    else:
        parts = run.rollup("run", level)[1][:, :, 0, column]
        high, broken = parts[:, 1], parts[:, 5] > 0
    spans = np.array_split(np.arange(len(high)), min(TREND, len(high)))
    tops = np.array([np.max(high[s], where=np.isfinite(high[s]), initial=-np.inf) for s in spans])
    finite = tops[np.isfinite(tops)]
    low, width = (finite.min(), max(np.ptp(finite), 1e-9)) if len(finite) else (0.0, 1.0)
    bar = lambda top: BARS[min(int((top - low) / width * len(BARS)), len(BARS) - 1)] if np.isfinite(top) else " "
    return "".join("x" if broken[s].any() else bar(top) for s, top in zip(spans, tops, strict=True))


# ------------------------------------------------------------------------------------------------ drawing


def render(summaries: Sequence[Summary], height: int | None = None) -> Group:
    """Four lines a run, made for 80 columns, then what the rules say. height: lines there are."""
    parts: list[Text] = []
    for s in summaries:
        parts += [*_lines(s), Text("")]
    room = EVENTS if height is None else max(2, height - len(parts) - 1)
    return Group(*parts, *_events(summaries, room))


def _lines(s: Summary) -> list[Text]:
    style = "green" if s.state in ("training", "finished") else "yellow"
    step = "" if s.step is None else f"  {s.step + 1}" + (f" of {s.max_steps}" if s.max_steps else "") + " steps"
    head = Text.assemble((s.name, "bold"), "  ", (s.state, style), step, "  ", (s.trend, "cyan"), overflow="ellipsis", no_wrap=True)
    if not s.numbers:
        return [head]
    n = s.numbers
    losses = [("loss", n.get("loss"), "8.4f"), ("held out", s.held_out, "8.4f"), ("tokens/s", n.get("tokens_per_second"), "9,.0f")]
    sizes = [("rate", n.get("learning_rate"), "8.2e"), ("gradient", n.get("gradient_norm"), "8.3g"),
             ("dw/w", s.update_ratio, "8.1e"), ("busiest expert", s.busiest, "5.2f")]  # fmt: skip
    second = _pairs([*losses, *sizes[:1]])
    third = _pairs(sizes[1:])
    third.append("" if s.idle is None else f"  {s.idle} idle", style="yellow" if s.idle else "dim")
    return [head, second, third, _times(s)]


def _pairs(values: list[tuple[str, float | None, str]]) -> Text:
    line = Text("  ", overflow="ellipsis", no_wrap=True)
    for label, value, form in values:
        line.append(f"{label} ", style="dim")
        line.append_text(_number(value, form))
        line.append("  ")
    return line


def _number(value: float | None, form: str) -> Text:
    width = int(form.partition(".")[0].strip(","))
    if value is None:
        return Text("-".rjust(width), style="dim")
    return Text(format(value, form)) if np.isfinite(value) else Text(str(value).rjust(width), style="bold red")


def _times(s: Summary) -> Text:
    """Where the last step's time went, its memory, and what observing costs."""
    n = s.numbers
    total = n.get("step_seconds", 0.0)
    parts = [f"{p} {n[f'{p}_seconds'] / total:.0%}" for p in PHASES[:-1] if f"{p}_seconds" in n and total]
    line = f"  {total:.3g} s: {', '.join(parts)}"
    memory = [f"{where} {n[key] / 1e9:.1f} GB" for where, key in (("host", "host_memory"), ("device", "device_memory")) if key in n]
    line += f" | {', '.join(memory)}"
    line += f" | MFU {n['mfu']:.1%}" if "mfu" in n else ""
    return Text(line, style="dim", overflow="ellipsis", no_wrap=True)


def _events(summaries: Sequence[Summary], room: int) -> list[Text]:
    found = sorted(((e["time"], s.name, e) for s in summaries for e in s.events), key=lambda x: -x[0])
    if not found:
        return [Text("no alarms", style="green")]
    several = len(summaries) > 1
    return [
        Text(f"{e['severity']:<8}" + (f"{name} " if several else "") + f"step {e['step']}: {e['rule']} ({e['subject']}): {e['text']}",
             style=STYLES.get(e["severity"], ""), overflow="ellipsis", no_wrap=True)
        for _, name, e in found[:room]
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
