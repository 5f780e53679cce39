"""Picture 2, source: files in object storage and on the web, through fsspec (s3:// gs:// hf:// http:// ...).

Bytes are fetched in ranges, each again with growing pauses when a server is busy, slow or cuts it short; after
ATTEMPTS it is one sentence, whatever data.on_error says: a storage out of reach is no bad document. Credentials
come from the environment, as each storage's own tools take them; `options` (endpoint_url, anon, ...) from the source.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
import time
from functools import lru_cache
from typing import Any, BinaryIO

from pellucid.config import UserError

ATTEMPTS = 5
PAUSE = 0.5  # seconds after the first failure; doubles
RANGE_BYTES = 1 << 22  # fetched at once
PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, ImportError)


def list_remote(url: str, options: tuple[tuple[str, Any], ...], where: str) -> list[tuple[str, int, str]]:
    """(url, size, version) of the file, of the files below a folder, or of those a pattern matches; sorted.

    Raises UserError: nothing there, no access, out of reach, or a missing package.
    """
    system, path = _system(url, options, where)

    web = url.startswith("http")

    def find() -> list[dict[str, Any]]:
        if any(mark in path for mark in ("*[" if web else "*?[")):
            found = list(system.glob(path, detail=True).values())
            if web and not found:  # so too where the server cannot be reached
                system.info(path[: path.index("/", len("https://")) + 1])
            return found
        info = system.info(path)
        return list(system.find(path, detail=True).values()) if info["type"] == "directory" else [info]

    protocol = url.partition("://")[0]
    found = [info for info in _again(find, f"{where}: '{url}'") if info["type"] != "directory"]
    if not found:
        raise UserError(f"{where}: no file matches '{url}'")
    names = [(_full_name(protocol, info["name"]), int(info.get("size") or 0), _version(info)) for info in found]
    return sorted(names)


def open_remote(url: str, size: int, options: tuple[tuple[str, Any], ...]) -> BinaryIO:
    """A seekable reader. Raises UserError when the storage cannot be reached, then or while it is read."""
    system, path = _system(url, options, url)
    if size and getattr(system, "protocol", "") not in (("http", "https"), "http"):
        return io.BufferedReader(_Ranges(system, path, url, size), RANGE_BYTES)
    if size and _again(lambda: system.info(path), url).get("partial"):
        return io.BufferedReader(_Ranges(system, path, url, size), RANGE_BYTES)
    return _again(lambda: _download(system, path, size), url)  # a web server without ranges


class _Ranges(io.RawIOBase):
    """A file of known size, fetched range by range."""

    def __init__(self, system: Any, path: str, url: str, size: int):
        self._system, self._path, self._url, self._size, self._position = system, path, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        start, stop = self._position, min(self._size, self._position + len(buffer))
        if start >= stop:
            return 0

        def fetch() -> bytes:
            content = self._system.cat_file(self._path, start=start, end=stop)
            if len(content) != stop - start:
                raise OSError(f"{len(content)} of {stop - start} bytes came")
            return content

        content = _again(fetch, f"{self._url} at byte {start}")
        buffer[: len(content)] = content
        self._position = stop
        return len(content)


def _download(system: Any, path: str, size: int) -> BinaryIO:
    copy = tempfile.TemporaryFile()
    with system.open(path, "rb", block_size=0) as source:
        while block := source.read(1 << 20):
            copy.write(block)
    if size and copy.tell() != size:
        raise OSError(f"{copy.tell()} of {size} bytes came")
    copy.seek(0)
    return copy


def _again(action: Any, what: str) -> Any:
    """The result of an action, tried up to ATTEMPTS times. Raises UserError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # every storage raises kinds of its own
            error = _real(error)
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{what}: there is no such file or bucket") from None
            if isinstance(error, PERMANENT):
                raise UserError(f"{what}: {_sentence(error)}") from None
            if "redentials" in type(error).__name__:
                raise UserError(f"{what}: {_sentence(error)} (set them in the environment, or give "
                                "options = {anon = true})") from None
            if attempt == ATTEMPTS:
                raise UserError(f"{what}: the storage cannot be reached ({_sentence(error)}; tried {ATTEMPTS} "
                                "times)") from None
        time.sleep(PAUSE * 2 ** (attempt - 1))


def _real(error: Exception) -> Exception:
    """What lies behind an error: fsspec says FileNotFoundError over whatever befell a web server."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and (type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)):
        error = cause
    status = getattr(error, "status", None)  # of aiohttp's errors
    if status in (404, 410):
        return FileNotFoundError()
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return PermissionError(f"the server answers {status} {getattr(error, 'message', '')}".rstrip())
    return error


def _sentence(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def silence() -> None:
    """Keep the libraries that try again by themselves from telling so on stderr."""
    for name in ("gcsfs", "huggingface_hub.utils._http", "datasets.utils.file_utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@lru_cache(maxsize=64)
def _system(url: str, options: tuple[tuple[str, Any], ...], where: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{where}: '{url}' is not on this machine and fsspec is not installed; "
                        "pip install 'pellucid[remote]'") from None
    given: dict[str, Any] = {"use_listings_cache": False, **dict(options)}  # a changed file is seen as changed
    if protocol == "s3":
        client = {"endpoint_url": given.pop("endpoint_url")} if "endpoint_url" in given else {}
        limits = {"connect_timeout": given.pop("timeout", 20), "read_timeout": given.pop("read_timeout", 30)}
        given = {"config_kwargs": {**limits, "retries": {"max_attempts": 1}}, "client_kwargs": client, **given}
    if protocol in ("gs", "gcs"):
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, which keeps other servers' users waiting a minute
        given |= {"token": "anon"} if given.pop("anon", False) else {}
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{where}: '{url}' cannot be read ({_sentence(error)}); pip install 'pellucid[remote]'") from None
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        limit = ClientTimeout(total=None, sock_connect=given.pop("timeout", 20), sock_read=given.pop("read_timeout", 30))
        given["client_kwargs"] = {"timeout": limit, **given.get("client_kwargs", {})}
    silence()
    system, path = url_to_fs(url, **given)
    if protocol == "s3":
        system.retries = 1  # they are ours
    if protocol in ("gs", "gcs") and hasattr(type(system)._request, "__wrapped__"):  # likewise; gcsfs has no setting for its six
        system._request = type(system)._request.__wrapped__.__get__(system)
    return system, path


def _full_name(protocol: str, name: str) -> str:
    return name if "://" in name else f"{protocol}://{name.lstrip('/') if protocol != 'file' else name}"


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "generation", "blob_id", "LastModified", "mtime"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""
