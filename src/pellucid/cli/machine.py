"""Models as files, and the machine: convert, plan, doctor, version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.app import Json, app
from pellucid.config import load_config, preset_names


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a run, a Hugging Face directory, an official ckpt-0, or a tokenizer.model")],
    destination: Annotated[Path, typer.Argument(help="new folder")],
    to: Annotated[str, typer.Option(help="hf (safetensors, for other engines) or xai (the official int8 layout)")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="of the written matrices, for hf: float32 or bfloat16")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with [model], for a ckpt-0 that is not Grok-1 itself")] = None,
) -> None:
    """Rewrite a model in another format, one tensor in memory at a time; or a tokenizer.model with an exact tokenizer.json.

    Example: pellucid convert ckpt-0 grok-1-hf --to hf --dtype bfloat16
    """
    from pellucid.exchange.convert import convert as convert_model
    from pellucid.exchange.convert import convert_tokenizer
    from pellucid.training.progress import Shown

    shown = Shown()
    try:
        if source.endswith(".model"):
            convert_tokenizer(source, destination)
            shown.say(f"written: {destination}")
            return
        shape = load_config(config).model if config is not None else None
        convert_model(source, destination, config=shape, to=to, dtype=dtype, progress=shown.stage)
    finally:
        shown.close()
    shown.say(f"written: {destination}")


@app.command()
def plan(
    presets: Annotated[list[str] | None, typer.Argument(help="presets; default: all")] = None, as_json: Json = False
) -> None:
    """Sizes before anything is spent: parameters, active parameters, FLOPs per token, memory to train.

    Example: pellucid plan small grok-1
    """
    from pellucid.model.size import sizes

    rows = sizes(presets or preset_names())
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    header = ["preset", *next(iter(rows.values()))]
    lines = [header] + [[name, *(_short(value) for value in row.values())] for name, row in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)), sep="  ")


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, which kernels will be used, and why not others.

    Example: pellucid doctor
    """
    from pellucid.doctor import examine

    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        width = max(len(name) for name in facts)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


@app.command()
def version() -> None:
    """The version of Pellucid."""
    import pellucid

    print(pellucid.__version__)


def _short(number: float) -> str:
    """4096 as it is, 1234567 as 1.23 M."""
    if number < 10_000:
        return f"{number:g}"
    for unit in ("k", "M", "G", "T", "P"):
        number /= 1000
        if number < 1000 or unit == "P":
            return f"{number:.3g} {unit}"
