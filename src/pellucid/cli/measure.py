"""What was learned, and what from: six measurements, each with intervals, pictures and a section for the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pellucid.cli.app import Json, app, load_with_tokenizer
from pellucid.config import UserError

measure_app = typer.Typer(help="What was learned, and what from: with intervals, pictures, and a section for the report.",
                          no_args_is_help=True)  # fmt: skip
app.add_typer(measure_app, name="measure")

Model = Annotated[str, typer.Argument(help="a run, a Hugging Face directory, or an official ckpt-0")]
Data = Annotated[str | None, typer.Option(help="text to measure on; default: what the run held out")]
Out = Annotated[Path | None, typer.Option(help="folder for the results; default: RUN/measure, else measure/NAME")]
Seed = Annotated[int, typer.Option(min=0)]
Megabytes = Annotated[float, typer.Option(min=0.001, help="of more text than this a sample is taken")]
Field = Annotated[str, typer.Option(help="field with the text, for jsonl and parquet")]
TokenizerFile = Annotated[Path | None, typer.Option(help="tokenizer file, for a model that brings none")]


def finish(measured: Callable[[Callable[..., None]], Any], out: Path | None, run: str | None, name: str, as_json: bool) -> None:
    """Measure with a progress bar, keep the result, print what it says."""
    from rich.console import Console

    from pellucid.measure.outcome import save
    from pellucid.training.progress import Quiet, Shown

    folder = out or (Path(run) / "measure" if run and (Path(run) / "config.toml").is_file() else Path("measure") / name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder with --out")
    console = Console(stderr=True, highlight=False)  # stdout holds the answer alone
    shown = Shown(console) if console.is_terminal else Quiet()
    try:
        outcome = measured(shown.stage)
    finally:
        shown.close()
    path = save(outcome, folder)
    if as_json:
        print(json.dumps(json.loads(path.read_bytes())))
        return
    for sentence in outcome.findings:
        print(sentence)
    print(f"({outcome.seconds:.0f} s; numbers, pictures and page: {folder}/{name}.*)")


@measure_app.command()
def context(
    model: Model,
    data: Data = None,
    context: Annotated[int | None, typer.Option(min=16, help="most tokens given; default: as trained")] = None,
    predictions: Annotated[int, typer.Option(min=16, help="tokens predicted under each kind of context")] = 512,
    copies: Annotated[int, typer.Option(min=2, help="rows of repeated random tokens")] = 64,
    megabytes: Megabytes = 4.0,
    text_field: Field = "text",
    tokenizer: TokenizerFile = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """How much of the text before a model uses: loss by position, with other context, and when it can copy.

    Example: pellucid measure context runs/demo
    """
    from pellucid.measure.context import measure_context
    from pellucid.measure.texts import token_losses, token_streams

    network, tokens = load_with_tokenizer(model, tokenizer, "float32")
    if network.config.head is not None:
        raise UserError(f"measure context: {model} labels documents; its loss is not one of next tokens")
    streams = token_streams(model, data, tokens, int(megabytes * 1e6), text_field)
    length = context or trained_context(model) or 256
    finish(lambda progress: measure_context(
        lambda inputs, targets: token_losses(network, inputs, targets), streams, tokens.vocab_size, context=length,
        predictions=predictions, copies=copies, seed=seed, progress=progress), out, model, "context", as_json)  # fmt: skip


@measure_app.command()
def experts(
    model: Model,
    data: Data = None,
    context: Annotated[int | None, typer.Option(min=2, help="tokens per window; default: as trained")] = None,
    megabytes: Megabytes = 0.2,
    text_field: Field = "text",
    tokenizer: TokenizerFile = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What experts do: which tokens they take, how alike they are, and how routing settled over the kept checkpoints.

    Example: pellucid measure experts runs/demo   (train with checkpoint.keep_last=20 to see routing settle)
    """
    from pellucid.measure.experts import measure_experts
    from pellucid.measure.texts import token_streams

    network, tokens = load_with_tokenizer(model, tokenizer, "float32")
    streams = token_streams(model, data, tokens, int(megabytes * 1e6), text_field)
    run = model if (Path(model) / "config.toml").is_file() else None
    finish(lambda progress: measure_experts(network, tokens, streams, context=context or trained_context(model) or 256,
                                            run=run, seed=seed, progress=progress), out, model, "experts", as_json)  # fmt: skip


@measure_app.command()
def diversity(
    data: Annotated[list[str], typer.Argument(help="a run, prepared data, or files, folders, globs and builtins")],
    held_out: Annotated[str | None, typer.Option(help="held-out text; default: what the run or the data held out")] = None,
    model: Annotated[str | None, typer.Option(help="also compare documents by this model's states")] = None,
    ngram: Annotated[int, typer.Option(min=1, help="words in common that count as overlap")] = 13,
    megabytes: Megabytes = 16.0,
    text_field: Field = "text",
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """How varied a text is: entropies, compression, vocabulary growth, near-duplicates, sources, Vendi score, overlap.

    Example: pellucid measure diversity corpus/ --held-out exam.txt
    """
    from pellucid.measure.diversity import measure_diversity
    from pellucid.measure.texts import file_texts, open_dataset, pooled_states, split_texts

    limit = int(megabytes * 1e6)
    dataset = open_dataset(data[0]) if len(data) == 1 else None
    if dataset is not None:
        train = split_texts(dataset, "train", limit)
        kept = split_texts(dataset, "validation", limit) if dataset.validation is not None else None
    else:
        train, kept = file_texts(data, limit, "DATA", text_field), None
    if held_out is not None:
        kept = file_texts([held_out], limit, "--held-out", text_field)
    embed = None
    if model is not None:
        network, tokenizer = load_with_tokenizer(model, None, "float32")
        embed = lambda texts: pooled_states(network, tokenizer, texts, trained_context(model) or 256)
    finish(lambda progress: measure_diversity(train, kept, ngram=ngram, seed=seed, embed=embed, progress=progress),
           out, data[0] if dataset is not None else None, "diversity", as_json)  # fmt: skip


def trained_context(model: str) -> int | None:
    """The row length of a run; other formats do not say it."""
    from pellucid.cli.use import trained_with

    settings = trained_with(Path(model))
    return settings and settings.sequence_length
