"""The `pellucid` command: thin commands that parse arguments and print; all logic lies below.

A user's mistake is one sentence on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pellucid.config import UserError, load_config, preset_names

app = typer.Typer(
    name="pellucid",
    help="Train language models of the Grok-1 architecture, and see how every parameter is adjusted on the way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Picture 2 alone: prepare text, look into what was prepared.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="print the answer as JSON")]


def main() -> None:
    """Entry point: runs a command; a UserError becomes one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"pellucid: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # the machine's refusal: a full disk, a folder without permission
        place = f"{error.filename}: " if error.filename else ""
        print(f"pellucid: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pellucid: interrupted", file=sys.stderr)
        sys.exit(130)


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

    path, overrides = _split_settings(settings or [])
    config: Any = path
    if path is None and resume and run_dir is not None:
        config = runs.Run(run_dir).directory / "config.toml"
    if overrides or config is not None:
        config = load_config(config, overrides)
    if run_dir is None and not resume:
        run_dir = runs.next_run_dir(runs.run_name(path))
    runs.train(config, run_dir=run_dir, resume=resume, progress=True)


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
        dataset = prepare(load_config(*_split_settings(settings)).data, directory=out, progress=shown.stage)
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


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a run, a Hugging Face directory, or an official ckpt-0")],
    prompt: Annotated[str, typer.Option(help="text to continue; empty begins a new document")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="smallest set of tokens that reaches p")] = 0.95,
    top_k: Annotated[int | None, typer.Option(min=1, help="only the k most likely tokens")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer file, for a model that brings none")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
) -> None:
    """Continue a text, token by token.

    Example: pellucid generate runs/demo --prompt "def read(" --temperature 0.7 --stop "def "
    """
    from pellucid.model.generate import generate as generate_text

    network, tokens = _load(model, tokenizer, dtype)
    print(prompt, end="", flush=True)
    pieces = generate_text(
        network, tokens, prompt, stop=stop or [], max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed,
    )  # fmt: skip
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a run, a Hugging Face directory, or an official ckpt-0")],
    data: Annotated[str, typer.Option(help="file, glob, directory or builtin source to predict")],
    text_field: Annotated[str, typer.Option(help="field with the text, for jsonl and parquet")] = "text",
    context: Annotated[int | None, typer.Option(min=2, help="tokens per window; default: as trained")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer file, for a model that brings none")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte of a model over whole files.

    Example: pellucid evaluate runs/demo --data README.md
    """
    from rich.console import Console

    from pellucid.measure.files import evaluate_files
    from pellucid.training.progress import Quiet, Shown

    network, tokens = _load(model, tokenizer, dtype)
    console = Console(stderr=True, highlight=False)  # stdout holds the answer alone
    shown = Shown(console) if console.is_terminal else Quiet()
    try:
        context = context or _trained_context(Path(model))
        result = evaluate_files(network, tokens, data, text_field, context, progress=shown.stage)
    finally:
        shown.close()
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    print(f"loss            {result.loss:.4f} nats per token")
    print(f"perplexity      {result.perplexity:.2f}")
    print(f"bits per byte   {result.bits_per_byte:.4f}")
    print(f"over            {result.tokens:,} tokens, {result.text_bytes:,} bytes of text")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a run, a Hugging Face directory, or an official ckpt-0")],
    destination: Annotated[Path, typer.Argument(help="new folder")],
    to: Annotated[str, typer.Option(help="hf (safetensors, for other engines) or xai (the official int8 layout)")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="of the written matrices, for hf: float32 or bfloat16")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with [model], for a ckpt-0 that is not Grok-1 itself")] = None,
) -> None:
    """Rewrite a model in another format, one tensor in memory at a time.

    Example: pellucid convert ckpt-0 grok-1-hf --to hf --dtype bfloat16
    """
    from pellucid.exchange.convert import convert as convert_model
    from pellucid.training.progress import Shown

    shown = Shown()
    try:
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


def _split_settings(settings: list[str]) -> tuple[Path | None, list[str]]:
    """A first argument without '=' is the configuration file."""
    if settings and "=" not in settings[0]:
        return Path(settings[0]), settings[1:]
    return None, settings


def _trained_context(path: Path) -> int | None:
    """The row length of a run; other formats do not say it."""
    if not (path / "config.toml").is_file():
        return None
    return load_config(path / "config.toml").data.sequence_length


def _short(number: float) -> str:
    """4096 as it is, 1234567 as 1.23 M."""
    if number < 10_000:
        return f"{number:g}"
    for unit in ("k", "M", "G", "T", "P"):
        number /= 1000
        if number < 1000 or unit == "P":
            return f"{number:.3g} {unit}"


def _load(model: str, tokenizer: Path | None, dtype: str) -> tuple[Any, Any]:
    from pellucid.data.tokenizer import load_tokenizer
    from pellucid.exchange.load import load

    network, tokens = load(model, dtype=dtype)
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        if tokens is not None and given.fingerprint != tokens.fingerprint:
            raise UserError(f"{tokenizer}: not the tokenizer that {model} was trained with and brings along; leave it out")
        tokens = given
    if tokens is None:
        raise UserError(f"{model}: brings no tokenizer; give the one it was trained with: --tokenizer FILE")
    if tokens.vocab_size > network.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokens.vocab_size} tokens but the model only {network.config.vocab_size}: "
            "it is the tokenizer of another model"
        )
    return network, tokens
