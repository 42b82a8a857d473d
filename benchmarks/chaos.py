"""Hundreds of small tasks on a Slurm while jobs are killed at random, against the same with nothing killed.

    python -m benchmarks chaos [--kills 20] [--seed 0] [--dir FOLDER] [--set KEY=VALUE]

The experiment is ``chaos.yaml``: 300 fine-tunings. It first runs on this machine, undisturbed. Then it runs
on the Slurm that SLURM_CONF names (``python -m slurm.testbed up`` brings one up), while fine-tunings are
picked from a seeded order and hit a random moment after they began: killed, asked to stop, put back into the
queue or cancelled. The same command is given again until everything is done. Every result, the tables among
them, must have the same bytes on both sides. Figures are printed and appended to ``benchmarks/results.csv``.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import RESULTS, Figure, report
from pipeline.errors import UserError
from pipeline.manifest import Manifest, Task
from slurm import SlurmError
from slurm.commands import ask

EXPERIMENT = Path(__file__).with_name("chaos.yaml")
TABLES = ("results.csv", "gains.csv")
LATEST = 1.0  # seconds after a task's beginning at which it is hit
MEANS = {
    "killed": ["scancel", "--signal=KILL"],
    "asked to stop": ["scancel", "--signal=TERM"],
    "requeued": ["scontrol", "requeue"],
    "cancelled": ["scancel"],
}


class Side:
    """The experiment in folders of its own."""

    def __init__(self, folder: Path, cluster: str, settings: Sequence[str]) -> None:
        self.folder, self.cluster, self.settings = folder, cluster, settings
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.folder / "runs" / "chaos" / "manifest.json")

    def launch(self) -> int:
        """Give the command, wait for its end; what it prints goes to ``launch.log``."""
        places = ["--store", str(self.folder / "store"), "--runs", str(self.folder / "runs")]
        sets = [word for setting in self.settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "pipeline.launch", "all", str(EXPERIMENT), "--wait"]
        with (self.folder / "launch.log").open("a", encoding="utf-8") as log:
            where = [*places, *sets, "--cluster", self.cluster]
            return subprocess.run([*command, *where], stdout=log, stderr=log, check=False).returncode

    def results(self) -> dict[str, str | bytes]:
        """SHA-256 of every file that a fine-tuning left, and the tables; a lost task is not among them."""
        manifest, found = self.manifest, dict[str, str | bytes]()
        for task in manifest.tasks:
            receipt = manifest.receipt(task) if task.stage == "finetune" else None
            if receipt is not None:
                found |= {f"{task.id}: {name}": said["sha256"] for name, said in receipt.files.items()}
        tables = self.folder / "runs" / "chaos" / "tables"
        return found | {name: (tables / name).read_bytes() for name in TABLES}


class Killer(threading.Thread):
    """Hits running fine-tunings until it has hit as many as it should.

    Args:
        side: what to disturb.
        kills: how many.
        seed: of whom, when and how.
    """

    def __init__(self, side: Side, *, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.side, self.kills, self.random = side, kills, random.Random(seed)
        self.means = self.random.sample(list(MEANS) * (1 + kills // len(MEANS)), kills)
        self.hit: dict[str, str] = {}  # task → how
        self.ended = threading.Event()

    def run(self) -> None:
        while not (self.side.folder / "runs" / "chaos" / "manifest.json").exists():
            time.sleep(0.1)
        order = [task for task in self.side.manifest.tasks if task.stage == "finetune"]
        self.random.shuffle(order)
        missed: set[str] = set()  # ended before they could be hit: the next of the order steps in
        while len(self.hit) < self.kills and not self.ended.wait(0.05):
            manifest = self.side.manifest
            for task in order[: self.kills + len(missed)]:
                passed = task.id in missed or task.id in self.hit or not manifest.folder(task).exists()
                if not passed and not self._strike(manifest, task):
                    missed.add(task.id)

    def _strike(self, manifest: Manifest, task: Task) -> bool:
        how = self.means[len(self.hit)]
        time.sleep(self.random.uniform(0, LATEST))
        if manifest.receipt(task) is not None:
            return False
        try:
            ask([*MEANS[how], manifest.jobs[task.id]])
        except SlurmError:  # its job has just ended
            return False
        self.hit[task.id] = how
        return True


def chaos(folder: Path, *, kills: int, seed: int, settings: Sequence[str]) -> tuple[list[Figure], list[str]]:
    """Run both sides; returns the figures, and what differs (empty if all is well)."""
    calm = Side(folder / "undisturbed", "local", settings)
    if calm.launch():
        raise UserError(f"the undisturbed run failed; see {calm.folder / 'launch.log'}")
    profile = folder / "cluster.yaml"
    profile.write_text(f"device: cpu\npython: {sys.executable}\n", encoding="utf-8")
    wild = Side(folder / "disturbed", str(profile), settings)
    killer = Killer(wild, kills=kills, seed=seed)
    began, launches = time.monotonic(), 1
    killer.start()
    while wild.launch() and launches < 2 + kills:
        launches += 1
    seconds = time.monotonic() - began
    killer.ended.set()
    killer.join()
    manifest = wild.manifest
    finetunings = [task for task in manifest.tasks if task.stage == "finetune"]
    lost = sum(manifest.receipt(task) is None for task in finetunings)
    expected, found = calm.results(), wild.results()
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    means = Counter(killer.hit.values())
    figures = [
        Figure("chaos: fine-tunings", len(finetunings), ""),
        Figure("chaos: jobs", len({manifest.jobs[task.id] for task in finetunings}), ""),
        *(Figure(f"chaos: {how}", means[how], "") for how in MEANS),
        Figure("chaos: launches until all was done", launches, ""),
        Figure("chaos: time", seconds, "s"),
        Figure("chaos: tasks lost", lost, "", 0),
        Figure("chaos: results that differ", len(differ), "", 0),
    ]
    return figures, differ


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks chaos", description=__doc__.split("\n")[0])
    made.add_argument("--kills", type=int, default=20, help="how many fine-tunings are hit (default: 20)")
    made.add_argument("--seed", type=int, default=0, help="of whom, when and how (default: 0)")
    made.add_argument("--dir", type=Path, help="where its files go (default: a new one in /tmp)")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as the launcher takes it"
    )
    given = made.parse_args(arguments)
    try:
        ask(["scontrol", "ping"])
    except SlurmError as error:
        print(f"error: {error}; bring up `python -m slurm.testbed up` first", file=sys.stderr)
        return 2
    folder = (given.dir or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    try:
        figures, differ = chaos(folder, kills=given.kills, seed=given.seed, settings=given.set)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(figures, append_to=None if given.set else RESULTS)
    for name in differ:
        print(f"differs: {name}")
    hit = sum(figure.value for figure in figures if figure.name.removeprefix("chaos: ") in MEANS)
    if hit < given.kills:
        print(f"only {hit:.0f} of {given.kills} fine-tunings could be hit")
    return int(bool(differ) or hit < given.kills)


if __name__ == "__main__":
    sys.exit(main())
