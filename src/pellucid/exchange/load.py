"""`pellucid.load`: a model from wherever it lies: a run, a checkpoint of it, a Hugging Face directory, an official `ckpt-0`, a preset.

Peak memory is the model and one of its tensors: weights are copied matrix by matrix out of memory-mapped files.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch

from pellucid.config import Config, ModelConfig, UserError, load_config, make_config, preset_names
from pellucid.data.place import folder_of_run
from pellucid.data.tokenizer import load_tokenizer
from pellucid.exchange.folder import read_json
from pellucid.exchange.huggingface import HuggingFaceSource
from pellucid.exchange.leaves import ModelSource, Source, fill
from pellucid.exchange.xai import XaiSource, official_folder
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.training import checkpoint
from pellucid.training.device import choose_device

DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def load(
    path_or_preset: str | Path,
    config: ModelConfig | Config | dict[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress=None,
) -> tuple[Grok1, Any]:
    """A model and its tokenizer (None for `ckpt-0` and presets).

    config: needed only where the files do not say everything: a `ckpt-0` without one is taken for Grok-1 (its
    multipliers, head_dim 128). dtype: of the parameters and products, float32 unless said; in bfloat16 the model follows
    every cast of the official run (`model.parity = False` is faster, and less exact). Raises UserError.
    """
    kind = as_dtype(dtype)
    device = None if device is None else choose_device(str(device), "device")
    path = Path(path_or_preset)
    if not os.path.exists(path):  # also of a name that no file can have
        return _initialized(str(path_or_preset), config, kind, device), None
    source = open_source(path, config)
    model = fill(Grok1(source.config, device, kind), source, progress)
    return model, find_tokenizer(path)


def open_source(path: str | Path, config: ModelConfig | Config | dict[str, Any] | None = None) -> Source:
    """The weights at `path`, checked but not yet read. Raises UserError if nothing we know is there."""
    path, config = Path(path), _model_config(config)
    if not path.is_dir():
        there = "a model is a folder" if path.exists() else "there is nothing; a model is a folder"
        raise UserError(f"{path}: {there}: a run, a Hugging Face directory, or an official ckpt-0")
    if (run := run_of(path)) != path:
        return ModelSource(_model_of(run, checkpoint.load(path)))
    if (path / "model" / "config.json").exists():
        return HuggingFaceSource(path / "model", config)
    if (official := official_folder(path)) is not None:
        return XaiSource(official, config or _manifest_config(official))
    if (path / "checkpoints").is_dir():
        return ModelSource(_newest_checkpoint(path))
    if (path / "config.json").exists() or any(path.glob("*.safetensors")):
        return HuggingFaceSource(path, config)
    raise UserError(
        f"{path}: holds no model: neither model/ or checkpoints/ (a run), nor config.json with .safetensors "
        "(Hugging Face), nor tensor00000_000 (an official checkpoint)"
    )


def run_of(path: Path) -> Path:
    """The run whose checkpoints/step-N this is; any other path as it is."""
    folder = Path(os.path.abspath(path))
    saved = checkpoint.saved_steps(folder.parent) if folder.parent.name == "checkpoints" else {}
    return folder.parents[1] if folder in saved.values() and (folder.parents[1] / "config.toml").is_file() else path


def find_tokenizer(path: Path) -> Any:
    """The tokenizer saved with the weights, or (for an unfinished run) with the data it trains on; else None."""
    found = find_tokenizer_folder(path)
    return None if found is None else load_tokenizer(found)


def find_tokenizer_folder(path: Path) -> Path | None:
    """Where that tokenizer lies."""
    path = run_of(path)
    folders = [path / "model", path]
    if (path / "checkpoints").is_dir() and (path / "manifest.json").exists():
        data = read_json(path / "manifest.json").get("data")
        if isinstance(data, dict) and isinstance(data.get("directory"), str):
            folders.append(folder_of_run(path, data) / "tokenizer")
    names = ("tokenizer.model", "tokenizer.json")
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def manifest_path(destination: str | Path) -> Path:
    """Where `convert` writes its record: beside the output, because engines read whole folders."""
    destination = Path(os.path.abspath(destination))
    return destination.with_name(destination.name + ".manifest.json")


def _newest_checkpoint(run: Path) -> Grok1:
    """The model of an unfinished run, as of its newest intact checkpoint."""
    bad: list[str] = []
    saved = checkpoint.newest_good(run / "checkpoints", on_bad=lambda path, reason: bad.append(f"; {path}: {reason}"))
    if saved is None:
        raise UserError(f"{run}: the run has neither a finished model nor an intact checkpoint{''.join(bad)}")
    return _model_of(run, saved)


def _model_of(run: Path, saved: checkpoint.Checkpoint) -> Grok1:
    weights = saved.tensors["model"]
    config = load_config(run / "config.toml").model
    config = config.model_copy(update={"vocab_size": weights["embedding.weight"].shape[0]})
    model = Grok1(config, device="meta")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{saved.folder}: does not fit {run / 'config.toml'} ({reason})") from None
    return model


def _manifest_config(folder: Path) -> ModelConfig | None:
    """An official folder says no multipliers; one that `convert` wrote has them in its record."""
    if not manifest_path(folder).exists():
        return None
    values = read_json(manifest_path(folder)).get("config")
    if not isinstance(values, dict):
        raise UserError(f"{manifest_path(folder)}: holds no 'config' table; remove the file to do without")
    return _model_config(values)


def _initialized(name: str, config: Any, dtype: torch.dtype, device: Any) -> Grok1:
    if name not in preset_names():
        close = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.6)
        hint = f"; did you mean '{close[0]}'?" if close else f" ({', '.join(preset_names())})"
        raise UserError(f"{name}: neither a folder nor a preset{hint}")
    if config is not None:
        raise UserError(f"{name}: a preset is itself a configuration; give one or the other")
    settings = make_config({"model": {"preset": name}})
    vocabulary = settings.model.vocab_size or settings.data.tokenizer.vocab_size
    return initialize(Grok1(settings.model.model_copy(update={"vocab_size": vocabulary}), device, dtype), 0)


def _model_config(config: ModelConfig | Config | dict[str, Any] | None) -> ModelConfig | None:
    if isinstance(config, dict):
        return make_config({"model": config}).model
    if not isinstance(config, ModelConfig | Config | None):
        raise UserError(f"config = {config!r}: give a Config, a ModelConfig, or the [model] table as a dict")
    return config.model if isinstance(config, Config) else config


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """float32 or bfloat16, by torch's name or ours; float32 for None. Raises UserError for others."""
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype or torch.float32
    if found not in DTYPES.values():
        raise UserError(f"dtype {dtype}: models are loaded as float32 or bfloat16")
    return found
