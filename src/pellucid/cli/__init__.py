"""The `pellucid` command: thin commands that parse arguments and print; all logic lies below.

A user's mistake is one sentence on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import io
import sys

from pellucid.cli import data, machine, measure, see, train, use, watch  # noqa: F401  each adds its commands to the app
from pellucid.cli.app import app
from pellucid.config import UserError


def main() -> None:
    """Entry point: runs a command; a UserError becomes one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal does not know is shown by its code
    try:
        app()
    except UserError as error:
        print(f"pellucid: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # the machine's refusal: a full disk, a folder without permission
        place = f"{error.filename}: " if error.filename else ""
        print(f"pellucid: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)):
            raise
        print("pellucid: not enough memory: take a smaller training.micro_batch_size, training.recompute=all or a smaller model; "
              "`pellucid plan` says before what a run will take", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == 130:  # typer's answer to Ctrl-C, without a word
            print("pellucid: interrupted", file=sys.stderr)
        raise
