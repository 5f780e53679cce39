"""What a bench records beside its numbers: which program, on which machine, beside how much other work."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def about() -> dict[str, Any]:
    """Commit, processor, Python and the load averages of this moment; a bench asks before it begins."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "machine": f"{processor()}, {os.cpu_count()} cores", "python": platform.python_version(),
            "load_average": [round(load, 1) for load in os.getloadavg()]}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
