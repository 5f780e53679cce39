"""Models as files, and the machine: convert, plan, doctor, version."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pellucid.cli.app import Json, app, progress
from pellucid.config import load_config, preset_names


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a run or a checkpoint of it, a Hugging Face folder, a ckpt-0, or a tokenizer.model")],
    destination: Annotated[Path, typer.Argument(help="new folder")],
    to: Annotated[str, typer.Option(help="hf (safetensors, for other engines) or xai (the official int8 layout)")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="of the written matrices, for hf: float32 or bfloat16")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with [model], for a ckpt-0 that is not Grok-1 itself")] = None,
) -> None:
    """Rewrite a model in another format, one tensor in memory at a time; or a tokenizer.model with an exact tokenizer.json.

    Example: pellucid convert ckpt-0 grok-1-hf --to hf --dtype bfloat16
    """
    from pellucid.data.tokenizer import read_by_sentencepiece_alone
    from pellucid.exchange.convert import convert as convert_model
    from pellucid.exchange.convert import convert_tokenizer
    from pellucid.exchange.load import find_tokenizer_folder
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
    if to == "xai" and (tokenizer := find_tokenizer_folder(Path(source))) is not None:
        shown.say(f"this layout has no place for a tokenizer; give the model's own with --tokenizer {shlex.quote(str(tokenizer))}")
    if (note := read_by_sentencepiece_alone(destination)) is not None:
        shown.say(note)


@app.command()
def plan(
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="[PRESET | CONFIG.toml ...] [key=value ...]", help="what to plan; default: a table of all presets")] = None,
    memory: Annotated[str | None, typer.Option(
        help="an amount, like 24GiB: the longest context that trains in it, for each way to recompute")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: this machine's GPU, or where it has none a Hopper card")] = "cpu",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Sizes before anything is spent: parameters, active parameters, FLOPs per token, memory to train.

    Of what is named, one training step is done dry, without memory, to find its peak: weights, gradients, moments, and
    all that stands between, by training.recompute, micro_batch_size, optimizer.state_dtype and the rest.

    Example: pellucid plan base training.recompute=all optimizer.state_dtype=bf16 --memory 24GiB
    """  # fmt: skip
    from pellucid.measure import memory as peaks
    from pellucid.model.size import sizes
    from pellucid.training.device import choose_device

    if device != "cuda":
        choose_device(device, "--device")
    names = [word for word in settings or [] if "=" not in word]
    overrides = [word for word in settings or [] if "=" in word]
    if names or not (overrides or memory):
        configs = {name: _planned(name, overrides) for name in names or preset_names()}
    else:
        config = _fitted(load_config(None, overrides))
        configs = {config.model.preset or config.model.init_from: config}
    named = list(configs) if names or overrides or memory else []
    rows = sizes(configs)
    budget = peaks.parse_bytes(memory) if memory is not None else None
    with progress() as shown:
        for name in named:
            config = configs[name]
            shown.stage(f"{name}: a dry step", 0, None)
            rows[name] |= {"peak": peaks.predict_peak(config, device).as_dict(), "program": peaks.program_bytes(device)}
            if budget is not None:
                tell = lambda tokens, name=name: shown.stage(f"{name}: dry steps", 0, None, f"{tokens:,} tokens")
                found = peaks.largest_context(config, budget - rows[name]["program"], device, tell)
                rows[name]["contexts"] = {mode: fit and {"tokens": fit[0], **fit[1].as_dict()} for mode, fit in found.items()}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = [key for key in next(iter(rows.values())) if key not in ("peak", "program", "contexts")]
    lines = [["preset", *columns]] + [[name, *(_short(row[key]) for key in columns)] for name, row in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)), sep="  ")
    for name in named:
        _print_memory(name, configs[name], rows[name], memory)


def _planned(name: str, overrides: list[str]) -> Any:
    if name.endswith(".toml"):
        return _fitted(load_config(name, overrides))
    return _fitted(load_config(None, [f"model.preset={name}", *overrides]))


def _fitted(config: Any) -> Any:
    """With the shape of model.init_from, and the vocabulary."""
    from pellucid.measure.memory import with_vocabulary
    from pellucid.run import start_from

    if config.model.init_from is not None:
        start_from(config)
    return with_vocabulary(config)


def _print_memory(name: str, config: Any, row: dict[str, Any], memory: str | None) -> None:
    peak, training = row["peak"], config.training
    kinds = ", ".join(f"{kind} {_short(peak[kind])}B" for kind in ("weights", "gradients", "moments", "activations", "libraries")
                      if 1000 * peak.get(kind, 0) >= peak["bytes"])  # fmt: skip
    print(f"\n{name}: peak {_short(peak['bytes'])}B, in the {peak['phase']}: {kinds}; the program itself holds about "
          f"{_short(row['program'])}B\n  with {training.micro_batch_size} x {config.data.sequence_length} tokens at once, "
          f"recompute {training.recompute}, {config.optimizer.name} with {config.optimizer.state_dtype} moments")  # fmt: skip
    for mode, fit in row.get("contexts", {}).items():
        longest = "nothing fits" if fit is None else f"{fit['tokens']:,} tokens (peak {_short(fit['bytes'])}B)"
        print(f"  in {memory}, one sequence at a time, recompute {mode}: {longest}")


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
