"""The recent past of a run, as arrays that rules read: a sliding window of each stream's frames.

Windows are mirrored ring buffers, so the last n frames are always one contiguous view. Built from a live run step by
step, or replayed from run.sqlite: rules cannot tell the difference.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from pellucid.observe.columns import INDEX
from pellucid.observe.store import MISSING_BITS, Row

WINDOW = 256
DOCUMENT_STEPS = 128
PAIR_STEPS = 8


class Window:
    """The last WINDOW frames of one stream."""

    def __init__(self, rows: int, columns: int):
        self.data = np.zeros((2 * WINDOW, rows, columns), dtype=np.float32)
        self.steps = np.zeros(2 * WINDOW, dtype=np.int64)
        self.seen = 0

    def push(self, step: int, frame: np.ndarray) -> None:
        at = self.seen % WINDOW
        self.data[at] = self.data[at + WINDOW] = frame
        self.steps[at] = self.steps[at + WINDOW] = step
        self.seen += 1

    def last(self, n: int, column: int | None = None) -> np.ndarray:
        """The newest n frames, oldest first: [n, rows] of one column, or [n, rows, columns]."""
        n = min(n, self.seen, WINDOW)
        stop = (self.seen - 1) % WINDOW + WINDOW + 1
        view = self.data[stop - n : stop]
        return view if column is None else view[:, :, column]


@dataclass
class Run:
    """What does not change: the run's settings as far as rules need them."""

    param_rows: list[Row] = field(default_factory=list)
    layers: int = 1
    experts: int = 8
    experts_per_token: int = 2
    vocab_size: int = 32000
    warmup_steps: int = 0
    gradient_clip: float = 0.0
    rows_per_epoch: int | None = None
    tokens_per_step: int = 1


@dataclass(frozen=True)
class Document:
    """A piece of a document in one step, and how far its loss exceeds that of the batch: by chance, about as 1/sqrt(tokens)."""

    loss: float
    batch: float
    tokens: int
    row: int
    segment: int

    @property
    def excess(self) -> float:
        return (self.loss - self.batch) * self.tokens**0.5


class History:
    """All windows, and this step's documents. A stream without a frame in this step is not `fresh`."""

    def __init__(self, run: Run):
        self.run = run
        self.windows: dict[str, Window] = {}
        self.fresh: set[str] = set()
        self.step = -1
        self.first_step: int | None = None
        self.worst_document: Document | None = None  # of this step
        self.document_excess: deque[float] = deque(maxlen=DOCUMENT_STEPS)  # of each step's worst document, this step's last
        self.repeated_share: float | None = None
        self.unigram_entropy: float | None = None
        self.equal_pairs: deque[tuple[float, float, float]] = deque(maxlen=PAIR_STEPS)  # in each step: found, by chance, at most
        self.best_loss = float("inf")  # lowest mean of 20 steps

    def push(self, step: int, frames: dict[str, np.ndarray]) -> None:
        self.step, self.fresh = step, set(frames)
        self.first_step = step if self.first_step is None else self.first_step
        for stream, frame in frames.items():
            if stream not in self.windows:
                self.windows[stream] = Window(*frame.shape)
            self.windows[stream].push(step, frame)

    @property
    def age(self) -> int:
        """Steps watched, this one included."""
        return self.windows["run"].seen if "run" in self.windows else 0

    def scalars(self, name: str, n: int) -> np.ndarray:
        """Last n values of a `run` statistic; NaN where missing."""
        return self.table("run", name, n)[:, 0]

    def table(self, stream: str, name: str, n: int) -> np.ndarray:
        """Last n values [n, rows] of a statistic; empty before the first frame."""
        if stream not in self.windows:
            return np.empty((0, 1), np.float32)
        return self.windows[stream].last(n, INDEX[stream][name])

    def now(self, stream: str, name: str) -> np.ndarray | None:
        """This step's values [rows]; None if the stream has no frame in this step."""
        return self.table(stream, name, 1)[-1] if stream in self.fresh else None


def measured(values: np.ndarray) -> np.ndarray:
    """True where a value was measured (a measured NaN counts)."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32) != MISSING_BITS
