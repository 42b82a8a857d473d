"""Ten thousand tasks planned, asked about and submitted; a hundred thousand receipts made into tables.

    python -m benchmarks load plan|status|submit|aggregate [--dir FOLDER] [--small]

Each command runs as a user would run it, in a process of its own, imports included. ``submit`` needs a
testbed (``python -m slurm.testbed up``) and SLURM_CONF; its jobs are held, so that nothing runs, and are
cancelled at the end. ``aggregate`` makes its store once (three minutes, 1.4 GB) and
reads it once before it is timed.
Figures are printed and appended to ``benchmarks/results.csv``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.synthetic import Shape, make
from pipeline.manifest import Manifest
from slurm import SlurmError
from slurm.commands import ask

TASKS = Shape()  # 10,000 fine-tunings of 8 pretrainings
# Below Slurm's default MaxJobCount of 10,000, with a job a task: 9,984 fine-tunings of 8 pretrainings.
JOBS = Shape(fractions=26, seeds=24)
RECEIPTS = Shape(datasets=4, methods=10, seeds=25)  # 100,000 fine-tunings of 80 pretrainings
SMALL = Shape(methods=2, protocols=1, fractions=2, seeds=2)
STAND_IN = """#!/bin/sh
echo {name} >> {folder}/calls
cat {folder}/{name}.txt
"""


@dataclass(frozen=True)
class Run:
    """What a command took: wall-clock and CPU seconds, and the most memory it held, in MB."""

    seconds: float
    cpu_seconds: float
    megabytes: float

    def figures(self, name: str, *, seconds: float | None, megabytes: float | None = None) -> list[Figure]:
        return [
            Figure(name, self.seconds, "s", seconds),
            Figure(f"{name}: CPU", self.cpu_seconds, "s"),
            Figure(f"{name}: memory", self.megabytes, "MB", megabytes),
        ]


def timed(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Run:
    """Run a Python module to its end, its output going nowhere.

    Raises:
        RuntimeError: it failed; with what it complained of.
    """
    before = time.monotonic()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},  # as jobs run by default
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            complaints.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {complaints.read().decode(errors='replace')}")
    return Run(time.monotonic() - before, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def launch(verb: str, folder: Path, *options: str) -> list[str]:
    """The words of a launcher command on the experiment below ``folder``."""
    where = ["--store", str(folder / "store"), "--runs", str(folder / "runs")]
    experiment = "load" if verb in ("status", "cancel") else str(folder / "load.yaml")
    return ["pipeline.launch", verb, experiment, *where, *options]


def plan(folder: Path, shape: Shape) -> list[Figure]:
    """Plan and print every task; none is done."""
    tasks = len(make(shape, folder).tasks)
    printed = timed(launch("plan", folder, "--cluster", "local"))
    return [Figure("plan: tasks", tasks, ""), *printed.figures("plan", seconds=2)]


def status(folder: Path, shape: Shape) -> list[Figure]:
    """Ask about tasks that all have a job and are not done; stand-ins for sacct and squeue list them all."""
    tasks = make(shape, folder).tasks
    jobs = {task.id: f"{1 + number // 1001}_{number % 1001}" for number, task in enumerate(tasks)}
    make(shape, folder, jobs=jobs, cluster="slurm")
    environment = stand_in_slurm(folder / "bin", list(jobs.values()))
    run = timed(launch("status", folder), environment=environment)
    calls = (folder / "bin" / "calls").read_text(encoding="utf-8").split()
    return [
        Figure("status: tasks", len(tasks), ""),
        *run.figures("status", seconds=2),
        Figure("status: calls of sacct", calls.count("sacct"), "", 1),
        Figure("status: calls of squeue", calls.count("squeue"), "", 1),
    ]


def stand_in_slurm(folder: Path, jobs: Sequence[str]) -> dict[str, str]:
    """Put commands before Slurm's own that say, in its formats, that all jobs wait; returns the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calls").unlink(missing_ok=True)
    arrays = dict.fromkeys(job.split("_")[0] for job in jobs)
    said = {
        "sacct": "".join(f"{array}_[0-1000]|PENDING|0:0|00:00:00|None assigned\n" for array in arrays),
        "squeue": "".join(
            f"{job:64}|{'PENDING':32}|{0:<16}|{'0:00':32}|{'':255}|{'Resources':255}|\n" for job in jobs
        ),
    }
    for name, text in said.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        (folder / name).write_text(STAND_IN.format(name=name, folder=folder), encoding="utf-8")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def submit(folder: Path, shape: Shape) -> list[Figure]:
    """Submit a job a task to the Slurm that is there, ask about them all, cancel them."""
    manifest = make(shape, folder, resources={"finetune": {"tasks_per_job": 1}})
    path = folder / "runs" / "load" / "manifest.json"
    path.unlink()
    (folder / "held.yaml").write_text("device: cpu\nextra: {hold: true}\n", encoding="utf-8")
    try:
        submitted = timed(launch("all", folder, "--cluster", str(folder / "held.yaml")))
        jobs = set(Manifest.read(path).jobs.values())
        arrays = {job.split("_")[0] for job in jobs}
        asked = timed(launch("status", folder))
    finally:
        cancelled = timed(launch("cancel", folder))
    return [
        Figure("submit: tasks", len(manifest.tasks), ""),
        Figure("submit: jobs", len(jobs), ""),
        Figure("submit: arrays", len(arrays), ""),
        *submitted.figures("submit", seconds=30),
        *asked.figures("status of what was submitted", seconds=2),
        *cancelled.figures("cancel", seconds=None),
    ]


def aggregate(folder: Path, shape: Shape) -> list[Figure]:
    """Make every table of a finished experiment."""
    path = folder / "runs" / "load" / "manifest.json"
    complete = folder / f"complete-{shape.finetunings}"
    if not complete.exists():
        make(shape, folder, finished=True)
        complete.touch()
    for file in (folder / "store").rglob("*"):  # else it is chance what the system still has in memory
        if file.is_file():
            file.read_bytes()
    run = timed(["pipeline.stages.aggregate", "--manifest", str(path), "--task", "load"])
    return [
        Figure("aggregate: receipts", shape.finetunings, ""),
        *run.figures("aggregate", seconds=30, megabytes=2000),
    ]


BENCHMARKS = {"plan": (plan, TASKS), "status": (status, TASKS), "submit": (submit, JOBS)}
BENCHMARKS |= {"aggregate": (aggregate, RECEIPTS)}


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks load", description=__doc__.split("\n")[0])
    made.add_argument("what", choices=BENCHMARKS)
    made.add_argument("--dir", type=Path, help="where its files go (default: a temporary folder)")
    made.add_argument("--small", action="store_true", help="a few tasks, nothing written to results.csv")
    given = made.parse_args(arguments)
    if given.what == "submit":
        try:
            ask(["scontrol", "ping"])
        except SlurmError as error:
            print(f"error: {error}; bring up `python -m slurm.testbed up` first", file=sys.stderr)
            return 2
    measure, shape = BENCHMARKS[given.what]
    with tempfile.TemporaryDirectory(prefix="load-") as temporary:
        figures = measure((given.dir or Path(temporary)).absolute(), SMALL if given.small else shape)
    report(figures, append_to=None if given.small else RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
