"""The scheduler of one machine: order, room, failures, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slurm import LocalJob, LocalScheduler, Request, SlurmError
from slurm import local as module
from slurm.local import visible_gpus


@pytest.fixture
def run(tmp_path):
    """Run jobs on a machine of two CPUs; returns the events in order."""

    def run(*jobs, cpus=2, gpus=0):
        events = []
        LocalScheduler(tmp_path / "logs", cpus=cpus, gpus=gpus).run(jobs, events.append)
        return events

    return run


def writer(path: Path, *, seconds: float = 0):
    """A call that writes when it ran and what it saw to ``PATH.RANK``. (A closure: pickled by value.)"""

    def write() -> None:
        import json
        import os
        import time

        started = time.time()
        time.sleep(seconds)
        said = {"started": started, "ended": time.time(), "environment": dict(os.environ), "pid": os.getpid()}
        rank = os.environ["SUBMITIT_LOCAL_GLOBALID"]
        path.with_name(f"{path.name}.{rank}").write_text(json.dumps(said))

    return write


def failing():
    def fail() -> None:
        raise ValueError("asked to fail")

    return fail


def read(path: Path, rank: int = 0) -> dict:
    return json.loads(path.with_name(f"{path.name}.{rank}").read_text())


def test_children_run_after_their_parents_and_after_a_failure_as_asked(run, tmp_path):
    events = run(
        LocalJob("last", writer(tmp_path / "last"), after_any=("child", "good")),
        LocalJob("child", writer(tmp_path / "child"), after_ok=("bad",)),
        LocalJob("good", writer(tmp_path / "good")),
        LocalJob("bad", failing()),
    )
    order = [(event.kind, event.name) for event in events]
    assert (
        order.index(("failed", "bad"))
        < order.index(("cancelled", "child"))
        < order.index(("started", "last"))
    )
    assert order.index(("finished", "good")) < order.index(("started", "last"))
    assert not (tmp_path / "child.0").exists()
    ended = {event.name: event for event in events if event.kind in ("finished", "failed")}
    assert (ended["good"].exit_status, ended["bad"].exit_status) == (0, 1)
    assert "ValueError: asked to fail" in ended["bad"].logs[0].read_text()


def test_as_many_jobs_at_once_as_the_machine_holds(run, tmp_path):
    run(*(LocalJob(f"job{number}", writer(tmp_path / f"job{number}", seconds=1)) for number in range(4)))
    ran = [read(tmp_path / f"job{number}") for number in range(4)]
    at_once = [sum(a["started"] <= b["started"] < a["ended"] for a in ran) for b in ran]
    assert max(at_once) == 2


def test_job_larger_than_the_machine_runs_alone_with_all_its_ranks(run, tmp_path):
    large = Request(nodes=2, ranks_per_node=2, cpus_per_rank=3)
    events = run(
        LocalJob("small", writer(tmp_path / "small", seconds=0.5)),
        LocalJob("large", writer(tmp_path / "large"), large),
        LocalJob("late", writer(tmp_path / "late")),
    )
    assert [event.name for event in events] == ["small", "small", "large", "large", "late", "late"]
    seen = [read(tmp_path / "large", rank)["environment"] for rank in range(4)]
    assert {entry["SUBMITIT_LOCAL_NTASKS"] for entry in seen} == {"4"}
    assert {entry["OMP_NUM_THREADS"] for entry in seen} == {"3"}


def test_gpus_are_shared_out_and_never_twice_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    one_gpu = Request(gpus_per_rank=1)
    jobs = [
        LocalJob("left", writer(tmp_path / "left", seconds=1), one_gpu),
        LocalJob("right", writer(tmp_path / "right", seconds=1), one_gpu),
        LocalJob("none", writer(tmp_path / "none")),
    ]
    LocalScheduler(tmp_path / "logs", cpus=8).run(jobs)
    seen = [
        read(tmp_path / name)["environment"]["CUDA_VISIBLE_DEVICES"] for name in ("left", "right", "none")
    ]
    assert sorted(seen) == ["", "GPU-a", "GPU-b"]


def test_more_gpus_than_there_are_is_said_before_anything_starts(run, tmp_path):
    with pytest.raises(SlurmError, match="wants asks for 4 GPUs; this machine has 1"):
        run(
            LocalJob("first", writer(tmp_path / "first")),
            LocalJob("wants", failing(), Request(ranks_per_node=4, gpus_per_rank=1)),
            gpus=1,
        )
    assert not (tmp_path / "logs").exists()


def test_visible_gpus_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ("2", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()


def test_surrounding_job_is_hidden_from_the_ranks(run, tmp_path, monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_STEP_ID", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "3")
    run(LocalJob("job", writer(tmp_path / "job")))
    seen = read(tmp_path / "job")["environment"]
    assert not {"SLURM_PROCID", "SLURM_STEP_ID", "RANK", "MASTER_ADDR"} & set(seen)


def test_failed_rank_ends_the_others(run):
    def fail_or_wait() -> None:
        import os
        import time

        if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
            raise ValueError("no")
        time.sleep(300)

    started = time.monotonic()
    events = run(LocalJob("job", fail_or_wait, Request(ranks_per_node=2)))
    assert events[-1].kind == "failed"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("jobs", "complaint"),
    [
        ([("a", ("b",))], "a waits for 'b', which is none of the jobs"),
        ([("a", ("b",)), ("b", ("a",))], "a waits for 'b', which waits for it in turn"),
        ([("a", ()), ("a", ())], "two jobs are named 'a'"),
    ],
)
def test_jobs_that_could_never_all_run_are_refused(run, jobs, complaint):
    with pytest.raises(SlurmError, match=complaint):
        run(*(LocalJob(name, failing(), after_ok=after) for name, after in jobs))


LAUNCHER = """
import signal, sys
from pathlib import Path
from slurm import LocalJob, LocalScheduler, Request, StopFlag

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

