"""Picture 2 from end to end: sources -> stages -> split -> tokenizer -> shards, once per settings.

Two passes over blocks: the first reads the sources and keeps what all stages keep; the second tokenizes. Work goes
on in a hidden folder beside the target (.NAME.building) whose finished blocks are a ledger: a build that was killed
goes on from there, to the same bytes, with any number of workers. The result gets its name only when complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pellucid.config import DataConfig, UserError
from pellucid.data import blocks as ledger
from pellucid.data import shards
from pellucid.data.augment.identity import identity, materialized
from pellucid.data.augment.materialize import merged
from pellucid.data.blocks import Block
from pellucid.data.dataset import FORMAT, MANIFEST, Dataset, packing_of
from pellucid.data.document import SourceFile, StageRecord
from pellucid.data.labels import summarize
from pellucid.data.passes import Build, Progress
from pellucid.data.pipeline import Setup, forget, stages
from pellucid.data.shards import damage, describe_files
from pellucid.data.sources import list_files, sha256_of
from pellucid.data.splitting import Splitter
from pellucid.data.stages.assemble import corpus_passes, held_out_passes, pass_versions
from pellucid.data.stages.refine import refine
from pellucid.data.tokenizer import load_tokenizer
from pellucid.data.tokenizer_training import SAMPLE_BYTES, train_tokenizer
from pellucid.data.workers import InThisProcess, Processes, Workers, processors

SMALL = 1 << 26  # bytes of sources that one process reads before others would have started
LOADER_ONLY = {"directory", "workers", "mixture", "prepared", "weight", "epochs"}  # the prepared data do not depend on them


def prepare(config: DataConfig, *, directory: str | Path | None = None, progress: Progress | None = None,
            workers: Workers | None = None) -> Dataset:
    """The dataset of a configuration: what was built before if it still fits, else built now.

    Without `directory` it lies in config.directory/<hash of the settings>. With config.prepared it is
    that folder's, as it is. `dataset.reused` tells which it was.
    `progress(stage, done, total, detail)` is called often: stages "checking" (files), "scanning", "reading",
    "training tokenizer", "tokenizing", "writing" (bytes), with a line of counts. `workers` replaces data.workers.
    Raises UserError; then the target does not exist, and what was finished is kept only where it is worth it.
    """
    progress = progress or (lambda stage, done, total, detail="": None)
    if config.prepared is not None:
        if directory is not None:
            raise UserError(f"data.prepared = '{config.prepared}': that folder is prepared already; leave data.prepared out to build")
        return _as_it_is(config)
    files = _files(config, progress)
    settings = _settings(config)
    settings_hash = _hash(settings)

    def ready() -> Dataset | None:
        if directory is not None:
            candidates = [Path(directory)]
        else:
            candidates = sorted(Path(config.directory).glob(f"{settings_hash[:16]}*"))
        found = next((folder for folder in candidates if _fits(folder, settings_hash, files, progress)), None)
        return found and _opened(found, config, verify=True)

    dataset = ready()
    if dataset is None:
        target = Path(directory) if directory is not None else _free_name(Path(config.directory), settings_hash[:16])
        advice = "set data.directory to a larger disk" if directory is None else "give --out a folder on a larger disk"
        with _work_folder(target, progress, advice) as folder:
            dataset = ready()  # another process may have built it meanwhile
            if dataset is None:
                if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
                    raise UserError(f"{target}: exists and holds something else than this configuration's data; "
                                    "remove it or choose another folder")
                _build(config, settings, settings_hash, files, folder, target, progress, workers or _workers(config, files))
                dataset = _opened(target, config, verify=False)  # every file has just been hashed
                dataset.reused = False
    return dataset


def _files(config: DataConfig, progress: Progress) -> list[SourceFile]:
    """The files of the sources, then those held out by name; one that both name is held out, and said to be."""
    labels = (config.label_fields, config.label_type)
    files = list_files(config.sources, labels=labels)
    held_out = list_files(config.validation, "data.validation", "validation", labels)
    place = lambda file: file.path if file.remote else os.path.realpath(file.path)
    places = {place(file) for file in held_out}
    kept: list[SourceFile] = []
    both: list[SourceFile] = []
    for file in files:
        (both if places and place(file) in places else kept).append(file)
    if both and not kept:
        raise UserError("data.sources: data.validation names all their files too, so none is left to train on; give other sources")
    if both:
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        progress(f"leaving out of data.sources what data.validation names: {both[0].uri}{more}", len(both), len(both))
    return kept + held_out


def _opened(folder: Path, config: DataConfig, verify: bool) -> Dataset:
    dataset = Dataset(folder, verify=verify, run=config)
    dataset.reused = True
    return dataset


def _as_it_is(config: DataConfig) -> Dataset:
    """The data of config.prepared, which must have been prepared into the rows that the config asks for."""
    dataset = _opened(Path(config.prepared), config, verify=True)
    labels = ("label_field", "label_type", "truncation_side") if config.label_fields or dataset.labels else ()
    for name in ("sequence_length", "packing", "cross_document_attention", *labels):
        made, wanted = getattr(dataset.config, name), getattr(config, name)
        if wanted != made:
            raise UserError(f"data.{name} = {json.dumps(wanted)}, but the data in {config.prepared} were prepared with "
                            f"{json.dumps(made)}; set data.{name} = {json.dumps(made)}, or prepare them again")
    return dataset


def _workers(config: DataConfig, files: list[SourceFile]) -> Workers:
    count = config.workers
    if count is None:
        count = processors() if sum(file.size for file in files) > SMALL else 1
    return Processes(count) if count > 1 else InThisProcess()


def _settings(config: DataConfig) -> dict[str, Any]:
    """Everything the result depends on, except the source files themselves."""
    settings = config.model_dump(mode="json", exclude=LOADER_ONLY)
    del settings["tokenizer"]["encoder"]
    for source in settings["sources"] + settings["validation"] + settings["decontaminate"]["against"]:
        if "://" not in source["path"] and not source["path"].startswith(("builtin:", "hf-dataset:")):
            source["path"] = os.path.abspath(source["path"])
    content = None
    if config.tokenizer.path is not None:
        settings["tokenizer"]["path"] = os.path.abspath(config.tokenizer.path)
        content = load_tokenizer(config.tokenizer.path).fingerprint
    versions = [(stage.name, stage.version, stage.settings.get("fingerprint")) for stage in stages(config)]
    versions += pass_versions(config)
    layout = [ledger.BLOCK_BYTES, ledger.BLOCK_DOCUMENTS, shards.TOKENS_PER_SHARD]
    return {"format": FORMAT, "layout": layout, "stages": versions, "tokenizer_file": content,
            "augmentation": identity(config), **settings}


def _hash(settings: dict[str, Any]) -> str:
    """Of the settings, but for what the loader alone looks at, and for where the tokenizer lies: its content is in them."""
    sources = [{key: value for key, value in source.items() if key not in LOADER_ONLY} for source in settings["sources"]]
    tokenizer = {**settings["tokenizer"], "path": None}
    return hashlib.sha256(json.dumps({**settings, "sources": sources, "tokenizer": tokenizer}, sort_keys=True).encode()).hexdigest()


def _free_name(folder: Path, name: str) -> Path:
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def _fits(folder: Path, settings_hash: str, files: list[SourceFile], progress: Progress) -> bool:
    """Whether a folder holds this very data: same settings, same source files (size, and version or sha256)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    recorded = manifest.get("sources", []) if isinstance(manifest, dict) else []
    if not recorded or manifest.get("settings_hash") != settings_hash or len(recorded) != len(files):
        return False
    for number, (file, before) in enumerate(zip(files, recorded, strict=True)):
        progress("checking", number, len(files))
        if (file.uri, file.size) != (before["uri"], before["size"]):
            return False
        shut = before["sha256"] is None and before["documents"] == 0 and not file.remote  # it could not be read then
        if (shut or file.version != before["version"]) and (file.remote or sha256_of(file.path) != before["sha256"]):
            return False
    wrong = damage(folder, manifest["files"], hashes=False)
    if wrong:
        raise UserError(f"{wrong}; remove the folder {folder} to have it built again")
    return True


