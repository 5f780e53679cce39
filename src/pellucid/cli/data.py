"""Picture 2 alone: prepare text, look into what was prepared."""

from __future__ import annotations

import shlex
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from pellucid.cli.app import Json, answer, app, progress, split_settings
from pellucid.config import load_config

data_app = typer.Typer(help="Picture 2 alone: prepare text, look into what was prepared.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("build")
def data_build(
    settings: Annotated[list[str], typer.Argument(metavar="CONFIG.toml [key=value ...]")],
    out: Annotated[Path, typer.Option(help="folder to write; for --ray one that every node sees under this path")],
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one per core for a large corpus")] = None,
    ray: Annotated[str | None, typer.Option(help="a Ray cluster: auto, HOST:PORT, or local (one started here)")] = None,
) -> None:
    """Prepare the data of a configuration: read, normalize, train the tokenizer, tokenize, write checked shards.

    The bytes written do not depend on who does the work. Killed at any moment, the same command goes on.

    Example: pellucid data build corpus.toml --out data/corpus --workers 8
    """
    from pellucid.data.build import prepare
    from pellucid.data.ray_workers import Ray
    from pellucid.training.progress import Shown

    config = load_config(*split_settings(settings)).data
    config.workers = workers or config.workers
    with closing(Shown()) as shown:
        cluster = Ray(ray, config.workers) if ray else None
        dataset = prepare(config, directory=out, progress=shown.stage, workers=cluster)
    _say_left_out(shown, dataset.manifest)
    _say_splits(shown, dataset)
    shown.say(f"{'found ready' if dataset.reused else 'written'}: {out}")


def _say_left_out(shown: Any, manifest: dict[str, Any]) -> None:
    for stage in manifest["stages"]:
        if stage["dropped"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in stage["dropped"].items())
            shown.say(f"{stage['name']}: {sum(stage['dropped'].values()):,} left out ({reasons})")
    if silent := [file["uri"] for file in manifest["sources"] if file["documents"] == 0]:
        shown.say(f"files without a document: {len(silent):,}, the first {silent[0]}")


def _say_splits(shown: Any, dataset: Any) -> None:
    for name, split in dataset.manifest["splits"].items():
        shown.say(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['text_bytes']:,} bytes")


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="folder of prepared data")],
    token: Annotated[int | None, typer.Option(help="where this token of the split came from, instead")] = None,
    document: Annotated[int | None, typer.Option(help="where this document of the split came from, instead")] = None,
    split: Annotated[str, typer.Option(help="train or validation, for --token and --document")] = "train",
    as_json: Json = False,
) -> None:
    """Counts of every stage, samples before and after, statistics; or where one token came from.

    Example: pellucid data inspect data/corpus --token 12345
    """
    from pellucid.data.dataset import Dataset
    from pellucid.data.inspect import describe, describe_origin
    from pellucid.data.origin import origin
    from pellucid.data.statistics import statistics

    dataset = Dataset(folder, verify=False)
    if token is not None or document is not None:
        found = origin(dataset, split, token=token, document=document)
        answer(found, as_json, lambda: describe_origin(found))
        return
    with progress() as shown:
        numbers = statistics(dataset, shown.stage)
    answer({**dataset.manifest, "statistics": numbers}, as_json, lambda: describe(dataset.manifest, numbers))


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

    with closing(Shown()) as shown:
        export_tokens(Dataset(folder), to, out, dtype=dtype, progress=shown.stage)
    shown.say(f"written: {out}")


@data_app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(help=".idx, .bin, .parquet, .arrow, hf-dataset:NAME, or a folder of such files")],
    out: Annotated[Path, typer.Option(help="new folder of prepared data")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer that made the tokens; default: SOURCE/tokenizer")] = None,
    format: Annotated[str | None, typer.Option("--from", help="megatron, nanogpt or table; default: by the file")] = None,
    validation: Annotated[str | None, typer.Option(help="held-out tokens; default: val.bin in SOURCE, else a fraction")] = None,
    validation_fraction: Annotated[float, typer.Option(min=0.0, max=0.99, help="of the documents")] = 0.02,
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens per row; must be the run's")] = 128,
    field: Annotated[str, typer.Option(help="column of token ids, of a table")] = "input_ids",
    dtype: Annotated[str | None, typer.Option(help="of nanogpt's tokens: uint16 or uint32")] = None,
) -> None:
    """Take in text that is tokenised already; train on it with data.prepared=OUT.

    Example: pellucid data import my-gpt/data/openwebtext --tokenizer tokenizer.json --out data/openwebtext
    """
    from pellucid.data.interchange import import_tokens
    from pellucid.training.progress import Shown

    with closing(Shown()) as shown:
        dataset = import_tokens(
            source, out, tokenizer=tokenizer, kind=format, validation=validation, validation_fraction=validation_fraction,
            sequence_length=sequence_length, field=field, dtype=dtype, progress=shown.stage)
    _say_splits(shown, dataset)
    shown.say(f"written: {out}; train on it with {shlex.quote(f'data.prepared={out}')} data.sequence_length={sequence_length}")


@data_app.command("search")
def data_search(
    text: Annotated[str, typer.Argument(help="what to look for, exactly")],
    places: Annotated[list[str] | None, typer.Argument(help="runs, or folders of prepared data; default: runs/*")] = None,
    limit: Annotated[int, typer.Option(min=1, help="documents to describe; all are counted")] = 20,
    as_json: Json = False,
) -> None:
    """Which documents hold a text (file, bytes, context), and which steps of the runs saw it.

    Example: pellucid data search "it is a truth universally" runs/demo
    """
    from pellucid.observe.sightings import find, render

    with progress() as shown:
        results = find(text, places or [], limit=limit, progress=shown.stage)
    answer([result.as_dict() for result in results], as_json, lambda: render(results))
