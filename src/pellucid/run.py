"""A run: from a configuration to a trained model in a folder of its own (see run_files.py)."""

from __future__ import annotations

import contextlib
import gc
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pellucid import summary
from pellucid.config import Config, HeadConfig, ModelConfig, TokenizerConfig, UserError, load_config, make_config, nearest
from pellucid.data.build import prepare
from pellucid.data.dataset import Dataset
from pellucid.data.place import folder_of_run
from pellucid.data.tokenizer import Tokenizer, load_tokenizer, read_by_sentencepiece_alone
from pellucid.exchange.huggingface import save_huggingface
from pellucid.exchange.leaves import Source, fill
from pellucid.exchange.load import find_tokenizer, find_tokenizer_folder, open_source
from pellucid.measure.enough_memory import refuse_beyond_memory
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.size import parameter_counts
from pellucid.observe.export import check_tools, export
from pellucid.observe.observer import SilentObserver, open_observer
from pellucid.observe.replay import forget_capsules
from pellucid.observe.theatre import stage_last
from pellucid.run_files import Run, note_changes, resolved_config, run_name, write_run_files
from pellucid.training.checkpoint import diff_settings, saved_steps
from pellucid.training.device import (
    choose_device,
    choose_precision,
    keep_threads,
    keeping_freed_memory,
    other_kernels,
    resolve_precision,
)
from pellucid.training.lock import only_trainer
from pellucid.training.loop import Loop, budget_in_steps
from pellucid.training.optimizers import build_optimizer
from pellucid.training.progress import Quiet, Shown, after

MOST_PLAYED_PARAMETERS = 50_000_000


def train(
    config: Config | dict | str | Path | None = None, *, run_dir: str | Path | None = None, resume: bool = False,
    name: str | None = None, progress: bool = False,
) -> Run:  # fmt: skip
    """Train a model from raw text and return its run. Raises UserError for anything the user can mend.

    config: a Config, its tables as a dict, a TOML file, or None: the embedded default, a small model on Python's own
    standard library. run_dir: a new folder (default runs/NAME, runs/NAME-2, ...); with `resume`, the one to continue
    (config None then means its own). name: that NAME, by default the configuration file's. progress: show a bar.
    """
    if resume and run_dir is None:
        raise UserError("to resume, say which run: --run-dir runs/NAME --resume")
    if resume:
        own = Run(run_dir).config
        config = own if config is None else config
    name = name or ("run" if isinstance(config, Config | dict) else run_name(config))
    folder = Path(run_dir) if run_dir is not None else None
    if not resume and folder is not None and folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: exists already; choose another --run-dir, or continue it with --resume")
    if isinstance(config, dict):
        config = make_config(config)
    elif not isinstance(config, Config):
        config = load_config(config)
    check_tools(config.observe.export)
    shown = Shown() if progress else Quiet()
    with contextlib.ExitStack() as held:
        held.callback(shown.close)
        held.callback(torch.set_num_threads, torch.get_num_threads())  # the caller's: a resumed run takes the number it began with
        run = _train(resolved_config(config), folder, name, resume, shown, held)
        if run.stopped_by is None:
            _stage_plays(shown, run)
        for tool in config.observe.export:
            shown.say(f"exported: {export(run.directory, tool)}")
        if run.stopped_by is None:
            shown.say(summary.what_next(run))
        return run