@contextlib.contextmanager
def _work_folder(target: Path, progress: Progress, advice: str) -> Iterator[Path]:
    """The build's own folder, held by one process at a time. Kept after a kill, and after an error if it holds much."""
    folder = target.parent / f".{target.name}.building"
    fresh = not target.parent.exists()
    with _explained(target, advice):
        lock = _hold(folder, progress)
    try:
        with _explained(target, advice):
            yield folder
    except KeyboardInterrupt:
        _clear_small(folder)
        raise
    except UserError as error:
        if not _clear_small(folder):
            raise UserError(f"{error} (finished work is kept in {folder}: the same command goes on from there)") from None
        raise
    except Exception:
        _clear_small(folder)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
        if fresh:
            with contextlib.suppress(OSError):
                target.parent.rmdir()  # where nothing was built in it


def _hold(folder: Path, progress: Progress) -> int:
    """Create and lock a folder; waits for another process that has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another build of the same data", 0, None)
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        with contextlib.suppress(FileNotFoundError):
            if os.stat(folder / "lock").st_ino == os.fstat(lock).st_ino:
                return lock
        os.close(lock)  # the folder was removed meanwhile: begin again


def _clear_small(folder: Path) -> bool:
    """Remove the work of an unsuccessful build, unless more than one block of it is finished."""
    if len(list(folder.glob("blocks/*.json"))) > 1:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


@contextlib.contextmanager
def _explained(target: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise UserError(f"{target}: a file may grow no larger here ({error.strerror}); raise `ulimit -f`, or {advice}") from None
        full = "No space left" in str(error) or "requested and" in str(error)  # the latter is numpy's word for it
        if full or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target.absolute().parent}: the disk is full; free some space, or {advice}") from None
        raise UserError(f"{target}: cannot write the data ({error.strerror or error})") from None


def _build(config: DataConfig, settings: dict[str, Any], settings_hash: str, files: list[SourceFile], folder: Path,
           target: Path, progress: Progress, workers: Workers) -> None:
    splitter = Splitter(config, files)
    _forget_what_changed(folder, {"hash": settings_hash, "split": splitter.describe(),
                                  "files": hashlib.sha256(repr(files).encode()).hexdigest()})
    shutil.rmtree(folder / "result", ignore_errors=True)
    for name in ("blocks", "refined", "tokens", "result/shards"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for leftover in itertools.chain(folder.glob("blocks/.*.tmp"), folder.glob("tokens/.*.tmp")):
        leftover.unlink(missing_ok=True)
    manifest = {"format": FORMAT, "settings_hash": settings_hash, "settings": settings,
                **_fill(config, files, splitter, folder, progress, workers)}
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    shards.write_file(folder / "result" / MANIFEST, [text.encode()])
    with contextlib.suppress(OSError):
        os.rmdir(target)  # an empty folder may stand in the way
    os.rename(folder / "result", target)


def _forget_what_changed(folder: Path, made_for: dict[str, Any]) -> None:
    """Remove finished work that was made for something else: of a changed list of files all but the blocks, each of which
    bears the name of what was read."""
    known = ledger.read_record(folder / "settings.json") or {}
    if known != made_for:
        same = all(known.get(key) == made_for[key] for key in ("hash", "split"))
        for name in ("refined", "tokens", "tokenizer", *(() if same else ("blocks",))):
            shutil.rmtree(folder / name, ignore_errors=True)
        ledger.commit(folder / "settings.json", made_for)


def _fill(config: DataConfig, files: list[SourceFile], splitter: Splitter, folder: Path, progress: Progress, workers: Workers,
          ) -> dict[str, Any]:
    """Write shards and tokenizer into folder/result; returns the manifest without its settings."""
    forget()
    build = Build(Setup(config, folder, splitter, ledger.BLOCK_BYTES), files, workers, progress)
    blocks = build.read()
    read, records = _merged(config, blocks)
    blocks, more = refine(blocks, corpus_passes(config, folder / "refined"), folder / "refined", progress)
    records += more
    splitter.settle(blocks)
    if not splitter.documents:
        _nothing_left(read, records)
    blocks, more = refine(blocks, held_out_passes(config, folder / "refined", splitter), folder / "refined", progress)
    records += more
    result = folder / "result"
    if not (folder / "tokenizer").is_dir():
        sample = build.sample(blocks, SAMPLE_BYTES)
        tokenizer = train_tokenizer(config.tokenizer, sample)
        tokenizer.save(folder / "tokenizer.tmp", convert=False)
        ledger.commit(folder / "trained.json", {"by": tokenizer.trained_by})
        os.rename(folder / "tokenizer.tmp", folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", result / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    splits, written = build.tokenize(blocks)
    if materialized(config):
        records.append(merged(config, (ledger.read_record(folder / "tokens" / f"{b.name}.augment.json") for b in blocks)))
    tokens = splits.get("train", {"tokens": 0})["tokens"]
    if tokens < config.sequence_length:
        raise UserError(f"data.sequence_length = {config.sequence_length}: the training split holds {tokens} tokens, "
                        "less than one row; give more text or a shorter sequence_length")
    labelled = _labels(config, result, splits)
    for name, split in splits.items():
        split["packing"] = packing_of(result, split, config, name)
    return {
        **labelled,
        "tokenizer": {"kind": config.tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                      "trained_by": (ledger.read_record(folder / "trained.json") or {}).get("by"),
                      "fingerprint": tokenizer.fingerprint, "pad_token_id": tokenizer.pad_token_id,
                      "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        "split": splitter.describe(),
        "splits": splits,
        "stages": [{"name": "read", "version": 1, "settings": {"on_error": config.on_error}, **read.as_dict()}, *records],
        "sources": build.identities(blocks),
        "files": describe_files(result, written),
    }


def _labels(config: DataConfig, folder: Path, splits: dict[str, Any]) -> dict[str, Any]:
    """The manifest's `labels`, of labelled documents."""
    if not config.label_fields:
        return {}
    found = {name: shards.ShardReader(folder / "shards", split["shards"]).labels() for name, split in splits.items()}
    return {"labels": summarize(config, found["train"], found.get("validation", []))}


def _merged(config: DataConfig, blocks: list[Block]) -> tuple[StageRecord, list[dict[str, Any]]]:
    """The record of reading, and the manifest's entry for each stage, over all blocks in order."""
    read, pipeline = StageRecord(), stages(config)
    for block in blocks:
        read.merge(block.facts["read"])
        for stage, record in zip(pipeline, block.facts["stages"], strict=True):
            stage.record.merge(record)
    return read, [stage.describe() for stage in pipeline]


def _nothing_left(read: StageRecord, records: list[dict[str, Any]]) -> None:
    dropped, left_out = dict(read.dropped), []
    for record in records:
        dropped |= record["dropped"]
        left_out += [sample["source"] for sample in record["samples"] if sample["reason"]]
    counts = {reason: min(count, read.documents_in) for reason, count in dropped.items()}  # a lone document was cut in two
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "all files are empty"
    firsts = [sample["message"] for sample in read.samples] + left_out
    first = f"; the first: {firsts[0]}" if firsts else ""
    raise UserError(f"data.sources: no documents left to train on ({reasons}){first}")
