"""Train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pellucid.cli.app import app, split_settings
from pellucid.config import load_config


@app.command()
def train(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.toml] [key=value ...]")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the run; default runs/NAME, runs/NAME-2, ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --run-dir, bit for bit")] = False,
) -> None:
    """Train a model from raw text; without CONFIG a small one, on Python's own standard library.

    Example: pellucid train corpus.toml training.max_steps=2000 optimizer.name=muon
    """
    from pellucid import run as runs

    path, overrides = split_settings(settings or [])
    config: Any = path
    if path is None and resume and run_dir is not None:
        config = runs.Run(run_dir).directory / "config.toml"
    if overrides or config is not None:
        config = load_config(config, overrides)
    runs.train(config, run_dir=run_dir, resume=resume, name=runs.run_name(path), progress=True)
