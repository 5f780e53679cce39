"""A run: from a configuration to a trained model in a folder of its own (the design's "a run on disk").

runs/NAME/ holds config.toml (fully resolved), manifest.json (versions, machine, data, seeds), run.sqlite (what every
step did), checkpoints/ and, at the end, model/ as a Hugging Face directory.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pellucid.config import Config, UserError, is_file_path, load_config, make_config
from pellucid.data.build import prepare
from pellucid.data.dataset import Dataset
from pellucid.exchange.huggingface import save_huggingface
from pellucid.exchange.load import load
from pellucid.measure.bigram import bigram_loss
from pellucid.model.generate import generate
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.size import parameter_counts
from pellucid.observe.observer import open_observer
from pellucid.training.checkpoint import diff_settings
from pellucid.training.loop import Loop
from pellucid.training.optimizers import build_optimizer
from pellucid.training.progress import Quiet, Shown

BIGRAM_TOKENS = 20_000_000  # beyond this the baseline would cost more than a glance
SAMPLE_PROMPT_LINES, SAMPLE_PROMPT_CHARACTERS, SAMPLE_TOKENS = 3, 200, 100
REPORTED_PACKAGES = ("torch", "numpy", "tokenizers", "sentencepiece", "safetensors", "pyarrow", "pydantic")


class Run:
    """A run directory, finished or not. Raises UserError when `directory` is none."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not (self.directory / "config.toml").is_file():
            raise UserError(f"{self.directory}: not a run directory (it has no config.toml)")
        self.config = load_config(self.directory / "config.toml")
        try:
            self.manifest = json.loads((self.directory / "manifest.json").read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.directory}: not a run directory (manifest.json cannot be read: {error})") from None
        self.stopped_by: str | None = None  # the signal that ended training early, in the process that trained

    def __repr__(self) -> str:
        return f"Run('{self.directory}')"

    def load(self, **options: Any) -> tuple[Grok1, Any]:
        """(model, tokenizer) of the finished run, or of its newest checkpoint; options as for `pellucid.load`."""
        return load(self.directory, **options)

    def dataset(self) -> Dataset:
        """The data it was trained on."""
        return Dataset(self.manifest["data"]["directory"])


def train(
    config: Config | dict | str | Path | None = None, *, run_dir: str | Path | None = None, resume: bool = False,
    progress: bool = False,
) -> Run:  # fmt: skip
    """Train a model from raw text and return its run. Raises UserError for anything the user can mend.

    config: a Config, its tables as a dict, a TOML file, or None: the embedded default, a small model on Python's own
    standard library. run_dir: a new folder (default runs/NAME, runs/NAME-2, ...); with `resume`, the one to continue
    (config None then means its own). progress: show a bar.
    """
    if resume and run_dir is None:
        raise UserError("to resume, say which run: --run-dir runs/NAME --resume")
    if resume:
        own = Run(run_dir).config
        config = own if config is None else config
    name = "run" if isinstance(config, Config | dict) else run_name(config)
    folder = Path(run_dir) if run_dir is not None else next_run_dir(name)
    if not resume and folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: exists already; choose another --run-dir, or continue it with --resume")
    if isinstance(config, dict):
        config = make_config(config)
    elif not isinstance(config, Config):
        config = load_config(config)
    shown = Shown() if progress else Quiet()
    try:
        return _train(config.model_copy(deep=True), folder, resume, shown)
    finally:
        shown.close()


def _train(config: Config, folder: Path, resume: bool, progress: Quiet) -> Run:
    device = choose_device(config.training.device)  # before any work is spent
    dataset = prepare(config.data, progress=progress.stage)
    progress.close()
    _fit_vocabulary(config, dataset)
    config.training.precision = resolve_precision(config.training.precision, device)
    model = initialize(Grok1(config.model, device=device), config.training.seed)
    model.compute_dtype, model.parity = choose_precision(config.training.precision, device)
    optimizer = build_optimizer(model, config.optimizer)
    if not resume:
        write_run_files(folder, config, dataset)
    run = Run(folder)
    with open_observer(folder, model, optimizer, config, dataset) as observer:
        loop = Loop(config, model, optimizer, dataset, folder, observer, progress)
        if resume:
            loop.resume()
            if run.manifest["data"]["fingerprint"] != dataset.fingerprint:
                raise UserError(f"{folder}: cannot resume, its data has changed since ({run.manifest['data']['directory']})")
            observer.resume(loop.counters.step)
            note_changes(run, config, loop.counters.step)
        progress.say(describe(loop, folder))
        if loop.counters.step == 0:
            _show_sample(progress, "before training", loop)
        run.stopped_by = loop.run()
        if run.stopped_by is not None:
            progress.say(f"stopped by {run.stopped_by} after step {loop.counters.step}; everything is saved. To go on:\n"
                         f"  pellucid train --run-dir {folder} --resume")  # fmt: skip
            return run
        save_huggingface(model, dataset.tokenizer, folder / "model", replace=True)
        _show_sample(progress, "after training", loop)
        _show_result(progress, loop)
    return run


def _fit_vocabulary(config: Config, dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has {tokenizer.vocab_size} tokens: "
            "remove model.vocab_size, or choose the tokenizer that belongs to it"
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config.model = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size, **ids})


