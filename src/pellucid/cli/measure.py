"""What was learned, and what from: six measurements, each with intervals, pictures and a section for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pellucid.cli.app import Json, app, load_with_tokenizer, progress
from pellucid.config import UserError

measure_app = typer.Typer(help="What was learned, and what from: with intervals, pictures, and a section for the report.",
                          no_args_is_help=True)  # fmt: skip
app.add_typer(measure_app, name="measure")

Model = Annotated[str, typer.Argument(help="a run or one of its checkpoints, a Hugging Face directory, or an official ckpt-0")]
Data = Annotated[str | None, typer.Option(help="text to measure on; default: what the run held out")]
Out = Annotated[Path | None, typer.Option(help="folder for the results; default: RUN/measure, else measure/NAME")]
Seed = Annotated[int, typer.Option(min=0)]
Megabytes = Annotated[float, typer.Option(min=0.001, max=1e9, help="of more text than this a sample is taken")]
Jobs = Annotated[int, typer.Option(min=1, help="runs at once, each in an own process")]
Ray = Annotated[str | None, typer.Option(help="run on a Ray cluster: its address, auto, or local")]
Yes = Annotated[bool, typer.Option("--yes", help="start even if it takes more than half an hour")]
RunDir = Annotated[str | None, typer.Option("--run", help="keep the result with this run, for its report")]
Config_ = Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.toml] [key=value ...]")]
Field = Annotated[str, typer.Option(help="field with the text, for jsonl and parquet")]
TokenizerFile = Annotated[Path | None, typer.Option(help="tokenizer file, for a model that brings none")]


def finish(measured: Callable[[Callable[..., None]], Any], out: Path | None, run: str | None, name: str, as_json: bool) -> None:
    """Measure with a progress bar, keep the result, print what it says."""
    from pellucid.measure.outcome import save

    folder = out or (Path(run) / "measure" if run and (Path(run) / "config.toml").is_file() else Path("measure") / name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder with --out")
    with progress() as shown:
        outcome = measured(shown.stage)
    path = save(outcome, folder)
    if as_json:
        print(json.dumps(json.loads(path.read_bytes())))
        return
    for sentence in outcome.findings:
        print(sentence)
    print(f"({outcome.seconds:.0f} s; numbers, pictures and page: {folder}/{name}.*)")


def plan_folder(out: Path | None, name: str) -> Path:
    folder = out or Path("measure") / name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder with --out")
    return folder


def finish_plan(make: Callable[..., Any], describe: Callable[..., Any], name: str, out: Path | None, run: str | None,
                at_once: int, ray: str | None, yes: bool, as_json: bool) -> None:  # fmt: skip
    """Estimate, ask, run what is not finished, keep the result. make(progress) -> (jobs, facts); describe(jobs, results, facts,
    progress) -> the outcome."""
    import time

    from pellucid.measure.plan import Plan

    if run is not None and not (Path(run) / "config.toml").is_file():
        raise UserError(f"--run {run}: not a run directory (it has no config.toml)")
    folder = plan_folder(out, name)

    def measured(progress: Callable[..., None]) -> Any:
        began = time.perf_counter()
        jobs, facts = make(progress)
        plan = Plan(jobs, folder)
        plan.ask(at_once, yes)
        outcome = describe(jobs, plan.run(at_once, ray, progress), facts, progress)
        outcome.seconds = time.perf_counter() - began
        outcome.numbers["job_seconds"] = sum(record["seconds"] for record in plan.finished().values())
        return outcome

    finish(measured, Path(run) / "measure" if run is not None else folder, None, name, as_json)


def text_plan(settings: list[str] | None, extra: list[str]) -> tuple[Any, Callable[..., Any]]:
    """The configuration of a plan on text, small where the user says nothing, and how to prepare its data."""
    from pellucid.cli.app import split_settings
    from pellucid.config import load_config
    from pellucid.data.build import prepare

    path, overrides = split_settings(settings or [])
    config = load_config(path, [*([] if path else extra), *overrides])
    if config.model.init_from is not None or config.training.task != "language_modeling":
        raise UserError("this measurement trains language models from scratch: leave model.init_from and training.task out")
    if config.data.validation_fraction == 0 and not config.data.validation:
        raise UserError("data.validation_fraction = 0: this measurement needs held-out text")
    return config, lambda progress: prepare(config.data, progress=progress)


@measure_app.command()
def capacity(
    parameters: Annotated[str, typer.Option(help="sizes of dense models, with commas")] = "38400",
    loads: Annotated[str, typer.Option(help="random bits, as multiples of 3.6 a parameter")] = "1.6",
    epochs: Annotated[int, typer.Option(min=1, help="times each sequence is seen; more come nearer to the plateau")] = 2400,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    compare: Annotated[str, typer.Option(help="also, at the smallest size: mixture, bf16, optimizers' names")] = "",
    jobs: Jobs = 1,
    ray: Ray = None,
    run: RunDir = None,
    out: Out = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """How many bits the parameters hold: trains on random tokens, of which nothing can be learnt but themselves.

    Example: pellucid measure capacity --parameters 38400,90000 --compare mixture,bf16,muon --jobs 2
    """
    from pellucid.measure.capacity import capacity_jobs, capacity_outcome

    finish_plan(
        lambda progress: (capacity_jobs(numbers(parameters, "--parameters", int), numbers(loads, "--loads", float), epochs=epochs,
                                        seeds=seeds, compare=names(compare), progress=progress), None),
        lambda jobs, results, *_: capacity_outcome(jobs, results), "capacity", out, run, jobs, ray, yes, as_json)  # fmt: skip


@measure_app.command()
def scaling(
    settings: Config_ = None,
    sizes: Annotated[str, typer.Option(help="the ladder: presets or hidden sizes, with commas")] = "16,32,48",
    tokens: Annotated[str, typer.Option(help="amounts of text, with commas")] = "150000,300000,600000",
    trial: Annotated[str, typer.Option(help="SIZE:TOKENS of the larger run that judges the law")] = "64:1200000",
    seed: Seed = 0,
    jobs: Jobs = 1,
    ray: Ray = None,
    run: RunDir = None,
    out: Out = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """How loss falls with parameters and text: a law through a ladder of runs, tried on a larger one.

    Example: pellucid measure scaling corpus.toml --sizes 32,64,96 --tokens 1000000,2000000,4000000 --trial 128:8000000
    """
    from pellucid.measure.scaling import scaling_jobs, scaling_outcome

    config, prepared = text_plan(settings, ["model.preset=tiny", "data.tokenizer.vocab_size=512", "data.sequence_length=64",
                                            "training.batch_size=8"])  # fmt: skip
    size, colon, amount = trial.partition(":")
    if not colon:
        raise UserError(f"--trial {trial}: give SIZE:TOKENS, for example 64:1200000")
    largest = (size, numbers(amount, "--trial", int)[0])
    finish_plan(
        lambda progress: (scaling_jobs(config, prepared(progress), names(sizes), numbers(tokens, "--tokens", int), largest, seed,
                                       progress), None),
        lambda jobs, results, facts, progress: scaling_outcome(results, seed=seed, progress=progress), "scaling", out, run, jobs, ray,
        yes, as_json)  # fmt: skip


@measure_app.command()
def robustness(
    settings: Config_ = None,
    amounts: Annotated[str, typer.Option(help="unique training tokens, with commas")] = "150000,450000",
    tokens: Annotated[int, typer.Option(min=1, help="what each run trains on in all, seeing its text again and again")] = 600_000,
    arms: Annotated[str, typer.Option(help="augmentations to try")] = "synonyms,back-translation,bpe-dropout",
    versions: Annotated[int, typer.Option(min=1, help="augmented versions of each document, besides itself")] = 4,
    seeds: Annotated[int, typer.Option(min=2, help="runs of each kind; two or more, for intervals")] = 3,
    jobs: Jobs = 1,
    ray: Ray = None,
    run: RunDir = None,
    out: Out = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Does it generalise: repeated text, augmentation and narrow text against held-out loss, in paired runs.

    Example: pellucid measure robustness corpus.toml --amounts 100000,400000 --tokens 2000000 --arms synonyms
    """
    from pellucid.measure.robustness import robustness_jobs, robustness_outcome

    config, prepared = text_plan(settings, ["model.preset=tiny", "model.hidden_size=32", "model.num_attention_heads=2",
                                            "data.tokenizer.vocab_size=512", "data.sequence_length=64",
                                            "data.validation_fraction=0.1"])  # fmt: skip
    folder = plan_folder(out, "robustness")
    finish_plan(
        lambda progress: robustness_jobs(config, prepared(progress), folder, amounts=numbers(amounts, "--amounts", int), tokens=tokens,
                                         arms=names(arms), seeds=seeds, versions=versions, progress=progress),
        lambda jobs, results, facts, _: robustness_outcome(jobs, results, facts), "robustness", out, run, jobs, ray,
        yes, as_json)  # fmt: skip


