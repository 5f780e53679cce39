"""Processes that are killed, asked to stop, or lose their disk: what is left must continue to the very same model.

PELLUCID_KILLS sets how many times SIGKILL falls (default 12).
"""

import fcntl
import multiprocessing
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest

from pellucid.observe.reader import Reader
from pellucid.run_files import Run
from pellucid.training.checkpoint import saved_steps

KILLS = int(os.environ.get("PELLUCID_KILLS", "12"))
STEPS = 24


def train_or_resume(tables, folder):
    """What a user's script does; runs in a process of its own."""
    import torch

    from pellucid.run import train

    torch.set_num_threads(1)
    train(tables, run_dir=folder, resume=os.path.isdir(folder))


@pytest.fixture(scope="module")
def process():
    """A function that starts train_or_resume; torch is imported once, in the server that forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pellucid.run", "torch._dynamo", "pyarrow.dataset", "pandas", "pytest"])

    def start(tables, folder):
        started = context.Process(target=train_or_resume, args=(tables, folder))
        started.start()
        return started

    return start


def killing_settings(tiny_tables, precision):
    tables = tiny_tables(max_steps=STEPS, precision=precision)
    tables["checkpoint"] = {"every_steps": 2}
    return tables


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def losses(folder):
    with Reader(folder) as run:
        steps, values = run.series("run", "loss", stream="run")
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def check_telemetry(folder, saved):
    """Whole, without gaps, and at most the last step short: `saved` steps were done for certain."""
    if not saved or not (folder / "run.sqlite").exists():
        return
    with Reader(folder) as run:
        assert run.query("PRAGMA integrity_check")[0]["integrity_check"] == "ok"
    assert list(losses(folder)) == list(range(len(losses(folder)))) and len(losses(folder)) >= saved - 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_killed_at_random_moments_ends_with_the_very_same_weights(
    precision, process, tiny_tables, tmp_path, final_state
):
    tables = killing_settings(tiny_tables, precision)
    process(tables, tmp_path / "warm").join()  # prepares the data
    began = time.monotonic()
    unbroken = process(tables, tmp_path / "unbroken")
    unbroken.join()
    whole = time.monotonic() - began
    assert unbroken.exitcode == 0
    expected = final_state(tmp_path / "unbroken")

    rng, kills, number, ended, stops = random.Random(os.environ.get("PELLUCID_SEED", "7")), 0, 0, False, []
    while kills < (KILLS + 1) // 2 or not ended:
        folder = tmp_path / f"run-{number}"
        worker = process(tables, folder)
        if kills < (KILLS + 1) // 2:
            worker.join(rng.uniform(0.1, 0.7) * whole)
        else:
            worker.join()
        if worker.is_alive():
            worker.kill()
            worker.join()
            kills, ended = kills + 1, False
            stops.append(max(saved_steps(folder / "checkpoints"), default=None))
            check_telemetry(folder, stops[-1])
            continue
        assert worker.exitcode == 0
        assert final_state(folder) == expected, f"after kills at {stops}"
        assert losses(folder) == losses(tmp_path / "unbroken"), f"telemetry after kills at {stops}"
        ended, number = True, number + 1
    assert not list(tmp_path.glob("run-*/checkpoints/*.saving")), "a later save cleans what a kill left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_saves_says_how_to_go_on_and_does(number, tiny_tables, tmp_path, final_state, process):
    """Through the real command, in a process of its own."""
    import tomli_w

    tables = killing_settings(tiny_tables, "fp32")
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables))
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from pellucid.cli import main; main()", "train"]
    child = subprocess.Popen(
        [*command, "tiny.toml", "--run-dir", str(folder)], cwd=tmp_path, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests under nohup ignore it, and so would the child
    )  # fmt: skip
    wait_for(lambda: len(saved_steps(folder / "checkpoints")) > 0 or child.poll() is not None)
    child.send_signal(number)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert f"stopped by {number.name} after " in output, output + errors
    assert f"pellucid train --run-dir {folder} --resume" in output
    step = max(saved_steps(folder / "checkpoints"))
    assert f"after {step} step" in output and step < STEPS

    process(None, folder).join()
    unbroken = process(tables, tmp_path / "unbroken")
    unbroken.join()
    assert final_state(folder) == final_state(tmp_path / "unbroken")


@pytest.fixture
def started(tiny_tables, tmp_path):
    """A function: the real command, training tiny.toml into tmp_path/run, as Popen with these options starts it."""
    import tomli_w

    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(killing_settings(tiny_tables, "fp32")))
    command = [sys.executable, "-c", "from pellucid.cli import main; main()", "train", "tiny.toml", "--run-dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return lambda **options: subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **options)


def test_it_trains_on_when_nobody_reads_any_more(started, tiny_tables, tmp_path, final_state, process):
    child = started(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert (child.wait(timeout=120), child.stderr.read()) == (0, b"")
    process(killing_settings(tiny_tables, "fp32"), tmp_path / "unbroken").join()
    assert final_state(tmp_path / "run") == final_state(tmp_path / "unbroken")


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_costs_no_step(nohup, started, tmp_path):
    """It sends SIGHUP, and refuses every further word."""
    ours, its = pty.openpty()

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    child = started(stdin=its, stdout=its, stderr=its, preexec_fn=take_terminal)
    os.close(its)
    wait_for(lambda: os.read(ours, 4096) and len(saved_steps(tmp_path / "run" / "checkpoints")) > 0)
    os.close(ours)
    assert child.wait(timeout=120) == 0
    done = max(saved_steps(tmp_path / "run" / "checkpoints"))
    with Reader(tmp_path / "run") as run:
        assert len(run.series("run", "loss", stream="run")[0]) == done
    assert (done == STEPS) == nohup and (tmp_path / "run" / "model").is_dir() == nohup


def test_kill_before_anything_is_saved_leaves_a_run_that_resumes_or_a_free_name(process, tiny_tables, tmp_path, final_state):
    tables, folder = killing_settings(tiny_tables, "fp32"), tmp_path / "run"
    worker = process(tables, folder)
    wait_for(folder.exists)
    worker.kill()
    worker.join()
    Run(folder)  # complete from the moment it exists
    process(None, folder).join()
    shutil.copytree(folder / "model", tmp_path / "model")
    process(tables, tmp_path / "unbroken").join()
    assert final_state(folder) == final_state(tmp_path / "unbroken")
