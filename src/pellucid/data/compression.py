"""Opening compressed files. In zstd files, a truncated one is noticed and frames one after
another are one file (the library's own zstd reader just ends early)."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO

import zstandard

LARGEST_WINDOW = 1 << 31  # bytes: of `zstd --long=31`, the most there is


class _ZstdFrames(io.RawIOBase):
    """The decompressed bytes of one or more frames. Raises EOFError where the last frame is cut short."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            compressed = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._raw.read(1 << 16)
            if not compressed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
            self._ready = memoryview(self._frame.decompress(compressed))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def open_zst(raw: BinaryIO) -> BinaryIO:
    """A buffered reader of the decompressed bytes of a zstd file."""
    return io.BufferedReader(_ZstdFrames(raw), buffer_size=1 << 17)


OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": open_zst,
    ".bz2": lambda raw: bz2.BZ2File(raw),
    ".xz": lambda raw: lzma.LZMAFile(raw),
}
NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError)
