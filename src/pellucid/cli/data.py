"""Picture 2 alone: prepare text, look into what was prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.app import Json, app, split_settings
from pellucid.config import load_config

data_app = typer.Typer(help="Picture 2 alone: prepare text, look into what was prepared.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("build")
def data_build(
    settings: Annotated[list[str], typer.Argument(metavar="CONFIG.toml [key=value ...]")],
    out: Annotated[Path, typer.Option(help="folder to write")],
) -> None:
    """Prepare the data of a configuration: read, normalize, train the tokenizer, tokenize, write checked shards.

    Example: pellucid data build corpus.toml --out data/corpus
    """
    from pellucid.data.build import prepare
    from pellucid.training.progress import Shown

    shown = Shown()
    try:
        dataset = prepare(load_config(*split_settings(settings)).data, directory=out, progress=shown.stage)
    finally:
        shown.close()
    for name, split in dataset.manifest["splits"].items():
        shown.say(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['text_bytes']:,} bytes")
    shown.say(f"{'found ready' if dataset.reused else 'written'}: {out}")


@data_app.command("inspect")
def data_inspect(folder: Annotated[Path, typer.Argument(help="folder of prepared data")], as_json: Json = False) -> None:
    """Counts of every stage, and samples before and after.

    Example: pellucid data inspect data/corpus
    """
    from pellucid.data.dataset import Dataset
    from pellucid.data.inspect import describe

    manifest = Dataset(folder).manifest
    print(json.dumps(manifest, indent=1) if as_json else describe(manifest))
