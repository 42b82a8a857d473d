"""A pretraining on two nodes that is long enough to break in its middle (``slow.yaml``)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import slurm
from pipeline.manifest import Manifest
from slurm.states import FINAL

EXPERIMENT = Path(__file__).parent / "slow.yaml"
TASK = "pretrain/slow-cass_vc-cnn-vit-s0"
INTERVAL = 10  # steps between checkpoints, as in slow.yaml
RESULTS = ("cnn/model.safetensors", "vit/model.safetensors", "log.jsonl")


def until(what: Callable[[], object], said: str, seconds: float = 60) -> None:
    """Poll until something is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {said}"
        time.sleep(0.1)


def holds_signals(pid: int) -> bool:
    """Whether a rank's Python has come so far that a signal waits for its handler."""
    return _in_mask(pid, "SigBlk", signal.SIGTERM)


def _in_mask(pid: int, mask: str, number: signal.Signals) -> bool:
    """Whether a signal is in one of a process's masks, as proc(5) names them."""
    said = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(rf"^{mask}:\s*(\w+)", said, re.M)[1], 16) & 1 << number - 1)


@dataclass(frozen=True)
class Pause:
    """Between the last step that was logged before something broke, and going on.

    Attributes:
        seconds: of wall-clock time, with all that Slurm waits and all that a test does in between.
        repeated: steps done a second time, to within the two steps from one line of the log to the next.
    """

    seconds: float
    repeated: int


class Slow:
    """The experiment in folders of its own.

    Args:
        folder: gets ``store/``, ``runs/`` and the profile.
        settings: for every command, as ``--set`` takes them.
    """

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder, self.settings = folder, settings
        self.experiment = EXPERIMENT
        self.pauses: list[Pause] = []
        self.profile = folder / "cluster.yaml"
        self.write_profile()

    def write_profile(self, **keys: object) -> None:
        lines = {"device": "cpu", "python": sys.executable, **keys}
        self.profile.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))

    def command(self, verb: str, *arguments: str, cluster: str | None = None) -> list[str]:
        places = ["--store", str(self.folder / "store"), "--runs", str(self.folder / "runs")]
        sets = [word for setting in self.settings for word in ("--set", setting)]
        where = [] if verb in ("status", "cancel", "verify") else ["--cluster", cluster or str(self.profile)]
        name = "slow" if verb in ("status", "cancel", "verify") else str(self.experiment)
        return [sys.executable, "-m", "pipeline.launch", verb, name, *places, *sets, *where, *arguments]

    def launch(
        self, verb: str, *arguments: str, check: int | None = 0, cluster: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(verb, *arguments, cluster=cluster)
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, timeout=560)
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.folder / "runs" / "slow" / "manifest.json")

    @property
    def pretraining(self) -> Path:
        """The folder of its result."""
        return self.manifest.folder(self.manifest.task(TASK))

    @property
    def job(self) -> str:
        return self.manifest.jobs[TASK]

    def state(self) -> str:
        return slurm.job_states([self.job])[self.job].state

    def step(self) -> int:
        """How many steps the running pretraining says that it has done."""
        try:
            return int(json.loads((self.pretraining / "progress.json").read_text())["done"])
        except (OSError, ValueError):
            return 0

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        until(lambda: self.step() >= step, f"step {step} (at {self.step()})", seconds)

    def wait_for_end(self, seconds: float = 240) -> str:
        """Until its job has ended for good, and is not merely about to be queued again."""
        until(
            lambda: self.state() in FINAL and time.sleep(2) is None and self.state() in FINAL,
            "the end",
            seconds,
        )
        return self.state()

    def ranks(self) -> dict[int, tuple[int, str]]:
        """Rank → process id and node, of the processes that run the pretraining now."""
        found = {}
        base, _, index = self.job.partition("_")
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                entries = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            said = dict(entry.decode().partition("=")[::2] for entry in entries if b"=" in entry)
            if b"submitit.core._submit" not in command or "SLURM_PROCID" not in said or b"srun" in command[0]:
                continue
            if index:
                mine = (said.get("SLURM_ARRAY_JOB_ID"), said.get("SLURM_ARRAY_TASK_ID")) == (base, index)
            else:
                mine = said.get("SLURM_JOB_ID") == base
            if mine:
                found[int(said["SLURM_PROCID"])] = (int(folder.name), said.get("SLURMD_NODENAME", ""))
        return found

    def kill_rank(self, rank: int) -> None:
        os.kill(self.ranks()[rank][0], signal.SIGKILL)

    def hold_until_signalled(self, number: signal.Signals, seconds: float = 90) -> None:
        """Stand the ranks still until Slurm has sent each this signal: on a fast machine, too."""

        def pending(pid: int) -> bool:
            try:
                return _in_mask(pid, "ShdPnd", number)
            except OSError:  # it came before, and the rank has ended
                return True

        held = [pid for pid, _ in self.ranks().values()]
        try:
            for pid in held:
                os.kill(pid, signal.SIGSTOP)
            until(lambda: all(map(pending, held)), f"a {number.name}", seconds)
        finally:
            for pid in held:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def resumed_at(self) -> list[int]:
        """The steps after which its starts went on, in order; the first start is not among them."""
        logs = sorted((self.folder / "runs" / "slow" / "logs").glob("*_0_log.err"), key=os.path.getmtime)
        return [int(n) for log in logs for n in re.findall(r"going on after step (\d+)", log.read_text())]

    def watch(self, ended: threading.Event) -> None:
        """Note every pause of the pretraining down, until ``ended`` is set; for a thread."""
        size, logged, grown = 0, -1, time.monotonic()
        while not ended.wait(0.2):
            went_on = self.resumed_at()
            if len(went_on) > len(self.pauses):
                self.pauses.append(Pause(time.monotonic() - grown, max(0, logged + 1 - went_on[-1])))
                logged = -1
            for log in self.folder.glob("store/pretrain/*/log.jsonl"):
                text = log.read_text()
                if len(text) > size:
                    grown = time.monotonic()
                    logged = max(
                        [logged, *(int(step) for step in re.findall(r'"kind": "step", "step": (\d+)', text))]
                    )
                size = len(text)

    def bits(self) -> dict[str, str]:
        """SHA-256 of the weights and the log."""
        receipt = self.manifest.receipt(self.manifest.task(TASK))
        assert receipt is not None, f"no receipt in {self.pretraining}"
        return {name: receipt.files[name]["sha256"] for name in RESULTS}