class Wait:
    def __init__(self, folder, stops): self.folder, self.stops = folder, stops
    def __call__(self):
        import os, time
        from slurm import StopFlag
        stop = StopFlag().install() if self.stops else (lambda: False)
        rank = os.environ["SUBMITIT_LOCAL_GLOBALID"]
        (self.folder / f"{self.stops}.{rank}").write_text(f"{os.getpid()} {os.getppid()}")
        while not stop():
            time.sleep(0.05)
        (self.folder / f"checkpoint.{rank}").touch()

folder = Path(sys.argv[1])
jobs = [LocalJob("a", Wait(folder, True), Request(ranks_per_node=2)), LocalJob("b", Wait(folder, False))]
try:
    LocalScheduler(folder / "logs", cpus=3).run(jobs)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def launched(tmp_path):
    """A launcher of two jobs, with three ranks and a controller each, that run until they are stopped."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    files = [tmp_path / name for name in ("True.0", "True.1", "False.0")]
    wait_for(lambda: all(path.exists() and path.read_text() for path in files))
    ranks, controllers = zip(*(map(int, path.read_text().split()) for path in files))
    yield launcher, ranks, controllers
    for pid in (launcher.pid, *controllers):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_stopped_launcher_and_checkpoints_are_written(tmp_path, launched, number):
    launcher, ranks, controllers = launched
    os.killpg(launcher.pid, number)  # as a terminal's Ctrl-C does
    output, errors = launcher.communicate(timeout=30)
    wait_for(lambda: not any(alive(pid) for pid in (*ranks, *controllers)))
    assert (tmp_path / "checkpoint.0").exists() and (tmp_path / "checkpoint.1").exists()
    assert output.split() == (["interrupted"] if number == signal.SIGINT else [])
    assert errors == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_end_with_their_controller_if_nobody_is_left_to_end_them(launched):
    launcher, ranks, controllers = launched
    for pid in (launcher.pid, *set(controllers)):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in ranks), seconds=5)


def test_job_of_a_killed_controller_has_failed_once_its_processes_have_ended(run, tmp_path):
    """Its ranks and the processes that they have started: or the same command would run beside them."""
    said = tmp_path / "pids"

    def work() -> None:
        import os
        import subprocess
        import time

        child = subprocess.Popen(["sleep", "60"])
        said.with_name("part").write_text(f"{os.getppid()} {os.getpid()} {child.pid}")
        said.with_name("part").rename(said)
        time.sleep(60)

    def kill_controller() -> None:
        wait_for(said.exists)
        os.kill(int(said.read_text().split()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_controller)
    killer.start()
    events = run(LocalJob("job", work))
    left = [int(pid) for pid in said.read_text().split()]
    try:
        assert (events[-1].kind, events[-1].exit_status) == ("failed", -signal.SIGKILL)
        wait_for(lambda: not any(alive(pid) for pid in left), seconds=2)
    finally:
        killer.join()
        for pid in filter(alive, left):
            os.kill(pid, signal.SIGKILL)


SLOW_TO_STOP = """
import sys
from pathlib import Path
from slurm import LocalJob, LocalScheduler

class Work:
    def __init__(self, folder): self.folder = folder
    def say(self, word):
        with open(self.folder / "said", "a") as file:
            file.write(f"{word} ")
    def __call__(self):
        import os, time
        from slurm import StopFlag
        stop = StopFlag().install()
        again = (self.folder / "said").exists()
        self.say("started")
        while not again and not stop():
            time.sleep(0.05)
        time.sleep(0 if again else 3)
        self.say("ended")

folder = Path(sys.argv[1])
LocalScheduler(folder / "logs", cpus=1).run([LocalJob("a", Work(folder))])
"""


def test_launch_after_a_killed_one_waits_until_its_ranks_have_ended(tmp_path):
    command = [sys.executable, "-c", SLOW_TO_STOP, str(tmp_path)]
    launcher = subprocess.Popen(command)
    wait_for((tmp_path / "said").exists)
    launcher.kill()
    launcher.wait()
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "said").read_text().split() == ["started", "ended", "started", "ended"]


def test_jobs_of_an_earlier_launch_that_do_not_end_are_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GOODBYE_S", 0.3)
    run()
    (held,) = (tmp_path / "logs").glob("*.lock")
    with open(held) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SlurmError, match=r"processes of an earlier launch .*jobs\.lock"):
            run(LocalJob("job", failing()))
    assert [event.kind for event in run(LocalJob("job", writer(tmp_path / "job")))] == ["started", "finished"]


def test_file_system_without_locks_is_no_hindrance(run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert [event.kind for event in run(LocalJob("job", writer(tmp_path / "job")))] == ["started", "finished"]


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