def _train(config: Config, folder: Path | None, name: str, resume: bool, progress: Quiet, held: contextlib.ExitStack) -> Run:
    """`held` takes the run's lock: it is ours to the end of `train`. folder None: runs/NAME or the next, once its data are there."""
    device = choose_device(config.training.device)  # before any work is spent
    asked = config.data.tokenizer
    brought = config.model.init_from is not None and asked.kind != "file"  # the tokenizer, by the origin
    begun = resume and bool(saved_steps(folder / "checkpoints"))
    if resume:
        if begun and config.model.init_from is not None:
            _go_on_without_origin(config, Run(folder).config)
        _refuse_other_settings(Run(folder), config)
        held.enter_context(only_trainer(folder))
    origin = start_from(config) if config.model.init_from is not None and not begun else None
    if origin is not None and brought and asked.model_fields_set & {"kind", "vocab_size"}:
        progress.say(f"the tokenizer is that of {config.model.init_from}; what data.tokenizer asks for is passed over")
    moved = _moved_with_run(Run(folder), config) if resume else None
    if moved is not None:
        progress.say(f"its data were moved with it: {moved}")
    dataset = prepare(config.data, progress=progress.stage) if moved is None else Dataset(moved, run=config.data)
    progress.close()
    if origin is not None and config.data.prepared is not None:
        _refuse_other_tokenizer(Path(config.model.init_from), dataset.tokenizer, "data.prepared")
    if resume and (began := Run(folder).manifest["data"])["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{folder}: cannot resume, its data have changed since it began: those were prepared in {began['directory']}, "
                        f"these in {dataset.directory}; put the sources back as they were, or start anew in another --run-dir")
    if brought:
        config.data.tokenizer = _from_file(dataset.directory / "tokenizer", asked)
    _fit_vocabulary(config, dataset)
    _fit_labels(config, dataset)
    budget_in_steps(config, dataset.split("train", config.training.seed))  # refuses more than there is, with nothing written
    config.training.precision = resolve_precision(config.training.precision, device)
    if device.type == "cpu":
        refuse_beyond_memory(config)
    model = initialize(Grok1(config.model, device=device), config.training.seed)
    if origin is not None:
        fill(model, origin)
    model.compute_dtype, model.parity = choose_precision(config.training.precision, device)
    model.recompute = config.training.recompute
    optimizer = build_optimizer(model, config.optimizer, config.training.seed)
    if not resume:
        folder = write_run_files(folder, name, config, dataset)
        held.enter_context(only_trainer(folder))
    run = Run(folder)
    if resume and device.type == "cpu" and (note := keep_threads(run.threads)):
        progress.say(note)
    if resume and device.type == "cpu" and (note := other_kernels(run.manifest.get("machine", {}).get("kernels"))):
        progress.say(note)
    loop = Loop(config, model, optimizer, dataset, folder, SilentObserver(), progress)
    if resume:
        loop.resume()
        if loop.counters.step > loop.max_steps:
            raise UserError(f"{folder}: has done {loop.counters.step} steps already, more than the {loop.max_steps} that are asked "
                            "for: give it a longer budget, or start anew in another --run-dir")  # fmt: skip
    with _observing(loop, new=not resume) as observer:
        loop.observer = observer
        if resume:
            observer.resume(loop.counters.step)
            forget_capsules(folder, loop.counters.step)
            note_changes(run, config, loop.counters.step, dataset)
            if loop.counters.step < loop.max_steps:
                shutil.rmtree(folder / "model", ignore_errors=True)  # it is no longer the end of this run
        progress.say(summary.describe(loop, folder))
        if origin is not None:
            loop.save()  # where it began, so that the run can be continued and explained without the origin
        if loop.counters.step == 0:
            summary.show_sample(progress, "before training", loop)
        with keeping_freed_memory() if device.type == "cpu" else contextlib.nullcontext():
            run.stopped_by = loop.run()
        if run.stopped_by is not None:
            progress.say(f"stopped by {run.stopped_by} {after(loop.counters.step)}; everything is saved. To go on:\n"
                         f"  pellucid train --run-dir {shlex.quote(str(folder))} --resume")  # fmt: skip
            return run
        save_huggingface(model, dataset.tokenizer, folder / "model", replace=True)
        summary.show_sample(progress, "after training", loop)
        summary.show_result(progress, loop)
        if (note := read_by_sentencepiece_alone(folder / "model")) is not None:
            progress.say(note)
    return run


@contextlib.contextmanager
def _observing(loop: Loop, new: bool) -> Iterator[SilentObserver]:
    """The run's observer. A new run that cannot be observed (a full disk, say), is interrupted before its first step or ends in it (of
    too little memory) leaves no folder behind."""
    try:
        with open_observer(loop.run_dir, loop.model, loop.optimizer, loop.config, loop.dataset) as observer:
            yield observer
    except (UserError, MemoryError, RuntimeError, KeyboardInterrupt):
        if new and loop.counters.step == 0 and not saved_steps(loop.run_dir / "checkpoints"):
            shutil.rmtree(loop.run_dir, ignore_errors=True)
        raise


def _refuse_other_settings(run: Run, config: Config) -> None:
    """What would prepare other data, or is another model; the rest is compared with the checkpoint (Loop.resume)."""
    before, after = (_known_before_preparing(c) for c in (resolved_config(run.config), config))
    if config.data.prepared is not None or run.config.data.prepared is not None:
        del before["data"], after["data"]
    if config.model.init_from is not None:  # its shape is that of other weights
        del before["model"], after["model"]
    differences = diff_settings(before, after)
    if differences:
        raise UserError(f"{run.directory}: cannot resume, these settings have changed: {'; '.join(differences)}")


def _known_before_preparing(config: Config) -> dict[str, Any]:
    data = config.data.model_dump(mode="json", exclude={"directory", "workers", "mixture", "prepared"})
    del data["tokenizer"]["encoder"]
    from_data = {"preset", "init_from", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "head"}
    return {"model": config.model.model_dump(mode="json", exclude=from_data), "data": data}


def _moved_with_run(run: Run, config: Config) -> Path | None:
    """The folder of its data if they were moved (or copied) with it: its sources may still be elsewhere, or nowhere."""
    recorded, asked = run.manifest["data"], config.data.prepared
    folder = folder_of_run(run.directory, recorded)
    return folder if str(folder) != recorded["directory"] and asked in (None, run.config.data.prepared) else None


