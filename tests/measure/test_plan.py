"""The plan engine: results kept one by one, kills survived, estimates told, the same answers in processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pellucid.config import UserError
from pellucid.data.workers import processors
from pellucid.measure.plan import Job, Plan, duration


def square(settings, scratch, tell):
    """A job that notes that it ran."""
    tell(0.5)
    with open(settings["log"], "a") as log:
        log.write(f"{settings['x']}\n")
    return {"square": settings["x"] ** 2}


def slow(settings, scratch, tell):
    time.sleep(settings["seconds"])
    return square(settings, scratch, tell)


def waits(settings, scratch, tell):
    (Path(settings["log"]).parent / f"worker-{os.getpid()}").touch()
    time.sleep(600)


def goes_on(settings, scratch, tell):
    """Counts how often it was begun in this scratch folder; stops the first time of the first settings."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / f"begun-{len(list(scratch.iterdir()))}").touch()
    if settings["stop"]:
        raise KeyboardInterrupt
    return len(list(scratch.iterdir()))


def fails(settings, scratch, tell):
    raise UserError("this job cannot be done")


def jobs(folder, count=5, function="square", **settings):
    return [Job(f"job-{x}", "test_plan:" + function, {"x": x, "log": str(folder / "log"), **settings}, 1.0) for x in range(count)]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers find this module by name."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))


def test_processors_are_counted_on_systems_without_affinities(tmp_path, monkeypatch):
    assert processors() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert processors() == 3
    assert len(Plan(jobs(tmp_path, 2), tmp_path).run(at_once=2)) == 2


def ran(folder):
    return sorted(map(int, (folder / "log").read_text().split()))


def test_finished_jobs_are_not_done_again(tmp_path):
    first = Plan(jobs(tmp_path, 3), tmp_path).run()
    assert first == {f"job-{x}": {"square": x * x} for x in range(3)}
    again = Plan(jobs(tmp_path, 5), tmp_path).run()
    assert list(again) == [f"job-{x}" for x in range(5)] and ran(tmp_path) == [0, 1, 2, 3, 4], "each ran once"


def test_other_settings_and_damaged_results_are_done_again(tmp_path):
    Plan(jobs(tmp_path, 3), tmp_path).run()
    (tmp_path / "jobs" / "job-1.json").write_text('{"fingerprint": "half')
    Plan(jobs(tmp_path, 2), tmp_path).run()
    assert ran(tmp_path) == [0, 1, 1, 2]
    Plan(jobs(tmp_path, 2, more=1), tmp_path).run()
    assert ran(tmp_path) == [0, 0, 1, 1, 1, 2]


def test_several_processes_give_the_same_results(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert Plan(jobs(tmp_path / "one"), tmp_path / "one").run() == Plan(jobs(tmp_path / "two"), tmp_path / "two").run(at_once=2)
    assert ran(tmp_path / "two") == [0, 1, 2, 3, 4]


def test_a_plan_that_was_killed_goes_on(tmp_path):
    program = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import test_plan; "
               f"from pellucid.measure.plan import Plan; f = Path({str(tmp_path)!r}); "
               "Plan(test_plan.jobs(f, 40, 'slow', seconds=0.05), f).run()")
    process = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "jobs" / "job-2.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    plan = Plan(jobs(tmp_path, 40, "slow", seconds=0.05), tmp_path)
    kept = len(plan.finished())
    assert 3 <= kept < 40
    assert len(plan.run()) == 40
    assert len(ran(tmp_path)) <= 41, "at most the job that was cut off ran twice"


