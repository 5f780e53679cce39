"""Whether a folder lies on a network file system: there run.sqlite is written, and looked at, in another way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NETWORK = ("nfs", "cifs", "smb", "9p", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "sshfs", "davfs", "webdav")


def is_network(folder: Path) -> bool:
    """Whether `folder` lies on a network file system, where WAL's shared memory does not work (sqlite.org/wal.html)."""
    real = os.path.realpath(folder)
    best, kind = "", ""
    for mount, fstype in _mounts():
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, fstype
    return any(name in kind.lower() for name in NETWORK)


def _mounts() -> list[tuple[str, str]]:
    """(mount point, file system type) of every mount."""
    table = Path("/proc/mounts")
    if table.exists():
        lines = (line.split() for line in table.read_text(errors="replace").splitlines())
        return [(parts[1].encode().decode("unicode_escape"), parts[2]) for parts in lines if len(parts) > 2]
    if sys.platform == "win32":
        return []
    lines = subprocess.run(["mount"], capture_output=True, text=True, check=False).stdout.splitlines()
    halves = [line.partition(" on ")[2].partition(" (") for line in lines]  # macOS: dev on /path (type, options)
    return [(path, options.partition(",")[0]) for path, _, options in halves if path]
