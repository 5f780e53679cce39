"""What a person sees while a run trains: one progress bar and a few lines. `Quiet` shows nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pellucid.training.step import StepResult


def after(steps: int) -> str:
    """When something was measured, in words; `steps` counts those that are done."""
    return "before training" if steps == 0 else "after 1 step" if steps == 1 else f"after {steps} steps"


class Quiet:
    """The interface, silent: for programs."""

    def say(self, text: str) -> None: ...
    def stage(self, name: str, done: int, total: int | None, detail: str = "") -> None: ...
    def start(self, step: int, max_steps: int, epochs: float) -> None: ...
    def step(self, step: int, result: StepResult, seconds: float, epoch: float) -> None: ...
    def close(self) -> None: ...


class Shown(Quiet):
    """A live bar on a terminal; elsewhere a line every ten seconds, or so many, and for stages one at once where `begin`."""

    def __init__(self, console: Console | None = None, seconds: float = 10.0, begin: bool = True):
        self.console = console or Console(highlight=False)
        self.console.file = _Patient(self.console.file)
        self.seconds, self.begin = seconds, begin
        self.bar: Progress | None = None
        self.task = None
        self.stage_name: str | None = None
        self.last_line = 0.0
        self.loss: float | None = None
        self.speed: float | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def stage(self, name: str, done: int, total: int | None, detail: str = "") -> None:
        """Progress of a long stage, with the time left; `total` None: unknown; `detail`: counts and speed so far."""
        if name != self.stage_name:
            self.close()
            self.stage_name = name
            self._open(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self.task = self.bar.add_task(name, total=total, completed=done)
            if not self.console.is_terminal:
                if self.begin:
                    self.say(f"{name} ...")
                self.last_line = self.console.get_time()
        self.bar.update(self.task, completed=done, total=total, description=f"{name} {detail}".rstrip())
        if self._line_is_due():
            task = self.bar.tasks[0]
            share = [f"{name} {task.percentage:.0f} %" if total else name]
            known = task.time_remaining is not None and "left" not in detail
            left = [f"left {timedelta(seconds=round(task.time_remaining))}"] if known else []
            self.say(" · ".join([*share, *([detail] if detail else []), *left]))

    def start(self, step: int, max_steps: int, epochs: float) -> None:
        self.close()
        self._open(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=max_steps, completed=step)
        self.max_steps, self.epochs = max_steps, epochs

    def step(self, step: int, result: StepResult, seconds: float, epoch: float) -> None:
        """After step number `step` (from 0), which took `seconds`, at `epoch` passes over the data."""
        smooth = lambda old, new: new if old is None else 0.9 * old + 0.1 * new
        self.loss = smooth(self.loss, result.loss) if result.applied else self.loss
        self.speed = smooth(self.speed, result.tokens / seconds)
        shown = f"loss {self.loss:.4f}" if self.loss is not None else "loss not finite"
        text = f"{shown} · {self.speed:,.0f} tokens/s · epoch {epoch:.2f} of {self.epochs:.2f}"
        self.bar.update(self.task, completed=step + 1, description=text)
        if self._line_is_due(last=step + 1 == self.max_steps):
            self.say(f"step {step + 1}/{self.max_steps} · {text}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.stage_name = None, None

    def _line_is_due(self, last: bool = False) -> bool:
        """Whether to print a line where there is no bar: from time to time, and the last one."""
        now = self.console.get_time()
        due = not self.console.is_terminal and (last or now - self.last_line >= self.seconds)
        self.last_line = now if due else self.last_line
        return due

    def _open(self, *columns) -> None:
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bar.start()


class _Patient:
    """A stream whose reader may go away (a closed pipe or terminal, a full disk): from then on nothing is shown."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError:  # also for others who write there, and for what is flushed when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