def _stage_plays(progress: Quiet, run: Run) -> None:
    """Some steps in detail for the dashboard, where that is a matter of seconds. Never a reason for a run to fail.

    What trained is gone by now: a play needs as much memory.
    """
    settings = run.config.observe
    few = parameter_counts(run.config.model)["total"] <= MOST_PLAYED_PARAMETERS
    if not (settings.enabled and settings.plays and few):
        return
    gc.collect()
    progress.stage("playing a step in detail", 0, None)
    try:
        stage_last(run.directory, settings.plays)
    except (Exception, KeyboardInterrupt) as error:
        progress.say(f"no step could be played in detail: {str(error) or 'interrupted'}")
    progress.close()


def _fit_vocabulary(config: Config, dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        whose, mend = "model.vocab_size is", "remove model.vocab_size, or choose the tokenizer that belongs to it"
        if config.model.init_from is not None:
            whose = f"the vocabulary of {config.model.init_from} is"
            mend = "give the tokenizer it was trained with (data.tokenizer.path)"
        raise UserError(f"{whose} {config.model.vocab_size} but the tokenizer has {tokenizer.vocab_size} tokens: {mend}")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config.model = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size, **ids})


def start_from(config: Config) -> Source:
    """The weights of model.init_from. Their shape becomes the configuration's; their tokenizer too, unless one is given.

    Raises UserError where nothing is there, or where the configuration asks for another shape.
    """
    path = Path(config.model.init_from)
    origin = open_source(path)
    _take_shape(config, origin.config)
    shape = config.model
    if config.data.sequence_length > shape.max_position_embeddings:
        raise UserError(f"data.sequence_length {config.data.sequence_length}: the model in {path} is meant for at most "
                        f"{shape.max_position_embeddings} tokens")  # fmt: skip
    if config.data.tokenizer.kind != "file":
        folder = find_tokenizer_folder(path)
        if folder is None:
            raise UserError(f"{path}: brings no tokenizer; give the one it was trained with: data.tokenizer.kind = 'file' "
                            "and data.tokenizer.path")  # fmt: skip
        config.data.tokenizer = _from_file(folder, config.data.tokenizer)
    else:
        _refuse_other_tokenizer(path, load_tokenizer(config.data.tokenizer.path), "data.tokenizer.path")
    return origin


def _from_file(folder: Path, asked: TokenizerConfig) -> TokenizerConfig:
    return TokenizerConfig(kind="file", path=str(folder), encoder=asked.encoder)


def _refuse_other_tokenizer(origin: Path, tokenizer: Tokenizer, key: str) -> None:
    own = None
    with contextlib.suppress(UserError):  # one that cannot be read says nothing against the one given
        own = find_tokenizer(origin)
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{key}: not the tokenizer that the model in {origin} was trained with, whose weights belong to that one; "
                        "leave the key out")  # fmt: skip


def _take_shape(config: Config, shape: ModelConfig) -> None:
    asked = config.model
    for name in asked.model_fields_set - {"preset", "init_from", "head"}:
        if getattr(asked, name) not in (None, getattr(shape, name)):
            raise UserError(f"model.{name} is {getattr(asked, name)}, but the model in {asked.init_from} has {getattr(shape, name)}: "
                            "with model.init_from its shape is taken over; leave the key out")  # fmt: skip
    config.model = shape.model_copy(update={"init_from": asked.init_from, "preset": None, "head": None})


def _go_on_without_origin(config: Config, own: Config) -> None:
    """What start_from took over when the run began, as the run keeps it: the origin may be gone."""
    _take_shape(config, own.model)
    if config.data.tokenizer.kind != "file":
        config.data.tokenizer = own.data.tokenizer


def _fit_labels(config: Config, dataset: Dataset) -> None:
    """The head, and weights of classes, that belong to the data's labels."""
    labels, data, settings = dataset.labels, config.data, config.training
    if labels is None:
        return
    kind = {"classification": "single_label_classification", "regression": "regression"}[settings.task]
    spread = {key: labels[key] for key in ("mean", "std") if key in labels}
    head = HeadConfig(problem_type=kind, labels=labels["names"], max_length=data.sequence_length,
                      truncation_side=data.truncation_side, **spread)  # fmt: skip
    config.model = config.model.model_copy(update={"head": head})
    if settings.class_weights == "balanced":
        documents = sum(labels["counts"])
        settings.class_weights = {name: documents / (len(labels["names"]) * count)
                                  for name, count in zip(labels["names"], labels["counts"], strict=True)}  # fmt: skip
    unknown = set(settings.class_weights or {}) - set(labels["names"])
    if unknown:
        raise UserError(f"training.class_weights: there is no class '{min(unknown)}'{nearest(min(unknown), labels['names'])}")
    if settings.class_weights and not any(settings.class_weights.get(name, 1.0) for name in labels["names"]):
        raise UserError("training.class_weights: all are 0, so there is nothing to learn; leave one out, or make it larger")