def names(text: str) -> list[str]:
    """What stands between commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def numbers(text: str, option: str, kind: type) -> list:
    """Positive numbers with commas between them."""
    try:
        found = [kind(part) for part in names(text)]
    except ValueError:
        found = []
    if not found or not all(0 < number < math.inf for number in found):
        raise UserError(f"{option} '{text}': not positive numbers with commas between them")
    return list(dict.fromkeys(found))


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

    limit, normalization = int(megabytes * 1e6), None
    dataset = open_dataset(data[0]) if len(data) == 1 else None
    if dataset is not None:
        train, normalization = split_texts(dataset, "train", limit), dataset.config.normalize
        kept = split_texts(dataset, "validation", limit) if dataset.validation is not None else None
    else:
        train, kept = file_texts(data, limit, "DATA", text_field), None
    if held_out is not None:
        kept = file_texts([held_out], limit, "--held-out", text_field, normalization)
    embed = None
    if model is not None:
        network, tokenizer = load_with_tokenizer(model, None, "float32")
        embed = lambda texts: pooled_states(network, tokenizer, texts, trained_context(model) or 256)
    finish(lambda progress: measure_diversity(train, kept, ngram=ngram, seed=seed, embed=embed, progress=progress),
           out, data[0] if dataset is not None else None, "diversity", as_json)  # fmt: skip


def trained_context(model: str) -> int | None:
    """The row length of a run; other formats do not say it."""
    from pellucid.measure.texts import trained_with

    settings = trained_with(model)
    return settings and settings.sequence_length
