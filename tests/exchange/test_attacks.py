"""Strangers' files: none runs anything, none crashes or hangs, every structural change is refused by the file's name."""

import ast
import io
import json
import os
import pickle
import pickletools
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from official_writer import dump, small_config, write_official

from pellucid.config import UserError
from pellucid.exchange import pickle_walk
from pellucid.exchange.convert import convert
from pellucid.exchange.huggingface import HuggingFaceSource
from pellucid.exchange.leaves import fill
from pellucid.exchange.load import load
from pellucid.exchange.pickle_walk import find_arrays
from pellucid.model.grok import Grok1

FIXTURES = Path(__file__).parents[1] / "fixtures"
CANARY = "pellucid_attack_canary"
WATCHED = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
           "ctypes.dlopen", "socket.connect", "marshal.loads")  # fmt: skip
_events: list[str] = []
_watching = False


def _audit(event, args):
    if _watching and (event in WATCHED or (event == "open" and CANARY in str(args[0]))):
        _events.append(f"{event} {args}"[:200])


sys.addaudithook(_audit)


class watched:
    """Any code run, module imported or canary touched inside is an error."""

    def __enter__(self):
        global _watching
        _events.clear()
        _watching = True

    def __exit__(self, *_):
        global _watching
        _watching = False
        assert not _events, _events
        assert not os.path.exists(f"/tmp/{CANARY}")


