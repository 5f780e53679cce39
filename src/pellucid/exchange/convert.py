"""`pellucid convert`: a model from one format to another, one matrix in memory at a time.

Beside the output lies `NAME.manifest.json` with the sha256 of every file read and written: a changed byte of a weight
is still a valid weight, and only a hash can tell.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pellucid
from pellucid.config import Config, ModelConfig, UserError
from pellucid.data.tokenizer import load_tokenizer
from pellucid.exchange.folder import file_hashes, new_folder, read_json, write_json
from pellucid.exchange.huggingface import write_huggingface
from pellucid.exchange.load import as_dtype, find_tokenizer, manifest_path, open_source
from pellucid.exchange.xai import write_xai

FORMATS = ("hf", "xai")
Progress = Callable[[str, int, int], None]


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "hf",
    *,
    config: ModelConfig | Config | dict[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model at `source` (run, Hugging Face directory, ckpt-0) to the new folder `destination`.

    to: 'hf' or 'xai'. dtype: of Hugging Face weights; None keeps what is stored (bfloat16 for official int8: exact).
    progress(stage, done, total) is called for each tensor. Returns the manifest's path.
    Raises UserError if the destination exists, or if the source no longer matches a manifest beside it; nothing is left
    half-written.
    """
    if to not in FORMATS:
        raise UserError(f"convert: there is no format '{to}'; known: {', '.join(FORMATS)}")
    if to == "xai" and dtype is not None:
        raise UserError("convert: dtype belongs to 'hf'; the official checkpoint is int8 and float32")
    kind = None if dtype is None else as_dtype(dtype)
    manifest = manifest_path(destination)
    if manifest.exists():
        raise UserError(f"{manifest}: exists already; choose another destination or remove it")
    weights = open_source(source, config)
    with new_folder(destination) as folder:
        if to == "xai":
            write_xai(weights, folder, progress)
        else:
            write_huggingface(weights, folder, kind, progress)
            if (tokenizer := find_tokenizer(Path(source))) is not None:
                tokenizer.save(folder)
        read = getattr(weights, "folder", None)
        record = {
            "pellucid": pellucid.__version__,
            "format": to,
            "config": weights.config.model_dump(mode="json", exclude={"preset", "init_from"}, exclude_none=True),
            "source": {"folder": str(source), "files": _checked_hashes(read) if read else {}},
            "files": file_hashes(folder),
        }
    partial = manifest.with_name(f".{manifest.name}.partial")
    write_json(partial, record)
    os.replace(partial, manifest)
    return manifest


def convert_tokenizer(source: str | Path, destination: str | Path) -> None:
    """Write a tokenizer.model to the new folder `destination` as Hugging Face reads it: with a tokenizer.json of the same ids.

    Raises UserError where there is no exact one: a model that is no BPE, or has a normalizer.
    """
    with new_folder(destination) as folder:
        load_tokenizer(source).save(folder)
        if not (folder / "tokenizer.json").exists():
            raise UserError(f"{source}: no tokenizer.json gives exactly its ids (it is no BPE with byte fallback, or it changes "
                            "the text first); use the file as it is")


def verify(folder: str | Path) -> dict[str, str]:
    """Compare a converted folder with the manifest beside it; returns the hashes. Raises UserError naming the file."""
    folder = Path(folder)
    if not manifest_path(folder).exists():
        raise UserError(f"{manifest_path(folder)}: there is no such manifest to compare {folder} with")
    return _checked_hashes(folder)


def _checked_hashes(folder: Path) -> dict[str, str]:
    hashes, manifest = file_hashes(folder), manifest_path(folder)
    if not manifest.exists():
        return hashes
    recorded = read_json(manifest).get("files")
    if not isinstance(recorded, dict):
        raise UserError(f"{manifest}: holds no 'files' table; remove the file to do without")
    for name in sorted({*hashes, *recorded}):
        if name not in hashes:
            raise UserError(f"{folder / name}: missing, though {manifest.name} lists it")
        if name not in recorded:
            raise UserError(f"{folder / name}: not in {manifest.name}: it was added after the conversion")
        if hashes[name] != recorded[name]:
            raise UserError(f"{folder / name}: not the bytes that were converted (sha256 differs from {manifest.name})")
    return hashes
