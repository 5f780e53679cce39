"""One process at a time trains a run. The system lets go of the lock when its process ends, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

from pellucid.config import UserError


@contextmanager
def only_trainer(run_dir: Path) -> Iterator[None]:
    """Raises UserError where another process trains this run, or none may write to it."""
    try:
        file = open(run_dir / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written to ({error.strerror}); make the folder writable, or go on in a copy") from None
    with file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{run_dir}: is being trained by process {file.read()}; wait for its end, or stop it first") from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(file: IO[str]) -> None:
    for patience in (0.05, 0.05, None):  # `is_trained` may hold it for an instant
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if patience is None:
                raise
            time.sleep(patience)


def is_trained(run_dir: Path) -> bool | None:
    """Whether a process trains this run now; None where that cannot be told."""
    if fcntl is None:
        return None
    try:
        with open(run_dir / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return None
    return False