def s(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def name(module: str, attribute: str) -> bytes:
    return s(module) + s(attribute) + b"\x93"


def framed(body: bytes) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


TOUCH = s(f"touch /tmp/{CANARY}")
CALL = name("posix", "system") + TOUCH + b"\x85R"
ARRAY = dump(np.arange(6, dtype=np.float32))
BODY = ARRAY[11:-1]  # without PROTO, FRAME, STOP
QUANTIZED = (FIXTURES / "f1_base" / "ckpt-0" / "tensor00005_000").read_bytes()
PAYLOAD = np.arange(6, dtype=np.float32).tobytes()


def _reduce(function, *args) -> bytes:
    class Attack:
        def __reduce__(self):
            return function, args

    return pickle.dumps(Attack(), protocol=4)


ATTACKS = {
    "REDUCE of os.system": framed(CALL + b"."),
    "REDUCE, protocol 0": f"cposix\nsystem\n(S'touch /tmp/{CANARY}'\ntR.".encode(),
    "REDUCE, protocol 2": b"\x80\x02" + f"cposix\nsystem\nU\x1ctouch /tmp/{CANARY[:8]}\x85R.".encode("latin1"),
    "REDUCE of exec": _reduce(exec, f"open('/tmp/{CANARY}', 'w')"),
    "REDUCE of eval": _reduce(eval, f"open('/tmp/{CANARY}', 'w')"),
    "REDUCE of __import__": _reduce(__import__, "antigravity"),
    "REDUCE of open": _reduce(open, f"/tmp/{CANARY}", "w"),
    "INST": f"(S'touch /tmp/{CANARY}'\niposix\nsystem\n.".encode(),
    "OBJ": b"(cposix\nsystem\n" + TOUCH + b"o.",
    "NEWOBJ": framed(name("subprocess", "Popen") + s("true") + b"\x85\x81."),
    "NEWOBJ_EX": framed(name("subprocess", "Popen") + s("true") + b"\x85}\x92."),
    "BUILD with a hostile state": framed(name("types", "SimpleNamespace") + b")\x81}" + s("__class__") + s("x") + b"sb."),
    "BUILD on the array": framed(BODY + b"}" + s("dtype") + s("O") + b"sb."),
    "EXT1": b"\x80\x04\x82\x01.",
    "EXT2": b"\x80\x04\x83\x01\x01.",
    "EXT4": b"\x80\x04\x84\x01\x01\x01\x01.",
    "PERSID": b"Pevil\n.",
    "BINPERSID": framed(s("evil") + b"Q."),
    "GLOBAL": b"cposix\nsystem\n.",
    "STACK_GLOBAL": framed(name("posix", "system") + b"."),
    "STACK_GLOBAL with a dotted name": framed(name("numpy", "f2py.os.system") + TOUCH + b"\x85R."),
    "GLOBAL of an accepted module": framed(name("numpy", "load") + TOUCH + b"\x85R."),
    "numpy load gadget": framed(name("numpy", "memmap") + TOUCH + b"\x85R."),
    "numpy runstring gadget": framed(name("numpy.testing._private.utils", "runstring") + s("1") + b"}\x86R."),
    "numpy object dtype": ARRAY.replace(b"\x8c\x02f4", b"\x8c\x02O8"),
    "numpy object array": pickle.dumps(np.array([{"a": 1}], dtype=object), protocol=4),
    "numpy structured dtype": pickle.dumps(np.zeros(2, [("a", "f4")]), protocol=4),
    "dtype state with a subarray": ARRAY.replace(b"NNNJ", b"\x88NNJ"),
    "pkgutil.resolve_name": framed(name("pkgutil", "resolve_name") + s("os:system") + b"\x85R" + TOUCH + b"\x85R."),
    "operator.attrgetter": framed(name("operator", "attrgetter") + s("system") + b"\x85R."),
    "functools.partial": framed(name("functools", "partial") + name("posix", "system") + TOUCH + b"\x86R)R."),
    "builtins.getattr": framed(name("builtins", "getattr") + name("builtins", "object") + s("__subclasses__") + b"\x86R)R."),
    "importlib": framed(name("importlib", "import_module") + s("antigravity") + b"\x85R."),
    "torch gadget": framed(name("torch.hub", "load") + TOUCH + b"\x85R."),
    "call hidden by POP, before": framed(CALL + b"0" + BODY + b"."),
    "call hidden by POP, after": framed(BODY + CALL + b"0."),
    "call hidden by POP_MARK": framed(b"(" + CALL + b"1" + BODY + b"."),
    "call inside the shape": framed(BODY.replace(b"K\x06\x85", CALL + b"\x85", 1) + b"."),
    "second pickle after STOP": ARRAY + framed(CALL + b"."),
    "STOP too early": ARRAY[:60] + b"." + ARRAY[61:],
    "nested pickle in the payload's place": framed(BODY.replace(b"C\x18" + PAYLOAD, CALL) + b"."),
    "pickle loads pickle": framed(name("pickle", "loads") + b"C\x04abcd\x85R."),
    "memo: PUT over the accepted global": framed(name("posix", "system") + b"q\x050" + BODY + b"."),
    "memo: GET of nothing": ARRAY.replace(b"h\x03", b"h\xff"),
    "memo: GET swaps the type": ARRAY.replace(b"h\x03", b"h\x00"),
    "memo: LONG_BINGET": ARRAY.replace(b"h\x03", b"j\x03\x00\x00\x00"),
    "memo: cyclic tuple": framed(b"(h\x00\x94t\x940" + BODY + b"."),
    "DUP": framed(BODY + b"20."),
    "frame longer than the file": ARRAY[:3] + struct.pack("<Q", 2**63 - 1) + ARRAY[11:],
    "frame of length 0": ARRAY[:3] + struct.pack("<Q", 0) + ARRAY[11:],
    "frame inside a frame": ARRAY[:11] + b"\x95" + struct.pack("<Q", len(BODY)) + ARRAY[11:],
    "BINBYTES8 of 2^62 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "BINBYTES longer than the file": ARRAY.replace(b"C\x18", b"B\xff\xff\xff\x7f"),
    "BYTEARRAY8": ARRAY.replace(b"C\x18", b"\x96" + struct.pack("<Q", 24)),
    "LONG4 of 2 GiB": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "BINUNICODE8 of 2^62": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "shape too large": ARRAY.replace(b"K\x06\x85", b"J\xff\xff\xff\x7f\x85"),
    "shape negative": ARRAY.replace(b"K\x06\x85", b"J\xfa\xff\xff\xff\x85"),
    "shape huge in three dimensions": ARRAY.replace(b"K\x06\x85", b"J\xff\xff\xff\x7f" * 3 + b"\x87"),
    "shape spelt differently": ARRAY.replace(b"K\x06\x85", b"M\x06\x00\x85"),
    "Fortran order": ARRAY.replace(b"\x89C\x18", b"\x88C\x18"),
    "big-endian": ARRAY.replace(b"\x8c\x01<", b"\x8c\x01>"),
    "other class": QUANTIZED.replace(b"QuantizedWeight8bit", b"QuantizedWeight8bix"),
    "other module": QUANTIZED.replace(b"__main__", b"__init__"),
    "ml_dtypes finfo": QUANTIZED.replace(b"bfloat16", b"_finfo_x"),
    "extra key in the state": QUANTIZED[:-3] + s("x") + b"Nub.",
    "SETITEM of __setstate__": QUANTIZED[:-1] + b"}" + s("__setstate__") + name("posix", "system") + b"sb.",
    "trailing zero": ARRAY + b"\0",
    "protocol 5": b"\x80\x05" + ARRAY[2:],
    "protocol 2 of the same array": pickle.dumps(np.arange(6, dtype=np.float32), protocol=2),
    "empty": b"",
    "one byte": b"\x80",
    "a million marks": b"\x80\x04" + b"(" * 1_000_000,
    "deep tuples": b"\x80\x04)" + b"\x85" * 1_000_000 + b".",
    "zip of torch.save": b"PK\x03\x04" + b"\0" * 60,
    "polyglot": b"\x80\x04" + b"PK\x03\x04" + ARRAY,
}  # fmt: skip


def test_there_are_enough_attacks_and_each_differs_from_the_honest_file():
    assert len(ATTACKS) >= 40
    assert all(attack not in (ARRAY, QUANTIZED) for attack in ATTACKS.values())


def test_the_canary_sings_when_one_does_unpickle():
    """The alarm itself works: Python's unpickler would have run this."""
    with pytest.raises(AssertionError), watched():
        pickle.loads(_reduce(eval, "1 + 1"))


@pytest.mark.timeout(30)  # none hangs
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_by_name_and_runs_nothing(tmp_path, attack):
    path = tmp_path / "tensor00003_000"
    path.write_bytes(ATTACKS[attack])
    with watched(), pytest.raises(UserError, match="tensor00003_000"):
        find_arrays(path)


def test_the_package_cannot_unpickle():
    """No module of exchange imports pickle, ml_dtypes or their kin, or calls torch.load or numpy.load."""
    for path in Path(pickle_walk.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {name.split(".")[0] for name in names} & {"pickle", "_pickle", "dill", "ml_dtypes"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load")}, path


def test_attacks_are_refused_through_every_door(tmp_path):
    write_official(tmp_path / "ckpt-0", small_config())
    (tmp_path / "ckpt-0" / "tensor00004_000").write_bytes(ATTACKS["call hidden by POP, after"])
    for door in (lambda: load(tmp_path / "ckpt-0", config=small_config()), lambda: load(tmp_path / "ckpt-0"),
                 lambda: convert(tmp_path / "ckpt-0", tmp_path / "out", "hf", config=small_config())):  # fmt: skip
        with watched(), pytest.raises(UserError, match="tensor00004_000"):
            door()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt-0"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "tensor00000_000"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "dangling link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(UserError, match="tensor00000_000"):
        find_arrays(path)


def _mutate(data: bytes, r: random.Random) -> bytes:
    """One of ten kinds of damage; most of it near the structure, where it could matter."""
    b = bytearray(data)
    near = [*range(min(260, len(b))), *range(max(0, len(b) - 20), len(b))]
    at = r.choice(near) if r.random() < 0.7 else r.randrange(len(b))
    kind = r.randrange(10)
    if kind == 0:
        b[at] ^= 1 << r.randrange(8)
    elif kind == 1:
        b[at] = r.randrange(256)
    elif kind == 2:
        del b[at : at + r.randint(1, 40)]
    elif kind == 3:
        b[at:at] = bytes(r.randrange(256) for _ in range(r.randint(1, 20)))
    elif kind == 4:
        b = b[:at]
    elif kind == 5:
        b += bytes(r.randrange(256) for _ in range(r.randint(1, 50)))
    elif kind == 6:
        start = r.choice(near)
        b[at:at] = b[start : start + r.randint(1, 60)]
    elif kind == 7:
        b[at:at] = CALL
    elif kind == 8:
        codes = [op.code.encode("latin1")[0] for op in pickletools.opcodes]
        b[at] = r.choice(codes)
    else:
        for _ in range(r.randint(2, 8)):
            b[r.choice(near)] = r.randrange(256)
    return bytes(b)


def test_two_thousand_mutated_files_are_refused_or_differ_in_weights_only(tmp_path):
    r = random.Random(20240317)
    originals = [p.read_bytes() for n in ("f1_base", "f2_gqa3_pads") for p in sorted((FIXTURES / n / "ckpt-0").iterdir())]
    originals = [data for data in originals if len(data) < 5000] + originals[:6]
    payloads = {}
    for data in originals:
        (tmp_path / "o").write_bytes(data)
        found = find_arrays(tmp_path / "o")
        payloads[data] = [(a.offset, a.offset + a.map().nbytes) for a in (found.weight, found.scales) if a]
    path, refused = tmp_path / "tensor00009_000", 0
    for _ in range(2000):
        data = r.choice(originals)
        damaged = _mutate(data, r)
        path.write_bytes(damaged)
        try:
            with watched():
                found = find_arrays(path)
        except UserError as error:
            assert "tensor00009_000" in str(error)
            assert damaged != data
            refused += 1
            continue
        changed = [i for i, (x, y) in enumerate(zip(data, damaged, strict=True)) if x != y]
        assert all(any(low <= i < high for low, high in payloads[data]) or _known_spelling(found, data, i) for i in changed)
    assert refused > 1500


def _known_spelling(found, data, index) -> bool:
    """The one structural byte with two honest values: bfloat16's flags, 64 or 80."""
    return found.spelling.flags == 80 and data[index] == 64


# ------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_official(folder / "ckpt-0", small_config(1))
    convert(folder / "ckpt-0", folder / "hf", config=small_config(1))
    return folder / "hf"


def _copy(directory, target, **contents) -> Path:
    target.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (target / file).write_bytes(contents.get(file.split(".")[0], (directory / file).read_bytes()))
    return target


HOSTILE = [0, -1, 1, 2**31, 10**18, 1e400, -0.5, "x", "", None, [], {}, [1] * 50, True, "1" * 5000, {"a": {}}, 3.5]


def test_hostile_configurations_give_one_sentence(directory, tmp_path):
    values = json.loads((directory / "config.json").read_text())
    r = random.Random(7)
    for trial in range(300):
        mutated = dict(values)
        for key in r.sample(sorted(values), r.randint(1, 2)):
            mutated[key] = r.choice(HOSTILE)
        text = json.dumps(mutated).encode()
        if trial % 5 == 0:
            text = _mutate(text, r)
        folder = _copy(directory, tmp_path / "hf", config=text)
        with watched():
            try:
                source = HuggingFaceSource(folder)
            except UserError as error:
                assert str(tmp_path) in str(error)
                continue
        assert source.config.hidden_size == 16  # what is accepted still has the shapes of the file


def test_hostile_safetensors_give_one_sentence(directory, tmp_path):
    honest = (directory / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", honest[:8])[0]
    r = random.Random(8)
    for trial in range(300):
        if trial % 3 == 0:
            table = json.loads(honest[8 : 8 + length])
            entry = table[r.choice(sorted(table))]
            field = r.choice(sorted(entry))
            entry[field] = r.choice([*HOSTILE, [0, 10**12], [5, 4], [2**63, 2**64], "F64", "I64"])
            header = json.dumps(table).encode()
            data = struct.pack("<Q", len(header)) + header + honest[8 + length :]
        else:
            data = _mutate(honest[: 8 + length], r) + honest[8 + length :]
        folder = _copy(directory, tmp_path / "hf", model=data)
        with watched():
            try:
                source = HuggingFaceSource(folder)
                fill(Grok1(source.config), source)
            except UserError as error:
                assert str(tmp_path) in str(error)


PLACES = ["../../etc/passwd.safetensors", "/etc/x.safetensors", "a/b.safetensors", 3, None, "x.bin", "\0.safetensors"]


@pytest.mark.parametrize("place", PLACES)
def test_an_index_cannot_lead_out_of_the_folder(directory, tmp_path, place):
    folder = _copy(directory, tmp_path / "hf")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    with pytest.raises(UserError, match=r"index\.json"):
        HuggingFaceSource(folder)


def test_pickled_weights_are_refused_unread(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config().model_dump()))
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    (tmp_path / "pytorch_model.bin").write_bytes(buffer.getvalue())
    with watched(), pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load(tmp_path)
