"""A run on disk: runs/NAME/ with config.toml (fully resolved) and manifest.json (versions, machine, data, seeds, later changes).

What else lies there others write: run.sqlite (what every step did), checkpoints/ and, at the end, model/ as a Hugging Face directory.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pellucid.config import Config, UserError, is_of_a_run, load_config, resolve_paths
from pellucid.data.dataset import Dataset
from pellucid.data.place import folder_of_run, place_of
from pellucid.exchange.load import load
from pellucid.model.grok import Grok1
from pellucid.model.kernels import native
from pellucid.model.size import parameter_counts
from pellucid.training.checkpoint import diff_settings

REPORTED_PACKAGES = ("torch", "numpy", "tokenizers", "sentencepiece", "safetensors", "pyarrow", "pydantic")


class Run:
    """A run directory, finished or not. Raises UserError when `directory` is none."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not (self.directory / "config.toml").is_file():
            raise UserError(f"{self.directory}: not a run directory (it has no config.toml)")
        self.config = load_config(self.directory / "config.toml")
        try:
            self.manifest = json.loads((self.directory / "manifest.json").read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.directory}: not a run directory (manifest.json cannot be read: {error})") from None
        if not isinstance(self.manifest, dict):
            raise UserError(f"{self.directory}: not a run directory (manifest.json is not that of a run)")
        self.stopped_by: str | None = None  # the signal that ended training early, in the process that trained

    def __repr__(self) -> str:
        return f"Run('{self.directory}')"

    @property
    def threads(self) -> int | None:
        """How many threads of the CPU its newest steps were computed on."""
        return self.manifest.get("machine", {}).get("threads")

    def load(self, **options: Any) -> tuple[Grok1, Any]:
        """(model, tokenizer) of the finished run, or of its newest checkpoint; options as for `pellucid.load`."""
        return load(self.directory, **options)

    def dataset(self) -> Dataset:
        """The data it was trained on."""
        return Dataset(folder_of_run(self.directory, self.manifest["data"]), run=self.config.data)


def write_run_files(folder: Path | None, name: str, config: Config, dataset: Dataset) -> Path:
    """config.toml, which repeats the run, and manifest.json, which says what it ran on; both or neither.

    Returns their folder: `folder`, or where that is None the free one of runs/NAME, runs/NAME-2, ... that no other process took first.
    """
    new = folder or next_run_dir(name)
    manifest = {
        "format": 1,
        "pellucid": installed_version("pellucid"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: installed_version(name) for name in REPORTED_PACKAGES},
        "machine": {
            "platform": platform.platform(), "processors": os.cpu_count(), "threads": torch.get_num_threads(),
            "kernels": native.serving(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seed": config.training.seed,
        "data": place_of(dataset, new),
        "tokenizer": {"fingerprint": dataset.tokenizer.fingerprint},
        "parameters": parameter_counts(config.model),
    }  # fmt: skip
    unfinished = new.parent / f".{new.name}.{os.getpid()}.starting"
    try:
        unfinished.mkdir(parents=True)
        (unfinished / "config.toml").write_text(resolved_config(config).to_toml(), encoding="utf-8")
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        while True:
            try:
                os.rename(unfinished, new)  # an empty folder may stand there, never another run
                return new
            except OSError as error:
                if folder is not None or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                new = next_run_dir(name)  # a run that began at the same moment has the other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{new}: exists already, another process made it; choose another --run-dir") from None
        raise UserError(f"{new}: cannot write the run directory ({error.strerror}); choose another --run-dir") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def run_name(config: str | Path | None) -> str:
    """What a run of this configuration file is called: the file's name, or that of the run it repeats."""
    if config is None:
        return "demo"
    path = Path(config).resolve()
    return path.parent.name if is_of_a_run(path) else path.stem


def next_run_dir(name: str) -> Path:
    """runs/NAME, or the first free of runs/NAME-2, runs/NAME-3, ..."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(Path("runs") / n for n in names if not (Path("runs") / n).exists())


def note_changes(run: Run, config: Config, step: int, dataset: Dataset) -> None:
    """A run continued with other settings (a longer budget, say): config.toml takes them, the manifest tells when. If the same data
    now lie in another place, it takes that too.

    An entry of `changes` keeps, beside the words, the configuration, threads and kernels of the steps before `step`, so that
    those can be replayed. Steps that an earlier entry was about and that are done again belong to the new settings.
    """
    before, after = (resolved_config(c).model_dump(mode="json") for c in (run.config, config))
    threads, now = run.threads, torch.get_num_threads()
    serving, machine = native.serving(), run.manifest.setdefault("machine", {})
    kernels = machine.get("kernels")  # None: a run of before they were noted
    differences = diff_settings({**before, "threads": threads, "kernels": kernels or serving},
                                {**after, "threads": now, "kernels": serving})  # fmt: skip
    changes = [{**change, "step": min(change["step"], step)} for change in run.manifest.get("changes", [])]
    if differences:
        changes.append({"step": step, "settings": differences, "before": before, "threads": threads, "kernels": kernels})
    moved = folder_of_run(run.directory, run.manifest["data"]).resolve() != dataset.directory.resolve()
    if moved:
        run.manifest["data"] = place_of(dataset, run.directory)
    if moved or changes != run.manifest.get("changes", []):
        run.config = config
        run.manifest["changes"] = changes
        machine |= {"threads": now, "kernels": serving}
        _replace(run.directory / "manifest.json", json.dumps(run.manifest, indent=1) + "\n")
        _replace(run.directory / "config.toml", resolved_config(config).to_toml())


def resolved_config(config: Config) -> Config:
    """The same with absolute paths, so that it means the same wherever it is read."""
    resolved = config.model_copy(deep=True)
    resolve_paths(resolved, Path.cwd())
    resolved.data.directory = os.path.abspath(resolved.data.directory)
    return resolved


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is the old or the new one, never half."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
