"""Folders that appear whole or not at all: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pellucid.config import UserError

MAX_JSON_BYTES = 64 * 1024 * 1024


@contextmanager
def new_folder(destination: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends well, and vanishes when it does not.

    Raises UserError if `destination` exists (unless `replace`) or cannot be written.
    """
    destination = Path(os.path.abspath(destination))
    if not replace and (destination.exists() or destination.is_symlink()):
        raise UserError(f"{destination}: exists already; choose another destination or remove it")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            for file in [*partial.rglob("*"), partial]:
                _sync(file)
            if destination.exists():
                _swap(partial, destination)
            else:
                partial.rename(destination)
            _sync(destination.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{destination}: cannot be written ({reason}); nothing was left there") from None


def _swap(partial: Path, destination: Path) -> None:
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    destination.rename(old)
    partial.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a stranger's file. Raises UserError, naming the file, for anything else."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB; that is not a description of a model")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds JSON that is no object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative name."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
