"""The pickles of the official checkpoint, read and written without ever unpickling.

A tensor file is accepted only if it is, byte for byte, what this module would write for the shapes found in it; the
payloads in between are then memory-mapped. So nothing in a file can name code, and no opcode is ever obeyed.
Two objects exist: a float32 numpy array, and `QuantizedWeight8bit` (int8 `weight`, bfloat16 `scales`), protocol 4.
Source of the byte rules: CPython's Modules/_pickle.c (frames, memo), numpy's and ml_dtypes' `__reduce__`.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from pellucid.config import UserError

FRAME_TARGET = 64 * 1024  # _pickle.c FRAME_SIZE_TARGET: a frame ends after this; longer payloads stand outside frames
HEAD_BYTES = 512  # the opcodes before the first payload take at most 230 bytes
ITEM_BYTES = {"f4": 4, "i1": 1, "bfloat16": 2}
NUMPY_TYPES = {"f4": "<f4", "i1": "i1", "bfloat16": "<u2"}  # numpy has no bfloat16: its bits as uint16
_SHAPE = re.compile(rb"R\x94\(K\x01((?:K.|M..|J....){1,3})[\x85-\x87]", re.DOTALL)


@dataclass(frozen=True)
class Spelling:
    """How the writing program's library versions spelt the same thing."""

    numpy: str = "numpy.core"  # numpy 2: numpy._core
    owner: str = "__main__"  # module of QuantizedWeight8bit; also seen: model
    flags: int = 64  # of the bfloat16 dtype; ml_dtypes <= 0.2 writes 80


SPELLINGS = [Spelling(*each) for each in product(("numpy.core", "numpy._core"), ("__main__", "model"), (64, 80))]


