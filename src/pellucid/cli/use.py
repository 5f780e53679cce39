"""Use a model: generate, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.app import Json, app, load_with_tokenizer
from pellucid.config import load_config


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

    network, tokens = load_with_tokenizer(model, tokenizer, dtype)
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

    network, tokens = load_with_tokenizer(model, tokenizer, dtype)
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


def _trained_context(path: Path) -> int | None:
    """The row length of a run; other formats do not say it."""
    if not (path / "config.toml").is_file():
        return None
    return load_config(path / "config.toml").data.sequence_length
