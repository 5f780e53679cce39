"""See a run: live in the browser or the terminal, or as one file to give away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.app import app


@app.command()
def watch(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN_DIR ...]", help="default: the newest under runs/")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="first one tried; default 8384")] = None,
    browser: Annotated[bool, typer.Option(help="open the page in the browser")] = True,
    terminal: Annotated[bool, typer.Option("--terminal", help="show them here instead of in a browser")] = False,
) -> None:
    """Show runs in the browser, live while they train and after; several are compared.

    Example: pellucid watch runs/demo runs/demo-2
    """
    from pellucid.observe.web import server

    if terminal:
        from pellucid.observe.terminal import watch_terminal

        watch_terminal(runs or server.newest_runs())
    else:
        server.watch(runs or [], port, browser)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="a run, finished or not")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="file to write; default RUN_DIR/report.html")] = None,
) -> None:
    """Write the dashboard of a run as one HTML file that opens by double click, without a network.

    Example: pellucid report runs/demo --out demo.html
    """
    from pellucid.measure.outcome import sections
    from pellucid.observe.web.report import write_report
    from pellucid.training.progress import Shown

    shown = Shown()
    try:
        path = write_report(run_dir, out, progress=shown.stage, sections=sections(run_dir))
    finally:
        shown.close()
    print(f"{path}  ({path.stat().st_size / 1e6:.2f} MB)")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run, finished or not")],
    to: Annotated[list[str], typer.Option(help="tensorboard, wandb, mlflow or parquet; several times")],
) -> None:
    """Write a run for TensorBoard, W&B, MLflow, or as Parquet.

    It goes into RUN/export/TOOL; `observe.export` does the same at the end of each training.

    Example: pellucid export runs/demo --to wandb --to parquet
    """
    from pellucid.observe.export import check_tools
    from pellucid.observe.export import export as write

    check_tools(to)
    for kind in to:
        print(write(run, kind))
