"""Look into a run: which documents a step saw, how it changed a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.app import Json, answer, app, progress
from pellucid.config import UserError

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="folder of the run, such as runs/demo")]
STEP = "number of the step, from 0: the one that train ends with 'step 8/8' is step 7"


@app.command()
def trace(
    run: RunDir,
    step: Annotated[int, typer.Option(min=0, help=STEP)],
    documents: Annotated[int, typer.Option(min=1, help="how many documents to show (--json: all)")] = 20,
    as_json: Json = False,
) -> None:
    """The documents of one step's batch: file, byte range, loss, and the worst tokens in their text.

    Example: pellucid trace runs/demo --step 120
    """
    from pellucid.observe import trace as tracing

    result = tracing.trace(run, step)
    answer(result.as_dict(), as_json, lambda: tracing.render(result, documents))


@app.command()
def explain(
    run: RunDir,
    step: Annotated[int | None, typer.Option(min=0, help=STEP)] = None,
    text: Annotated[str | None, typer.Option(help="instead of a step: one real step on this sentence")] = None,
    label: Annotated[str | None, typer.Option(help="with --text, of a run on labelled documents: its class or numbers")] = None,
    parameter: Annotated[str | None, typer.Option(help="name of a tensor; default: the one with the largest gradient")] = None,
    index: Annotated[str | None, typer.Option(help="element, as 3,7; default: the one that changed most")] = None,
    as_json: Json = False,
) -> None:
    """One parameter update, number by number: gradient, clipping, moments, decay, learning rate, change; and its proofs.

    The step is done again from the nearest checkpoint, bit for bit. In the run only capsules/ is added to, for `watch`.

    Example: pellucid explain runs/demo --step 120 --parameter layers.0.moe.router.weight --index 3,7

    Example: pellucid explain runs/demo --text "def read(self):"
    """
    if (step is None) == (text is None):
        raise UserError("explain: give either --step N or --text \"...\"")
    place = _index(index, parameter)

    from pellucid.observe.explain import explain as explain_recorded
    from pellucid.observe.explain_text import explain_text
    from pellucid.observe.explain_view import render

    with progress() as shown:

        def tell(result) -> None:
            shown.close()
            answer(result.as_dict(), as_json, lambda: render(result))

        if text is not None:
            result = explain_text(run, text, parameter, place, label)
            tell(result)
        else:
            replaying = lambda done, total: shown.stage("replaying from a checkpoint", done, total)
            result = explain_recorded(run, step, parameter, place, replaying, tell)
    if any(proof.holds is False for proof in result.proofs):
        raise typer.Exit(1)


def _index(index: str | None, parameter: str | None) -> tuple[int, ...] | None:
    if index is None:
        return None
    if parameter is None:
        raise UserError("--index: say of which tensor, with --parameter NAME")
    try:
        return tuple(int(part) for part in index.strip("[]() ").split(","))
    except ValueError:
        raise UserError(f"--index {index}: give whole numbers with commas between, such as 3,7") from None
