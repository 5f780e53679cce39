"""Where the prepared data of a run lie: what its manifest notes, and where they are found by it, also after both were moved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pellucid.config import UserError
from pellucid.data.dataset import MANIFEST, Dataset


def place_of(dataset: Dataset, run: Path) -> dict[str, str]:
    """What a run's manifest tells of its data: where they are, also seen from the run, and what they are."""
    directory = dataset.directory.resolve()
    return {"directory": str(directory), "from_run": os.path.relpath(directory, run.resolve()), "fingerprint": dataset.fingerprint}


def folder_of_run(run: Path, recorded: Any) -> Path:
    """Where the data of a run lie, by `data` of its manifest: in the same place seen from the run, where both may have been moved or
    copied to, or else where they were. Raises UserError where the manifest does not say."""
    if not (isinstance(recorded, dict) and isinstance(recorded.get("directory"), str)):
        raise UserError(f"{run}/manifest.json: does not say where the data of the run lie")
    told, seen = recorded["directory"], recorded.get("from_run")
    if isinstance(seen, str) and os.path.isfile(run / seen / MANIFEST):  # unlike Path's, False also of what may not be looked at
        beside = os.path.realpath(run / seen)
        return Path(told if beside == os.path.realpath(told) else beside)
    return Path(told)