def choose_device(name: str) -> torch.device:
    """'auto' takes CUDA, then Apple's MPS, then the CPU. Raises UserError for a device this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"training.device = '{name}': not usable on this machine ({reason})") from None
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'auto' becomes bf16 where the processor is fast at it, else fp32."""
    return name if name != "auto" else "bf16" if has_fast_bf16(device) else "fp32"


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, bool]:
    """(dtype of products, whether every official cast is followed)."""
    name = resolve_precision(name, device)
    return (torch.float32 if name == "fp32" else torch.bfloat16), name == "parity"


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run_name(config: str | Path | None) -> str:
    """What a run of this configuration file is called: the file's name, or that of the run it repeats."""
    if config is None:
        return "demo"
    path = Path(config).resolve()
    return path.parent.name if (path.parent / "manifest.json").is_file() and path.name == "config.toml" else path.stem


def next_run_dir(name: str) -> Path:
    """runs/NAME, or the first free of runs/NAME-2, runs/NAME-3, ..."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(Path("runs") / n for n in names if not (Path("runs") / n).exists())


def write_run_files(folder: Path, config: Config, dataset: Dataset) -> None:
    """config.toml, which repeats the run, and manifest.json, which says what it ran on; both or neither."""
    manifest = {
        "format": 1,
        "pellucid": installed_version("pellucid"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: installed_version(name) for name in REPORTED_PACKAGES},
        "machine": {
            "platform": platform.platform(), "processors": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seed": config.training.seed,
        "data": {"directory": str(dataset.directory.resolve()), "fingerprint": dataset.fingerprint},
        "tokenizer": {"fingerprint": dataset.tokenizer.fingerprint},
        "parameters": parameter_counts(config.model),
    }  # fmt: skip
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.starting"
    try:
        unfinished.mkdir(parents=True)
        (unfinished / "config.toml").write_text(resolved_config(config).to_toml(), encoding="utf-8")
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.rename(unfinished, folder)  # an empty folder may stand there
    except OSError as error:
        raise UserError(f"{folder}: cannot write the run directory ({error.strerror}); choose another --run-dir") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def note_changes(run: Run, config: Config, step: int) -> None:
    """A run continued with other settings (a longer budget, say): config.toml takes them, the manifest tells when."""
    before, after = (resolved_config(c).model_dump(mode="json") for c in (run.config, config))
    changes = diff_settings(before, after)
    if changes:
        run.manifest.setdefault("changes", []).append({"step": step, "settings": changes})
        run.config = config
        _replace(run.directory / "manifest.json", json.dumps(run.manifest, indent=1) + "\n")
        _replace(run.directory / "config.toml", resolved_config(config).to_toml())


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is the old or the new one, never half."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def resolved_config(config: Config) -> Config:
    """The same with absolute paths, so that it means the same wherever it is read."""
    resolved = config.model_copy(deep=True)
    data = resolved.data
    for source in [*data.sources, *data.validation]:
        if is_file_path(source.path):
            source.path = os.path.abspath(source.path)
    data.directory = os.path.abspath(data.directory)
    if data.tokenizer.path is not None:
        data.tokenizer.path = os.path.abspath(data.tokenizer.path)
    return resolved


def describe(loop: Loop, folder: Path) -> str:
    """What is about to happen, in a few lines."""
    config, counts, train = loop.config, parameter_counts(loop.config.model), loop.train_split
    held_out = len(loop.dataset.validation) if loop.dataset.validation else 0
    precision = "bf16, fp32 master weights" if loop.model.compute_dtype == torch.bfloat16 else "fp32"
    tokens = loop.max_steps * config.training.batch_size * config.data.sequence_length
    return (
        f"data       {train.tokens_per_epoch:,} tokens an epoch in rows of {train.sequence_length}, {held_out} rows held out"
        f" ({'reused ' if loop.dataset.reused else ''}{loop.dataset.directory})\n"
        f"model      {counts['total']:,} parameters, {counts['active']:,} active for each token\n"
        f"training   {loop.max_steps:,} steps of {config.training.batch_size} x {config.data.sequence_length} tokens "
        f"({tokens:,}) with {config.optimizer.name}, {precision}, on {loop.device}\n"
        f"run        {folder}"
    )


def _show_sample(progress: Quiet, when: str, loop: Loop) -> None:
    """A few words of the model's own, after the beginning of a held-out document, so that learning can be read."""
    tokenizer, split = loop.dataset.tokenizer, loop.dataset.validation or loop.dataset.train
    lines = split.document(0)["text"].splitlines(keepends=True)
    prompt = "".join(lines[len(lines) // 3 :][:SAMPLE_PROMPT_LINES])[:SAMPLE_PROMPT_CHARACTERS]
    text = "".join(generate(loop.model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.95))
    progress.say(f"\n--- {when} ---\n{prompt}|{text}\n---\n")
    loop.observer.text_sample(loop.counters.step, prompt, text)


def _show_result(progress: Quiet, loop: Loop) -> None:
    dataset, folder = loop.dataset, loop.run_dir
    if dataset.validation is not None and dataset.train.tokens_per_epoch <= BIGRAM_TOKENS:
        baseline = bigram_loss(dataset.train, dataset.validation)
        progress.say(f"held-out loss {loop.final.loss:.4f}; a bigram model of the same training text: {baseline:.4f}")
    progress.say(
        f"the run is in {folder}. Next:\n"
        f"  pellucid generate {folder} --prompt 'def '\n"
        f"  pellucid evaluate {folder} --data README.md"
    )
