"""Picture 2, source: names in the configuration become files, and files become documents, in a fixed order.

A name is a file, a folder, a glob, a url of some storage (remote.py), a Hugging Face dataset, or a builtin. A
file's own name says how it is opened (compression.py) and read (readers.py). Everything streams.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

from pellucid.config import SourceConfig, UserError, nearest
from pellucid.data.compression import DAMAGE, NAMES, OPENERS
from pellucid.data.document import WHOLE, Document, SourceFile, Span, Unreadable
from pellucid.data.readers import EXTENSIONS, READERS, known_format
from pellucid.data.remote import list_remote, open_remote
from pellucid.data.shards import file_sha256

BUILTINS = ("builtin:python", "builtin:python-topics")
HUGGING_FACE = "hf-dataset:"
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}


def list_files(sources: list[SourceConfig], key: str = "data.sources", split: str | None = None,
               labels: tuple[tuple[str, ...], str] = ((), "category")) -> list[SourceFile]:
    """Every file of every source, in the order they are read: sources as given, files sorted by name.

    `key` names the setting in error sentences; `labels` are the fields of a document's label, and their type. Raises
    UserError where a source matches nothing readable.
    """
    files: list[SourceFile] = []
    for index, source in enumerate(sources):
        where = f"{key}[{index}]"
        options = tuple(sorted(source.options.items()))
        if "://" in source.path:
            files += [replace(file, label_fields=labels[0], label_type=labels[1])
                      for file in _remote(source, index, where, split, options)]
            continue
        if source.path.startswith(HUGGING_FACE):
            name = source.path.removeprefix(HUGGING_FACE)
            version = _hub_version(name.split(":")[0])
            files.append(SourceFile(source.path, name, index, source.text_field, "hf", "", True, split, 0, version, (), *labels))
            continue
        named = os.path.isfile(source.path)
        for uri, path, reader in _matches(source.path, where):
            known, compression = (reader, "") if reader else known_format(path.name)
            if known == "folder":
                files.append(SourceFile(uri, uri, index, source.text_field, known, "", False, split, 0, "", (), *labels))
                continue
            size, version = state_of(path)
            files.append(SourceFile(
                uri, path, index, source.text_field, known, compression, named, split, size, version, (), *labels))
    return files


def read_documents(file: SourceFile, progress: Callable[[int], None] = lambda position: None, span: Span = WHOLE,
                   ) -> Iterator[Document | Unreadable]:
    """The documents of one file (or of a span of it) in order; `progress` hears the position in the file as stored.

    A document or a file that cannot be read yields an Unreadable with one sentence for the user. Raises UserError
    where the storage is out of reach or a package is missing.
    """
    reached = 0  # in the file as stored
    try:
        with opened(file) as (raw, stream):
            if span.start and file.format not in ("parquet",):
                stream.seek(span.start)
            for document in READERS[file.format](stream, file, span):
                if file.label_fields and isinstance(document, Document) and document.label is None:
                    document = Unreadable("no label", f"{document.source}: this kind of file has no field "
                                          f"'{file.label_fields[0]}'; labels come with jsonl, csv and tables")
                yield document
                reached = raw.tell() if raw else 0
                progress(reached)
    except DAMAGE as error:
        kind = NAMES.get(file.compression, "compressed")
        yield Unreadable("damaged", f"{file.uri}: not a complete {kind} file ({error}; after byte {reached} of those stored); "
                         "fetch or compress it again")
    except OSError as error:
        if file.compression == ".bz2" and error.errno is None:  # what bz2 raises over bad data
            yield Unreadable("damaged", f"{file.uri}: not a complete bzip2 file ({error}; after byte {reached} of those stored); "
                             "fetch or compress it again")
            return
        yield Unreadable("unreadable", f"{file.uri}: cannot be read ({error.strerror or error})")


@contextmanager
def opened(file: SourceFile) -> Iterator[tuple[BinaryIO | None, BinaryIO | None]]:
    """(the file as stored, the same decompressed)."""
    if file.format in ("hf", "folder"):
        yield None, None
        return
    with open_remote(file.path, file.size, file.options) if file.remote else open(file.path, "rb") as raw:
        with OPENERS[file.compression](raw) as stream:
            yield raw, stream


def sha256_of(path: Path) -> str | None:
    """Of a file on this machine; None of one that may not be read."""
    try:
        return file_sha256(path)
    except OSError:
        return None


def state_of(path: Path) -> tuple[int, str]:
    """(bytes, time of change) of a file on this machine."""
    state = path.stat()
    return state.st_size, str(state.st_mtime_ns)


# ------------------------------------------------------------------------------------ names to files


def _matches(path: str, where: str) -> Iterator[tuple[str, Path, str | None]]:
    """(uri, path, reader or None for the name's own) of each file behind one configured name."""
    if path.startswith("builtin:"):
        yield from _builtin(path, where)
        return
    shut: set[str] = set()
    if os.path.isfile(path):
        if known_format(path) is None:
            raise UserError(f"{where}: '{path}' has no known extension; known: {_known_extensions()}")
        found = [path]
    elif os.path.isdir(path):
        found = [name for name in _matching(os.path.join(glob.escape(path), "**"), shut) if known_format(name)]
        if not found and not shut:
            raise UserError(f"{where}: no file in the folder '{path}' has a known extension ({_known_extensions()})")
    else:
        matched = _matching(path, shut)
        found = [name for name in matched if known_format(name)]
        if not matched and not shut:
            raise UserError(f"{where}: no file matches '{path}' (looked from the folder {_looked_from(path)})")
        if not found and not shut:
            raise UserError(f"{where}: no file that '{path}' matches has a known extension ({_known_extensions()})")
    for name in _each_once([*found, *shut]):
        absolute = os.path.abspath(name)
        try:
            absolute.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: the file name {os.fsencode(absolute)!r} is not UTF-8; rename the file") from None
        yield absolute, Path(absolute), "folder" if name in shut else None


def _each_once(names: list[str]) -> list[str]:
    """Files in the order of their names, each by the shortest name of it: symbolic links give a file many."""
    by_place: dict[str, str] = {}
    real = cache(os.path.realpath)  # many files share a folder
    for name in sorted(names, key=lambda name: (len(name), name)):
        folder, last = os.path.split(name)
        by_place.setdefault(real(name) if os.path.islink(name) else os.path.join(real(folder), last), name)
    return sorted(by_place.values())


def _matching(pattern: str, shut: set[str]) -> list[str]:
    """The files that a glob matches. As the library's, but that `**` enters no folder twice: links may lead in circles.

    `shut` gets the folders that it looks into and that may not be read.
    """
    before, *after = re.split(r"(?<![^/])\*\*(?:/+|$)", pattern, maxsplit=1)
    if not after:
        folder, last = os.path.split(pattern)
        if glob.has_magic(last):
            shut.update(filter(_is_shut, glob.glob(folder or ".")))
        return [name for name in glob.glob(pattern) if os.path.isfile(name)]
    named = not glob.has_magic(before)
    roots = (root for root in glob.glob(before or ".") if named or not _written_by_us(root))
    folders = (folder for root in roots for folder in _folders(root, shut))
    return [name for folder in folders for name in _matching(os.path.join(glob.escape(folder), after[0] or "*"), shut)]


def _is_shut(folder: str) -> bool:
    return os.path.isdir(folder) and not _is_passed_over(os.path.basename(folder)) and not os.access(folder, os.R_OK | os.X_OK)


def _is_passed_over(name: str) -> bool:
    """Whether it is a hidden folder's name, or of one that a file system keeps for itself."""
    return name.startswith(".") or name == "lost+found"


def _folders(root: str, shut: set[str]) -> Iterator[str]:
    """A folder and those below it but those passed over and our own, also behind links, each once."""
    entered = {os.path.realpath(root)}
    for parent, names, _ in os.walk(root, followlinks=True, onerror=lambda error: shut.add(error.filename)):
        yield parent
        below = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(names) if not _is_passed_over(name)}
        names[:] = [name for name, place in below.items()
                    if place not in entered and not entered.add(place) and not _written_by_us(place)]


