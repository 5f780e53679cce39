"""Use a model: generate, predict, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pellucid.cli.app import Json, app, in_json, load_with_tokenizer, progress
from pellucid.config import UserError

NEW_TOKENS = 200


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a run or one of its checkpoints, a Hugging Face directory, or an official ckpt-0")],
    prompt: Annotated[str, typer.Option(help="text to continue; empty begins a new document")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="default 200, or as many as the model has room for")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="smallest set of tokens that reaches p")] = 0.95,
    top_k: Annotated[int | None, typer.Option(min=1, help="only the k most likely tokens")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer file, for a model that brings none")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
) -> None:
    """Continue a text, token by token.

    Example: pellucid generate runs/demo --prompt "def read(" --temperature 0.7 --stop "def "
    """
    from pellucid.model.generate import generate as generate_text

    if "" in (stop or []):
        raise UserError("--stop: an empty text would end before the first token; leave it out")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("--prompt: not valid UTF-8")
    network, tokens = load_with_tokenizer(model, tokenizer, dtype)
    if network.config.head is not None:
        raise UserError(f"{model} labels documents and does not continue texts: use `pellucid predict`")
    length, most = max(1, len(tokens.encode(prompt))), network.config.max_position_embeddings
    if length + (max_new_tokens or 1) > most:
        raise UserError(f"a prompt of {length} tokens and --max-new-tokens {max_new_tokens or 1} are more than the {most} that the "
                        "model is meant for (max_position_embeddings)")  # fmt: skip
    max_new_tokens = max_new_tokens or min(NEW_TOKENS, most - length)
    print(prompt, end="", flush=True)
    pieces = generate_text(
        network, tokens, prompt, stop=stop or [], max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed,
    )  # fmt: skip
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="a run, or its model/ folder, of a classification or regression")],
    data: Annotated[str, typer.Option(help="file, glob or directory of documents to label")],
    text_field: Annotated[str, typer.Option(help="field with the text, for jsonl, csv and tables")] = "text",
    out: Annotated[Path | None, typer.Option(help="write to this .csv or .jsonl file instead of the terminal")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a line instead of CSV")] = False,
) -> None:
    """Label documents: their class with all probabilities, or their numbers. One line each, in their order.

    Example: pellucid predict runs/languages --data new.jsonl --out labelled.csv
    """
    from pellucid.measure.documents import predict_files
    from pellucid.measure.tables import write_rows
    from pellucid.measure.texts import trained_with

    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--out {out}: give a name that ends in .csv or .jsonl")
    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists already; remove it, or choose another name")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    network, tokens = load_with_tokenizer(model, None, dtype)
    settings = trained_with(model)
    with progress() as shown:
        rows = predict_files(network, tokens, data, text_field, settings and settings.normalize, progress=shown.stage)
        write_rows(rows, out, "jsonl" if as_json or (out is not None and out.suffix == ".jsonl") else "csv")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a run or one of its checkpoints, a Hugging Face directory, or an official ckpt-0")],
    data: Annotated[str | None, typer.Option(help="file, glob, directory or builtin source; default: what the run held out")] = None,
    harness: Annotated[list[str] | None, typer.Option(help="instead: a task of lm-eval, or a task file; several times")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="with --harness: questions of each task")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="with --harness: examples before each question")] = None,
    label_field: Annotated[list[str] | None, typer.Option(help="of labelled documents; default: as trained")] = None,
    text_field: Annotated[str, typer.Option(help="field with the text, for jsonl and parquet")] = "text",
    context: Annotated[int | None, typer.Option(min=2, help="tokens per window; default: as trained")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer file, for a model that brings none")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte over what the run held out or over whole files; or how well documents are labelled.

    With --harness: EleutherAI's lm-evaluation-harness asks it one of its tasks, or one of a file of yours.
    Example: pellucid evaluate runs/demo --data README.md
    """
    from pellucid.measure.files import DEFAULT_CONTEXT, evaluate_files, evaluate_held_out
    from pellucid.measure.texts import held_out_by, trained_with

    if data is not None and harness:
        raise UserError("give either --data FILE or --harness TASK, or neither for what the run held out")
    if data is None and not harness:
        for option, given in (("--label-field", label_field), ("--text-field", text_field != "text"), ("--context", context),
                              ("--tokenizer", tokenizer)):  # fmt: skip
            if given:
                raise UserError(f"{option}: what the run held out is read as in its training; it is for --data FILE")
        held_out = held_out_by(model)
        network, _ = load_with_tokenizer(model, None, dtype)
        with progress() as shown:
            result, cut = evaluate_held_out(network, model, held_out, shown.stage)
        return _tell(result, cut, as_json)
    network, tokens = load_with_tokenizer(model, tokenizer, dtype)
    if network.config.head is not None:
        if harness:
            raise UserError(f"--harness: {model} labels documents; the harness asks language models")
        return _evaluate_labels(network, tokens, model, data, label_field, text_field, as_json)
    if label_field:
        raise UserError(f"--label-field: {model} is a language model, which labels no documents")
    settings, most = trained_with(model), network.config.max_position_embeddings
    if context is not None and context > most:
        raise UserError(f"--context {context}: the model is meant for at most {most} tokens (max_position_embeddings)")
    context = context or (settings and settings.sequence_length)
    if harness:
        from pellucid.measure.harness import run_harness

        context = context or min(DEFAULT_CONTEXT, most)
        with progress() as shown:
            found = run_harness(network, tokens, harness, context, limit=limit, few_shot=few_shot, progress=shown.stage)
        print(in_json(found) if as_json else _measures(found))
        return
    with progress() as shown:
        result = evaluate_files(network, tokens, data, text_field, context, progress=shown.stage,
                                normalization=settings and settings.normalize)  # fmt: skip
    _tell(result, 0, as_json)


def _measures(found: dict[str, dict]) -> str:
    """A line a measure of the harness; its standard error beside it."""
    lines = []
    for task, row in found.items():
        for name, value in row.items():
            measure, _, filtered = name.partition(",")
            if isinstance(value, float) and not measure.endswith("_stderr"):
                error = row.get(f"{measure}_stderr,{filtered}")
                lines.append(f"{task:<24} {measure:<20} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    return "\n".join(lines)


def _evaluate_labels(network, tokens, model: str, data: str, label_fields, text_field: str, as_json: bool) -> None:
    from pellucid.measure.documents import evaluate_labels
    from pellucid.measure.texts import trained_with

    settings = trained_with(model)
    fields = label_fields or (settings.label_fields if settings else ())
    with progress() as shown:
        result, cut = evaluate_labels(
            network, tokens, data, fields, text_field, settings and settings.normalize, progress=shown.stage)  # fmt: skip
    _tell(result, cut, as_json)


def _tell(result, cut: int, as_json: bool) -> None:
    """An evaluation of text, or of labelled documents of which `cut` were cut to length."""
    from pellucid.measure.tables import describe_labels
    from pellucid.training.evaluate import Evaluation

    text = isinstance(result, Evaluation)
    facts = result.as_dict() | ({} if text else {"truncated_documents": cut})
    if as_json or not text:
        print(in_json(facts) if as_json else describe_labels(facts))
        return
    print(f"loss            {result.loss:.4f} nats per token")
    print(f"perplexity      {result.perplexity:.2f}")
    print(f"bits per byte   {result.bits_per_byte:.4f}")
    print(f"over            {result.tokens:,} tokens, {result.text_bytes:,} bytes of text")
