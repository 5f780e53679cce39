"""SIGINT, SIGTERM and SIGHUP (its terminal is closed) ask politely: the step in progress is finished and saved.

A second SIGINT stops at once. Under `nohup` SIGHUP is ignored from the start, and stays so.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """`with StopRequest() as stop:` sets `stop.signal_name` when a signal arrives; the old handlers return at the end."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
