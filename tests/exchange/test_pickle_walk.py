"""The opcode layout against CPython's own pickler, and against the official files."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from official_writer import QuantizedWeight8bit, dump

from pellucid.config import UserError
from pellucid.exchange.pickle_walk import Spelling, find_arrays, pieces

FIXTURES = Path(__file__).parents[1] / "fixtures"
NUMPY = np.core.multiarray._reconstruct.__module__.removesuffix(".multiarray") if np.__version__ < "2" else "numpy._core"


def joined(parts, *payloads) -> bytes:
    payloads = iter(payloads)
    return b"".join(part if isinstance(part, bytes) else next(payloads) for part in parts)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 70_000), st.integers(1, 35_000), st.sampled_from(["__main__", "model"]))
@example(65_535, 32_767, "__main__")
@example(65_536, 32_768, "__main__")
@example(65_300, 100, "__main__")  # the frame fills up between the two arrays
@example(32_000, 16_700, "model")
def test_written_opcodes_equal_those_of_pythons_pickler(rows, columns, owner):
    value = QuantizedWeight8bit(np.full((rows, 1), 3, np.int8), np.ones((1, columns), ml_dtypes.bfloat16))
    ours = pieces((rows, 1), (1, columns), Spelling(NUMPY, owner))
    assert joined(ours, value.weight.tobytes(), value.scales.tobytes()) == dump(value, owner)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=3).filter(lambda s: np.prod(s) < 100_000))
@example([70_000])
@example([16_384])
@example([63, 1])
def test_written_float_arrays_equal_those_of_pythons_pickler(shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert joined(pieces(tuple(shape), None, Spelling(NUMPY)), array.tobytes()) == dump(array)


@pytest.mark.parametrize("shape, scales", [((2, 70_000), (1, 70_000)), ((8, 300, 5), (8, 2, 5)), ((3, 2), (1, 2))])
def test_arrays_are_found_where_pickle_put_them(tmp_path, shape, scales):
    random = np.random.default_rng(1)
    weight = random.integers(-128, 128, shape, dtype=np.int8)
    value = QuantizedWeight8bit(weight, random.random(scales).astype(ml_dtypes.bfloat16))
    (tmp_path / "t").write_bytes(dump(value))
    found = find_arrays(tmp_path / "t")
    assert np.array_equal(found.weight.map(), value.weight)
    assert found.scales.map().tobytes() == value.scales.tobytes()


def test_old_ml_dtypes_flags_are_understood(tmp_path):
    """ml_dtypes 0.1 and 0.2 (of the release's time) write flags 80 for bfloat16; newer ones 64."""
    parts = pieces((4, 3), (2, 3), Spelling(flags=80))
    (tmp_path / "t").write_bytes(joined(parts, bytes(12), bytes(12)))
    assert find_arrays(tmp_path / "t").spelling == Spelling(flags=80)
    assert b"\x4b\x50" in parts[-1] or any(b"\x4b\x50" in part for part in parts if isinstance(part, bytes))


@pytest.mark.parametrize("name", ["f1_base", "f2_gqa3_pads"])
def test_official_files_are_written_back_byte_for_byte(name):
    for path in sorted((FIXTURES / name / "ckpt-0").iterdir()):
        found = find_arrays(path)
        payloads = [array.map().tobytes() for array in (found.weight, found.scales) if array]
        scales_shape = found.scales.shape if found.scales else None
        assert joined(pieces(found.weight.shape, scales_shape, found.spelling), *payloads) == path.read_bytes(), path


def test_a_full_size_payload_needs_no_memory():
    """1.6 GB experts and a 3.2 GB embedding are lengths in the layout, not bytes."""
    parts = pieces((8, 6144, 32768), (8, 1, 32768))
    assert sum(part if isinstance(part, int) else len(part) for part in parts) > 1.6e9
    assert sum(len(part) for part in parts if isinstance(part, bytes)) < 1000
    assert any(b"\x8e" in part for part in pieces((200_000, 6144), None) if isinstance(part, bytes))  # > 4 GiB: BINBYTES8


@pytest.mark.parametrize("array", [np.asfortranarray(np.zeros((3, 4), np.float32)), np.zeros(3), np.zeros(3, ">f4"),
                                   np.zeros(3, np.int8), np.zeros((2, 2, 2, 2), np.float32), np.float32(1),
                                   np.zeros(0, "f4")])  # fmt: skip
def test_other_arrays_are_refused_by_name(tmp_path, array):
    (tmp_path / "tensor00007_000").write_bytes(dump(array))
    with pytest.raises(UserError, match="tensor00007_000"):
        find_arrays(tmp_path / "tensor00007_000")
