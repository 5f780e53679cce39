"""Checkpoints under every fault we could think of: the newest complete one always loads, and damage is named."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pellucid.config import UserError
from pellucid.training import checkpoint
from pellucid.training.checkpoint import DamagedCheckpoint, diff_settings, load, newest_good, retain, save


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(6, 5, generator=generator)
    return {
        "model": {"layers.0.w": weight, "half": weight.bfloat16(), "empty": torch.zeros(0, 3)},
        "optimizer": {"exp_avg.layers.0.w": weight.double() * 2, "step.layers.0.w": torch.tensor(float(step))},
        "random": {"torch": generator.get_state(), "flags": torch.tensor([True, False])},
    }


def state(step):
    return {"counters": {"step": step, "loss": 0.1 + 0.2, "best_loss": float("inf")}, "python": [3, 2**70]}


def put(root, step, best=False):
    return save(root, step, tensors(step), state(step), best=best)


def assert_is(saved, step, of=None):
    """That a loaded checkpoint holds bit for bit what was saved for `of` (default: its step)."""
    assert saved.step == step
    expected = tensors(step if of is None else of)
    assert saved.tensors.keys() == expected.keys()
    for group, named in expected.items():
        assert saved.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            found = saved.tensors[group][name]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert saved.state == state(step if of is None else of)


def fail_on_damage(path, reason):
    pytest.fail(f"{path}: {reason}")


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------- the fair weather


def test_round_trip_is_bit_exact(tmp_path):
    folder = put(tmp_path / "new" / "root", 7, best=True)
    assert folder.name == "step-7" and sorted(os.listdir(folder.parent)) == ["step-7"]
    saved = load(folder)
    assert_is(saved, 7)
    assert saved.best and saved.folder == folder
    assert_is(newest_good(folder.parent, fail_on_damage), 7)


def test_files_are_what_the_safetensors_library_reads_and_the_manifest_is_json(tmp_path):
    folder = put(tmp_path, 3)
    assert sorted(os.listdir(folder)) == ["manifest.json", "model.safetensors", "optimizer.safetensors",
                                          "random.safetensors"]
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("layers.0.w"), tensors(3)["model"]["layers.0.w"])
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_strided_tensors_are_saved_as_seen(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    folder = save(tmp_path, 0, {"model": {"t": matrix.T, "slice": matrix[:, 1:3]}}, {})
    found = load(folder).tensors["model"]
    assert torch.equal(found["t"], matrix.T) and torch.equal(found["slice"], matrix[:, 1:3])


def test_newest_is_by_number_and_nothing_saved_is_none(tmp_path):
    assert newest_good(tmp_path) is None
    assert newest_good(tmp_path / "absent") is None
    for step in (9, 10, 100, 11):
        put(tmp_path, step)
    assert newest_good(tmp_path).step == 100
    assert list(checkpoint.saved_steps(tmp_path)) == [9, 10, 11, 100]
    assert checkpoint.exists(tmp_path, 11) and not checkpoint.exists(tmp_path, 12)


def test_a_step_may_be_saved_again(tmp_path):
    put(tmp_path, 5)
    save(tmp_path, 5, tensors(6), state(6))
    assert_is(newest_good(tmp_path, fail_on_damage), 5, of=6)
    assert os.listdir(tmp_path) == ["step-5"]


def test_a_state_that_is_not_json_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, tensors(1), {"x": object()})
    assert os.listdir(tmp_path) == []


def test_integer_keys_become_the_strings_that_json_knows(tmp_path):
    saved = load(save(tmp_path, 1, {}, {"by_step": {10: "a", 2: "b"}}))
    assert saved.state == {"by_step": {"10": "a", "2": "b"}}


def test_an_unwritable_folder_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint of step 1"):
        put(tmp_path / "file" / "root", 1)


# ------------------------------------------------------------------------------------------- retention


def test_retention_keeps_the_last_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        put(tmp_path, step, best=step in (1, 2))
    removed = retain(tmp_path, keep_last=2)
    assert sorted(path.name for path in removed) == ["step-1", "step-3"]
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-4", "step-5"]
    retain(tmp_path, keep_last=1, keep_best=False)
    assert os.listdir(tmp_path) == ["step-5"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
def test_retention_never_costs_the_only_good_one(tmp_path, history, keep_last, keep_best):
    """history: (intact, best) by step. The newest intact ones stay, whatever else is damaged."""
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    for step, (intact, best) in enumerate(history):
        folder = put(root, step, best=best)
        if not intact:
            (folder / "model.safetensors").write_bytes(b"x")
    told = []
    retain(root, keep_last, keep_best, on_bad=lambda path, reason: told.append(path))
    left = set(checkpoint.saved_steps(root))
    good = [step for step, (intact, _) in enumerate(history) if intact]
    best = [step for step in good if history[step][1]]
    assert set(good[-keep_last:]) <= left
    assert not (keep_best and best) or best[-1] in left
    if good and len(history) > keep_last:
        assert left <= set(good) and len(left) <= keep_last + 1
    elif not good:
        assert left == set(range(len(history)))  # nothing intact: nothing is thrown away
    assert all(path.name == "model.safetensors" for path in told)


# ------------------------------------------------------------------------------------------- corruption

DAMAGES = ["flip", "truncate", "extend", "zero", "delete", "swap", "stale"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    for step in (1, 2):
        put(root, step)
    return root


def damage(folder, name, kind, position, other):
    path = folder / name
    data = bytearray(path.read_bytes())
    place = int(position * (len(data) * 8 - 1))
    if kind == "flip":
        data[place // 8] ^= 1 << (place % 8)
    elif kind == "truncate":
        del data[place // 8 :]
    elif kind == "extend":
        data += b"\0"
    elif kind == "zero":
        data[place // 8 :] = bytes(len(data) - place // 8)
        if bytes(data) == path.read_bytes():
            data[:8] = bytes(8)
    elif kind == "stale":
        data = (folder.parent / "step-1" / name).read_bytes()
    elif kind == "swap":
        others = sorted(p.name for p in folder.iterdir() if p.name not in (name, "manifest.json"))
        other = others[other % len(others)]
        path.write_bytes((folder / other).read_bytes())
        (folder / other).write_bytes(data)
        return {name, other}
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(data)
    return {name}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.sampled_from(DAMAGES), st.floats(0, 1), st.integers(0, 2))
def test_any_damage_is_found_and_named_and_the_one_before_is_used(tmp_path, pristine, index, kind, position, other):
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(pristine, root)
    newest = root / "step-2"
    name = sorted(path.name for path in newest.iterdir())[index]
    hurt = damage(newest, name, kind, position, other)
    told = []
    saved = newest_good(root, on_bad=lambda path, reason: told.append((path, reason)))
    assert_is(saved, 1)
    ((path, reason),) = told
    assert path.parent == newest and reason
    assert path.name in hurt | ({"manifest.json"} if "manifest.json" in hurt else set())
    with pytest.raises(UserError, match="damaged"):
        load(newest)


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    folder = put(tmp_path, 1)
    path = folder / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data) * 8, 7):  # 7 and 8 share no factor: all bits of a byte get their turn
        hurt = bytearray(data)
        hurt[place // 8] ^= 1 << (place % 8)
        path.write_bytes(hurt)
        with pytest.raises(DamagedCheckpoint):
            load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "7", '"x"', '{"sha256": 1}', "[" * 100_000, "{" * 9, "\xff", '{"files": {"a": 3}}'],
)
def test_a_strange_manifest_is_named_not_a_traceback(tmp_path, text):
    folder = put(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", ""])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path, name):
    (tmp_path / "outside").write_text("secret")
    folder = put(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"secret").hexdigest()
    manifest["files"][name] = {"bytes": 6, "sha256": digest}
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "manifest.json").write_bytes(checkpoint._text(manifest))
    with pytest.raises(DamagedCheckpoint):
        load(folder)


def test_a_checkpoint_under_another_steps_name_is_found(tmp_path):
    put(tmp_path, 1).rename(tmp_path / "step-9")
    with pytest.raises(DamagedCheckpoint, match="describes step 1, not step-9"):
        load(tmp_path / "step-9")


def test_nothing_is_ever_unpickled(tmp_path):
    folder = put(tmp_path, 1)
    data = b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."
    (folder / "model.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "manifest.json").write_bytes(checkpoint._text(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors"):
        load(folder)


# ------------------------------------------------------------------------- kills at every system call


class Killed(BaseException):
    """Stands for SIGKILL: after it, the process does nothing to the disk any more."""


@contextlib.contextmanager
def dying_at(monkeypatch, number, how):
    """Every operation that changes the disk is counted; the number-th is the last.

    how: "before" or "after" it is done, "torn" (half a write), or an errno (it fails, the process lives).
    """
    count = [0]

    def wrap(name):
        real = getattr(os, name)

        def operation(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            count[0] += 1
            if isinstance(how, int):
                if count[0] == number:
                    raise OSError(how, os.strerror(how), str(args[0]))
            elif count[0] > number or (count[0] == number and how == "before"):
                raise Killed
            elif count[0] == number:
                if how == "torn" and name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                else:
                    real(*args, **kwargs)
                raise Killed
            return real(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for name in ("open", "mkdir", "write", "fsync", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, wrap(name))
        yield count


def run_scenario(root, scenario):
    if scenario == "next":
        put(root, 3)
    elif scenario == "again":
        save(root, 2, tensors(7), state(7))
    else:
        put(root, 3)
        retain(root, keep_last=1)


@pytest.mark.parametrize("how", ["before", "after", "torn"])
@pytest.mark.parametrize("scenario", ["next", "again", "retain"])
def test_killed_at_any_operation_the_newest_complete_checkpoint_loads(tmp_path, monkeypatch, scenario, how):
    number, finished = 0, False
    while not finished:
        number += 1
        root = tmp_path / str(number)
        put(root, 1, best=True)
        put(root, 2)
        with dying_at(monkeypatch, number, how):
            try:
                run_scenario(root, scenario)
                finished = True
            except Killed:
                pass
        for folder in checkpoint._newest_first(root):
            checkpoint.verify(folder)  # not the newest alone: nothing half is left under a valid name
        saved = newest_good(root, fail_on_damage)
        if scenario == "again":
            assert_is(saved, 2, of=saved.state["counters"]["step"])
            assert saved.state["counters"]["step"] in (2, 7)
        else:
            assert_is(saved, saved.step)
            assert saved.step in (2, 3)
        assert scenario == "retain" or all(step in checkpoint.saved_steps(root) for step in (1, 2))
        put(root, 4)  # the next process finds its way, and clears up
        assert_is(newest_good(root, fail_on_damage), 4)
        left = [name for name in os.listdir(root) if not name.removeprefix("step-").isdigit()]
        assert left == ([] if checkpoint.exists(root, 2) or scenario != "again" else ["step-2.replaced"])
        shutil.rmtree(root)
    assert number > (20 if scenario == "next" else 26)  # or the operations were not counted


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("scenario", ["next", "again"])
def test_an_operation_that_fails_is_a_sentence_and_harms_nothing(tmp_path, monkeypatch, scenario, code):
    number, failures, finished = 0, 0, False
    while not finished:
        number += 1
        root = tmp_path / str(number)
        put(root, 1)
        put(root, 2)
        before = content(root / "step-1") | content(root / "step-2")
        with dying_at(monkeypatch, number, code) as count:
            try:
                run_scenario(root, scenario)
                finished = count[0] < number
            except UserError as error:
                failures += 1
                assert str(root) in str(error) and f"step {3 if scenario == 'next' else 2}" in str(error)
                assert ("disk is full" in str(error)) == (code == errno.ENOSPC)
        saved = newest_good(root, fail_on_damage)
        assert saved.step in (2, 3)
        if saved.state["counters"]["step"] == 2:
            assert content(root / "step-1") | content(saved.folder) == before
        assert not list(root.glob("*.saving"))
        shutil.rmtree(root)
    assert failures > 12


def test_everything_is_flushed_before_it_is_put_in_place(tmp_path, monkeypatch):
    """Without power-cut hardware: the order of system calls is what the promise rests on."""
    events, paths = [], {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def opening(path, *args, **kwargs):
        handle = real_open(path, *args, **kwargs)
        paths[handle] = os.path.basename(path)
        return handle

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("flush", paths[handle])), real_fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", os.path.basename(b))), real_rename(a, b)))
    put(tmp_path / "root", 1)
    files = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "manifest.json"]
    flushes = [("flush", name) for name in [*files, "step-1.saving"]]
    assert events == [*flushes, ("rename", "step-1"), ("flush", "root")]


def test_sigkill_at_random_moments(tmp_path):
    """A process that saves and prunes without pause is killed a dozen times; no acknowledged step is ever lost."""
    script = textwrap.dedent("""
        import os, random, signal, sys, time
        from pathlib import Path
        import torch
        from pellucid.training.checkpoint import newest_good, retain, save

        torch.set_num_threads(1)
        root, done = Path(sys.argv[1]) / "root", Path(sys.argv[1]) / "done"
        done.write_text("0")
        dice, moved = random.Random(0), 0
        for trial in range(12):
            saved = newest_good(root)
            first = saved.step + 1 if saved else 1
            child = os.fork()
            if child == 0:
                for step in range(first, 10**6):
                    save(root, step, {"model": {"w": torch.full((50_000,), step * 1.0)}}, {"step": step}, best=not step % 7)
                    done.write_text(str(step).rjust(9))
                    retain(root, keep_last=2)
            time.sleep(0.05 + 0.3 * dice.random())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged = int(done.read_text() or 0)
            saved = newest_good(root, on_bad=lambda path, reason: sys.exit(f"{path}: {reason}"))
            if saved:
                assert saved.state["step"] == saved.step and bool((saved.tensors["model"]["w"] == saved.step).all())
                assert saved.step >= acknowledged, (saved.step, acknowledged)
                moved += saved.step >= first
            else:
                assert acknowledged == 0
        assert moved >= 6, moved
        print("kills survived: 12")
    """)
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "kills survived: 12" in result.stdout


# -------------------------------------------------------------------------------------------- full disks


def test_a_disk_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    put(tmp_path, 1)
    before = content(tmp_path / "step-1")
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1234, 1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError) as error:
        put(tmp_path, 2)
    for part in (str(tmp_path), "step 2", "1234 bytes are free", "keep_last", "resume"):
        assert part in str(error.value)
    needed = int(str(error.value).split(" bytes (")[0].split()[-1])
    written = sum(path.stat().st_size for path in (tmp_path / "step-1").iterdir())
    assert written <= needed <= written + 30_000
    assert os.listdir(tmp_path) == ["step-1"] and content(tmp_path / "step-1") == before


def test_a_disk_that_fills_up_while_writing(tmp_path):
    """RLIMIT_FSIZE lets the kernel refuse bytes at chosen places: nothing, inside each file, the very last byte."""
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        import torch
        from pellucid.config import UserError
        from pellucid.training.checkpoint import save

        groups = lambda: {g: {"w": torch.arange(n, dtype=torch.float32)} for g, n in (("a", 1000), ("b", 2000), ("c", 4000))}
        folder = save(Path(sys.argv[1]), 1, groups(), {"x": 1})
        sizes = sorted(path.stat().st_size for path in folder.iterdir())
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        limits = {0, 1, sizes[-1] // 2} | {size - 1 for size in sizes}
        for limit in sorted(limits):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                save(Path(sys.argv[1]), 2, groups(), {"x": 1})
            except UserError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                assert "may grow no larger here" in str(error) and sys.argv[1] in str(error), error
                assert [path.name for path in Path(sys.argv[1]).iterdir()] == ["step-1"]
                assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
            else:
                sys.exit(f"limit {limit} did not bite")
        save(Path(sys.argv[1]), 2, groups(), {"x": 1})
        print("full disks:", len(limits))
    """)
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        pytest.fail("this test needs an unlimited RLIMIT_FSIZE to start from: ulimit -f unlimited")
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "full disks: 7" in result.stdout


# ---------------------------------------------------------------------------------------------- settings


def test_changed_settings_are_named():
    old = {"model": {"hidden_size": 128, "layers": 4}, "data": {"tokenizer": "ab"}, "gone": 1, "same": (1, 2)}
    new = {"model": {"hidden_size": 256, "layers": 4}, "data": {"tokenizer": "cd"}, "new": None, "same": [1, 2]}
    assert diff_settings(old, new) == [
        "model.hidden_size was 128, is 256",
        "data.tokenizer was 'ab', is 'cd'",
        "gone was 1, is None",
    ]
    assert diff_settings(old, old) == []
