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


@data_app.command("export")
def data_export(
    folder: Annotated[Path, typer.Argument(help="folder of prepared data")],
    to: Annotated[str, typer.Option(help="megatron (.bin and .idx) or nanogpt (.bin)")],
    out: Annotated[Path, typer.Option(help="new folder")],
    dtype: Annotated[str | None, typer.Option(help="of nanogpt's tokens: uint16 (what it reads) or uint32")] = None,
) -> None:
    """Write prepared tokens as files that other trainers read, with the tokenizer and hashes beside them.

    Example: pellucid data export data/corpus --to megatron --out corpus-megatron
    """
    from pellucid.data.dataset import Dataset
    from pellucid.data.interchange import export_tokens
    from pellucid.training.progress import Shown

    shown = Shown()
    try:
        export_tokens(Dataset(folder), to, out, dtype=dtype, progress=shown.stage)
    finally:
        shown.close()
    shown.say(f"written: {out}")


@data_app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(help=".idx, .bin, .parquet, .arrow, hf-dataset:NAME, or a folder of such files")],
    out: Annotated[Path, typer.Option(help="new folder of prepared data")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer that made the tokens; default: SOURCE/tokenizer")] = None,
    format: Annotated[str | None, typer.Option("--from", help="megatron, nanogpt or table; default: by the file")] = None,
    validation: Annotated[str | None, typer.Option(help="held-out tokens; default: val.bin in SOURCE, else a fraction")] = None,
    validation_fraction: Annotated[float, typer.Option(min=0.0, max=0.99, help="of the documents")] = 0.02,
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens per row")] = 256,
    field: Annotated[str, typer.Option(help="column of token ids, of a table")] = "input_ids",
    dtype: Annotated[str | None, typer.Option(help="of nanogpt's tokens: uint16 or uint32")] = None,
) -> None:
    """Take in text that is tokenised already; train on it with data.prepared=OUT.

    Example: pellucid data import my-gpt/data/openwebtext --tokenizer tokenizer.json --out data/openwebtext
    """
    from pellucid.data.interchange import import_tokens
    from pellucid.training.progress import Shown

    shown = Shown()
    try:
        dataset = import_tokens(
            source, out, tokenizer=tokenizer, kind=format, validation=validation, validation_fraction=validation_fraction,
            sequence_length=sequence_length, field=field, dtype=dtype, progress=shown.stage)
    finally:
        shown.close()
    for name, split in dataset.manifest["splits"].items():
        shown.say(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens")
    shown.say(f"written: {out}; train on it with data.prepared={out}")