def runs(worker):
    try:
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_the_process_that_started_them(tmp_path):
    program = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import test_plan; "
               f"from pellucid.measure.plan import Plan; f = Path({str(tmp_path)!r}); "
               "Plan(test_plan.jobs(f, 4, 'waits'), f).run(at_once=2)")
    process = subprocess.Popen([sys.executable, "-c", program])
    while len(list(tmp_path.glob("worker-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = [int(path.name.removeprefix("worker-")) for path in tmp_path.glob("worker-*")]
    until = time.monotonic() + 60
    while any(map(runs, workers)):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.05)


def test_the_mistake_of_a_job_is_told_and_what_is_done_is_kept(tmp_path):
    plan = Plan([*jobs(tmp_path, 2), Job("bad", "test_plan:fails", {})], tmp_path)
    for at_once in (1, 2):
        with pytest.raises(UserError, match="this job cannot be done"):
            plan.run(at_once)
    assert len(plan.finished()) == 2


def test_an_interrupted_plan_says_how_far_it_came(tmp_path, monkeypatch):
    def interrupt(settings, scratch, tell):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["test_plan"] if "test_plan" in sys.modules else __import__("test_plan"), "fails", interrupt)
    with pytest.raises(UserError, match=r"interrupted: 2 of 3 jobs are finished"):
        Plan([*jobs(tmp_path, 2), Job("bad", "test_plan:fails", {})], tmp_path).run()


def test_no_job_goes_on_from_what_other_settings_left(tmp_path):
    with pytest.raises(UserError, match="interrupted"):
        Plan([Job("one", "test_plan:goes_on", {"stop": True})], tmp_path).run()
    assert Plan([Job("one", "test_plan:goes_on", {"stop": False})], tmp_path).run() == {"one": 1}
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["one.json"]


def test_a_long_plan_asks_first_and_a_finished_one_does_not(tmp_path):
    long = [Job(job.name, job.function, job.settings, 1000.0) for job in jobs(tmp_path, 4)]
    plan = Plan(long, tmp_path / "plan")
    with pytest.raises(UserError, match=r"about 67 min on this machine \(4 jobs\); nothing was started: add --yes"):
        plan.ask(1, yes=False)
    assert not (tmp_path / "plan").exists()
    plan.ask(1, yes=True)
    assert plan.seconds_left(at_once=4) == 1000 and plan.seconds_left(at_once=100) == 1000
    plan.run()
    plan.ask(1, yes=False)
    assert plan.seconds_left() == 0


def test_progress_reaches_the_end_and_never_goes_back(tmp_path):
    heard = []
    Plan(jobs(tmp_path, 4), tmp_path).run(progress=lambda stage, done, total, detail: heard.append((done / total, detail)))
    shares = [share for share, _ in heard]
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0.125 in shares, "half of the first of four"
    assert heard[-1][1] == "4 of 4 jobs, 0 s left"


def test_durations():
    assert [duration(s) for s in (4, 600, 7200, 300_000)] == ["4 s", "10 min", "2.0 h", "3.5 days"]


def test_results_are_json_files(tmp_path):
    Plan(jobs(tmp_path, 1), tmp_path).run()
    record = json.loads((tmp_path / "jobs" / "job-0.json").read_text())
    assert record["result"] == {"square": 0} and record["settings"]["x"] == 0 and record["function"] == "test_plan:square"
    assert [p.name for p in (tmp_path / "jobs").iterdir()] == ["job-0.json"]


def test_a_local_ray_gives_the_same_results(tmp_path, monkeypatch):
    ray = __import__("ray") if os.environ.get("PELLUCID_REQUIRE_ALL") else pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine its workers would starve
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        assert Plan(jobs(tmp_path, 3), tmp_path).run(ray="local") == {f"job-{x}": {"square": x * x} for x in range(3)}
        assert ran(tmp_path) == [0, 1, 2]
        with pytest.raises(UserError, match="this job cannot be done"):
            Plan(jobs(tmp_path, 1, "fails"), tmp_path / "failing").run(ray="local")
    finally:
        ray.shutdown()


def test_no_ray_cluster_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="ray job submit"):
        Plan(jobs(tmp_path, 1), tmp_path).run(ray="ray://somewhere:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'pellucid\[ray\]'"):
        Plan(jobs(tmp_path, 1), tmp_path).run(ray="auto")
    assert not (tmp_path / "log").exists()