def _written_by_us(folder: str) -> bool:
    """Whether it is a run or prepared data: what comes of a text is no part of it, or each build would read the one before."""
    if not any(os.path.exists(os.path.join(folder, name)) for name in ("config.toml", "shards")):
        return False
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and ("pellucid" in manifest or "settings_hash" in manifest)


def _remote(source: SourceConfig, index: int, where: str, split: str | None, options: tuple) -> Iterator[SourceFile]:
    found = list_remote(source.path, options, where)
    known = [(url, size, version, known_format(url.partition("?")[0])) for url, size, version in found]
    if not any(kind for *_, kind in known):
        raise UserError(f"{where}: no file of '{source.path}' has a known extension ({_known_extensions()})")
    for url, size, version, kind in known:
        if kind:
            yield SourceFile(url, url, index, source.text_field, *kind, len(found) == 1, split, size, version, options)


def _hub_version(name: str) -> str:
    """What tells one state of a dataset from another: the hub's commit, or the files of a local folder."""
    if os.path.isdir(name):
        states = [(str(p), *state_of(p)) for p in sorted(Path(name).rglob("*")) if p.is_file()]
        return hashlib.sha256(repr(states).encode()).hexdigest()
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(name).sha or ""
    except Exception:  # not installed, or out of reach: opening it says so
        return ""


def _builtin(name: str, where: str) -> Iterator[tuple[str, Path, str | None]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    if name not in BUILTINS:
        raise UserError(f"{where}: there is no '{name}'{nearest(name, list(BUILTINS))}")
    if name == "builtin:python-topics":
        topics = library / "pydoc_data" / "topics.py"
        if not topics.is_file():
            raise UserError(f"{where}: this Python has no pydoc_data.topics; give a file of your own")
        yield name, topics, "topics"
        return
    found = sorted(p.relative_to(library) for p in library.rglob("*.py") if p.is_file())
    found = [relative for relative in found if not LEFT_OUT & set(relative.parts)]
    if not found:
        raise UserError(f"{where}: this Python carries no library source in {library}; give a file of your own")
    for relative in found:
        yield f"{name}/{relative.as_posix()}", library / relative, None


def _looked_from(path: str) -> str:
    parent = Path(os.path.abspath(path)).parent
    while not parent.is_dir():
        parent = parent.parent
    return str(parent)


def _known_extensions() -> str:
    known = [f".{name}" for name in EXTENSIONS]
    return f"{' '.join(known)}, each also with {' '.join(suffix for suffix in OPENERS if suffix)}"
