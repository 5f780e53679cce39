"""A worker process of a build: `python -m pellucid.data.worker`, started and spoken to by workers.py alone."""

from __future__ import annotations

import os
import signal
import sys
import traceback

from pellucid.config import UserError
from pellucid.data.workers import receive, send


def main() -> None:
    """Take a Setup, then jobs, until the other side is gone; say every report, then done or failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    questions = sys.stdin.buffer
    try:
        setup = receive(questions)
        while True:
            job = receive(questions)
            try:
                for report in job.run(setup):
                    send(answers, report)
                send(answers, ("done", None))
            except BrokenPipeError:
                raise
            except (UserError, OSError) as error:
                send(answers, ("failed", error))
            except Exception:
                send(answers, ("failed", RuntimeError(traceback.format_exc())))
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    main()