@dataclass(frozen=True)
class StoredArray:
    """Where one array lies in a file. kind: 'f4', 'i1' or 'bfloat16' (as uint16 bits); C order, little-endian."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """The array, memory-mapped copy-on-write: the file itself can never be changed through it."""
        return np.memmap(self.path, NUMPY_TYPES[self.kind], "c", self.offset, self.shape)


@dataclass(frozen=True)
class TensorFile:
    """One official file: a float32 array in `weight`, or int8 `weight` with bfloat16 `scales`."""

    weight: StoredArray
    scales: StoredArray | None
    spelling: Spelling


@dataclass(frozen=True)
class _Payload:
    length: int


class _Pickler:
    """CPython's pickler for exactly these two objects: `pieces` holds literal bytes, and payloads by their length."""

    def __init__(self) -> None:
        self.pieces: list[bytes | int] = [b"\x80\x04"]
        self.frame: list[bytes | int] = []
        self.memo: dict[object, int] = {}
        self.memoized = 0

    def write(self, *parts: bytes | int) -> None:
        self.frame += parts

    def end_frame(self, at_least: int = 0) -> None:
        length = sum(part if isinstance(part, int) else len(part) for part in self.frame)
        if length and length >= at_least:
            header = [b"\x95" + struct.pack("<Q", length)] if length >= 4 else []
            self.pieces += header + self.frame
            self.frame = []

    def memoize(self, key: object = None) -> None:
        if key is not None:
            self.memo[key] = self.memoized
        self.memoized += 1
        self.write(b"\x94")

    def save(self, value: object) -> None:
        self.end_frame(at_least=FRAME_TARGET)
        if value is None:
            self.write(b"N")
        elif isinstance(value, bool):
            self.write(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            self.write(_integer(value))
        elif isinstance(value, tuple):
            self.save_tuple(value)
        elif isinstance(value, _Payload):
            self.save_payload(value.length)
        elif value in self.memo:  # a str, a bytes constant, or a Global
            self.write(b"h" + bytes([self.memo[value]]))
        elif isinstance(value, _Global):
            self.save(value.module)
            self.save(value.name)
            self.write(b"\x93")
            self.memoize(value)
        else:
            raw = value if isinstance(value, bytes) else str(value).encode()
            self.write((b"C" if isinstance(value, bytes) else b"\x8c") + bytes([len(raw)]) + raw)
            self.memoize(value)

    def save_tuple(self, items: tuple) -> None:
        if len(items) > 3:
            self.write(b"(")
        for item in items:
            self.save(item)
        self.write({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(items), b"t"))
        self.memoize()

    def save_payload(self, length: int) -> None:
        if length < 256:
            header = b"C" + bytes([length])
        elif length < 2**32:
            header = b"B" + struct.pack("<I", length)
        else:
            header = b"\x8e" + struct.pack("<Q", length)
        if length >= FRAME_TARGET:
            self.end_frame()
            self.pieces += [header, length]
        else:
            self.write(header, length)
        self.memoize()

    def save_array(self, kind: str, shape: tuple[int, ...], spelling: Spelling) -> None:
        self.end_frame(at_least=FRAME_TARGET)
        self.save(_Global(f"{spelling.numpy}.multiarray", "_reconstruct"))
        self.save((_Global("numpy", "ndarray"), (0,), b"b"))
        self.write(b"R")
        self.memoize()
        self.end_frame(at_least=FRAME_TARGET)
        self.write(b"(")  # the state: version, shape, dtype, Fortran order, bytes
        self.save(1)
        self.save(shape)
        self.save_dtype(kind, spelling)
        self.save(False)
        self.save(_Payload(math.prod(shape) * ITEM_BYTES[kind]))
        self.write(b"t")
        self.memoize()
        self.write(b"b")

    def save_dtype(self, kind: str, spelling: Spelling) -> None:
        self.end_frame(at_least=FRAME_TARGET)
        custom = kind == "bfloat16"
        self.save(_Global("numpy", "dtype"))
        self.save((_Global("ml_dtypes", "bfloat16") if custom else kind, False, True))
        self.write(b"R")
        self.memoize()
        sizes = (2, 2, spelling.flags) if custom else (-1, -1, 0)
        self.save((3, "|" if kind == "i1" else "<", None, None, None, *sizes))
        self.write(b"b")


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


def _integer(value: int) -> bytes:
    if 0 <= value < 2**8:
        return b"K" + bytes([value])
    if 0 <= value < 2**16:
        return b"M" + struct.pack("<H", value)
    return b"J" + struct.pack("<i", value)


def pieces(
    shape: tuple[int, ...], scales_shape: tuple[int, ...] | None = None, spelling: Spelling | None = None
) -> list[bytes | int]:
    """The file of a float32 array, or of a quantized weight: literal bytes in order, a payload as its length."""
    spelling, pickler = spelling or Spelling(), _Pickler()
    if scales_shape is None:
        pickler.save_array("f4", shape, spelling)
    else:
        pickler.save(_Global(spelling.owner, "QuantizedWeight8bit"))
        pickler.write(b")\x81")
        pickler.memoize()
        pickler.write(b"}")
        pickler.memoize()
        pickler.write(b"(")
        pickler.save("weight")
        pickler.save_array("i1", shape, spelling)
        pickler.save("scales")
        pickler.save_array("bfloat16", scales_shape, spelling)
        pickler.write(b"ub")
    pickler.write(b".")
    pickler.end_frame()
    return pickler.pieces


def find_arrays(path: Path) -> TensorFile:
    """Locate the arrays of one official tensor file. Nothing is executed; at most 2 KB of the file are read.

    Raises UserError, naming the file, for anything that is not exactly one of the two objects.
    """
    path = Path(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            return _find(path, file, status.st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _find(path: Path, file, size: int) -> TensorFile:
    head = file.read(HEAD_BYTES)
    departure = 0
    for spelling in SPELLINGS:
        quantized = b"QuantizedWeight8bit" in head[:64]
        layout = _layout_of(file, head, spelling, quantized)
        if layout is None:
            continue
        offsets, wrong = _compare(file, size, layout[0])
        if wrong is None:
            shape, scales_shape = layout[1:]
            weight = StoredArray(path, "i1" if quantized else "f4", shape, offsets[0])
            scales = StoredArray(path, "bfloat16", scales_shape, offsets[1]) if quantized else None
            return TensorFile(weight, scales, spelling)
        departure = max(departure, wrong)
    raise UserError(
        f"{path}: not a tensor of the official checkpoint: it departs at byte {departure} from the only two things "
        "accepted (a float32 array, or an int8 weight with bfloat16 scales); nothing in it was run: download it again"
    )


def _layout_of(file, head: bytes, spelling: Spelling, quantized: bool) -> tuple | None:
    """The (pieces, shape, scales shape) that a file with this head should have, were it honest."""
    shape = _shape_in(head)
    if shape is None or not quantized:
        return shape and (pieces(shape, None, spelling), shape, None)
    first = pieces(shape, (1,), spelling)
    position = 0
    for piece in first:
        if isinstance(piece, int):
            break
        position += len(piece)
    file.seek(position + math.prod(shape))
    scales_shape = _shape_in(file.read(HEAD_BYTES))
    return scales_shape and (pieces(shape, scales_shape, spelling), shape, scales_shape)


def _shape_in(header: bytes) -> tuple[int, ...] | None:
    match = _SHAPE.search(header)
    if match is None:
        return None
    shape, rest = [], match[1]
    while rest:
        width, form = {b"K": (2, "<xB"), b"M": (3, "<xH"), b"J": (5, "<xi")}[rest[:1]]
        shape.append(struct.unpack(form, rest[:width])[0])
        rest = rest[width:]
    return tuple(shape) if min(shape) > 0 and math.prod(shape) < 2**48 else None


def _compare(file, size: int, expected: list[bytes | int]) -> tuple[list[int], int | None]:
    """Payload offsets, and the first byte at which the file is not as expected (None: it is)."""
    offsets, position = [], 0
    for piece in expected:
        if isinstance(piece, int):
            offsets.append(position)
            position += piece
            continue
        if position + len(piece) > size:
            return offsets, size
        file.seek(position)
        found = file.read(len(piece))
        if found != piece:
            return offsets, position + next((i for i in range(len(found)) if found[i] != piece[i]), 0)
        position += len(piece)
    return offsets, None if position == size else position
