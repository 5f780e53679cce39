"""Checkpoints: complete or absent, every byte under a sha256, nothing ever unpickled.

A checkpoint is a folder `step-N` of safetensors files and a manifest.json. It is written beside its place
(`.saving`), every file and the folder flushed to disk, and renamed into place last; a removed one is renamed first
(`.deleting`). Whatever the moment of a kill, power cut or full disk, the newest `step-N` is whole. An older checkpoint
of the same step is kept as `step-N.replaced` until the new one is in place, and counts as one meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pellucid.config import UserError

FORMAT, VERSION = "pellucid-checkpoint", 1
MANIFEST = "manifest.json"
PIECE = 16 * 2**20  # bytes written and hashed at a time
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip

OnBad = Callable[[Path, str], None]


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written; `path` is the file at fault, `reason` what is wrong with it."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}; this checkpoint is damaged, use another")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint. tensors: group -> name -> tensor, as given to `save`; state: JSON values."""

    folder: Path
    step: int
    best: bool
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


# --------------------------------------------------------------------------------------------- writing


def save(
    root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, best: bool = False
) -> Path:
    """Write `root/step-N`: one safetensors file per group of `tensors`, and `state` (JSON values) in the manifest.

    Tensors may be on any device; they are written one at a time and not changed. Returns the folder. Raises UserError
    when the disk is full or not writable; the checkpoints before are untouched then.
    """
    root, name = Path(root), f"step-{step}"
    state = json.loads(json.dumps(state))  # what a reader will see; raises on what is not JSON
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "best": best, "files": {}, "state": state}
    overhead = len(_text(manifest)) + 4096 * (2 + len(tensors))
    needed = overhead + sum(t.nbytes + 256 for group in tensors.values() for t in group.values())
    temporary = root / f"{name}.saving"
    with _disk_errors(root, step, needed):
        root.mkdir(parents=True, exist_ok=True)
        clean(root)
        if needed > shutil.disk_usage(root).free:
            raise OSError(errno.ENOSPC, "No space left on device")
        try:
            os.mkdir(temporary)
            for group, named in tensors.items():
                path = temporary / f"{group}.safetensors"
                size, digest = _write(path, _safetensors_pieces(named))
                manifest["files"][path.name] = {"bytes": size, "sha256": digest}
            manifest["sha256"] = _digest(manifest)
            _write(temporary / MANIFEST, [_text(manifest)])
            _flush_folder(temporary)
            if (root / name).exists():
                os.rename(root / name, root / f"{name}.replaced")
            os.rename(temporary, root / name)
            _flush_folder(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if (root / f"{name}.replaced").exists():
            _delete(root / f"{name}.replaced")
    return root / name


def retain(root: Path, keep_last: int, keep_best: bool = True, on_bad: OnBad | None = None) -> list[Path]:
    """Remove all checkpoints but the newest `keep_last` intact ones and the newest intact one saved as best.

    What is kept is verified first (one reading of it), so damage never costs the last good checkpoint; damaged ones
    are reported to `on_bad` and removed like old ones. Returns what was removed. Nothing intact: nothing is removed.
    """
    found, keep, best = _newest_first(root), [], None
    if len(found) <= keep_last:
        return []
    for folder in found:
        if len(keep) >= keep_last and (best or not keep_best):
            break
        try:
            manifest = verify(folder)
        except DamagedCheckpoint as damage:
            if on_bad:
                on_bad(damage.path, damage.reason)
            continue
        if len(keep) < keep_last:
            keep.append(folder)
        if keep_best and manifest["best"] and best is None:
            best = folder
    removed = [folder for folder in found if folder not in keep and folder != best] if keep else []
    with _disk_errors(Path(root), None, 0):
        for folder in reversed(removed):
            _delete(folder)
    return removed


def _safetensors_pieces(named: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors format, streamed: header length, JSON header, then each tensor's bytes without holes."""
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))  # keeps every tensor aligned
    header, end = {}, 0
    for name in order:
        tensor = named[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        data = memoryview(named[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


def _write(path: Path, pieces) -> tuple[int, str]:
    """Write, flush to disk; returns (bytes, sha256 of what was meant to be written)."""
    digest, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            while len(piece):
                piece = piece[os.write(file, piece) :]
        os.fsync(file)
    finally:
        os.close(file)
    return size, digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(folder: Path) -> None:
    """Invalid first, then gone: a kill in between leaves nothing that could be loaded half."""
    doomed = folder.with_name(f"{folder.name}.deleting")
    os.rename(folder, doomed)
    _flush_folder(folder.parent)
    shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Remove what a killed process left; whatever can be loaded stays."""
    for path in root.glob("step-*"):
        if path.name.endswith((".saving", ".deleting")):
            shutil.rmtree(path)
        elif path.name.endswith(".replaced") and path.with_suffix("").exists():
            _delete(path)


@contextmanager
def _disk_errors(root: Path, step: int | None, needed: int) -> Iterator[None]:
    """A system's error while writing, as a sentence."""
    try:
        yield
    except OSError as error:
        what = f"cannot write the checkpoint of step {step}" if step is not None else "cannot remove old checkpoints"
        if error.errno == errno.EFBIG:
            raise UserError(f"{root}: {what}: a file may grow no larger here ({error.strerror}); the checkpoints before it are "
                            "untouched: raise `ulimit -f`, then resume") from None  # fmt: skip
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{root}: {what}: {error.strerror} ({error.filename})") from None
        raise UserError(
            f"{root}: {what}: the disk is full ({error.strerror}); it needs {needed} bytes ({needed / 1e9:.3g} GB), "
            f"{shutil.disk_usage(root).free} bytes are free; the checkpoints before it are untouched: free some space, "
            "lower checkpoint.keep_last or use another disk, then resume"
        ) from None


# --------------------------------------------------------------------------------------------- reading


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is what was written. Raises DamagedCheckpoint."""
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        if manifest["sha256"] != _digest(manifest) or text != _text(manifest):
            raise DamagedCheckpoint(path, "its content does not match its own checksum")
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise DamagedCheckpoint(path, f"format {manifest['format']} {manifest['version']} is not {FORMAT} {VERSION}")
        if not manifest.keys() >= {"step", "best", "state", "files"}:
            raise DamagedCheckpoint(path, "not the manifest of a checkpoint")
        if _step(folder) not in (None, manifest["step"]):
            raise DamagedCheckpoint(path, f"it describes step {manifest['step']}, not {folder.name}")
        for name, facts in manifest["files"].items():
            path = folder / name
            if Path(name).name != name:
                raise DamagedCheckpoint(folder / MANIFEST, f"it names a file outside the checkpoint: {name}")
            if path.stat().st_size != facts["bytes"]:
                raise DamagedCheckpoint(path, f"has {path.stat().st_size} bytes, not {facts['bytes']}")
            if _file_digest(path) != facts["sha256"]:
                raise DamagedCheckpoint(path, "its content does not match its sha256")
    except OSError as error:
        raise DamagedCheckpoint(path, error.strerror or str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedCheckpoint(path, "not the manifest of a checkpoint") from None
    return manifest


def load(folder: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Verify and read one checkpoint. Raises DamagedCheckpoint, a UserError that names the file at fault."""
    folder = Path(folder)
    manifest, tensors = verify(folder), {}
    for name in manifest["files"]:
        try:
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load_file(folder / name, device=str(device))
        except (safetensors.SafetensorError, OSError) as error:
            raise DamagedCheckpoint(folder / name, str(error)) from None
    return Checkpoint(folder, manifest["step"], manifest["best"], tensors, manifest["state"])


def newest_good(root: Path, on_bad: OnBad | None = None, device: str | torch.device = "cpu") -> Checkpoint | None:
    """The newest intact checkpoint, loaded; each damaged one on the way is told to on_bad(file, reason).

    None when there is none: if on_bad was called, there were some, all damaged.
    """
    for folder in _newest_first(root):
        try:
            return load(folder, device)
        except DamagedCheckpoint as damage:
            if on_bad:
                on_bad(damage.path, damage.reason)
    return None


def exists(root: Path, step: int) -> bool:
    """Whether this step was saved (not whether it is intact)."""
    return (Path(root) / f"step-{step}").is_dir()


def saved_steps(root: Path) -> dict[int, Path]:
    """Steps that were saved, oldest first, with their folders (not verified)."""
    return {_step(folder): folder for folder in reversed(_newest_first(root)) if _step(folder) is not None}


def diff_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two trees of settings, one phrase per key: `data.tokenizer was 'ab12', is 'cd34'`."""
    differences = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = (json.loads(json.dumps(tree.get(key))) for tree in (old, new))
        if isinstance(before, dict) and isinstance(after, dict):
            differences += diff_settings(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append(f"{prefix}{key} was {before!r}, is {after!r}")
    return differences


def _newest_first(root: Path) -> list[Path]:
    """Complete checkpoints; of one step, the one in place before the replaced one."""
    folders = [folder for folder in Path(root).glob("step-*") if _step(folder) is not None and folder.is_dir()]
    return sorted(folders, key=lambda folder: (_step(folder), folder.suffix == ""), reverse=True)


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"step-(\d+)(\.replaced)?", folder.name)
    return int(match[1]) if match else None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_text({key: value for key, value in manifest.items() if key != "sha256"})).hexdigest()


def _text(manifest: dict[str, Any]) -> bytes:
    """The one way a manifest is written, so that any changed byte of it shows."""
    return json.dumps(manifest, indent=1).encode()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
