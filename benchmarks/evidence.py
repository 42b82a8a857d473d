"""One experiment run to its tables, in as many sittings as it takes, and written down with what it cost.

    python -m benchmarks evidence EXPERIMENT --out FILE.md [--minutes 9] [--set KEY=VALUE]

Runs ``python -m pipeline.launch all EXPERIMENT --cluster local`` and nothing else. After ``--minutes`` it is
stopped, as by a batch system: trainings leave a checkpoint, and the same command goes on from there. Once
everything is done, FILE.md has the command, the commit, the hardware and the time of all sittings together,
and then the tables of the experiment's report. The exit code is 0 only when the tables are there.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import commit, hardware
from pipeline.experiment_file import load_experiment

GRACE_S = 60.0  # for checkpoints after an interruption
PLOT = re.compile(r"^!\[.*\n\n?", re.MULTILINE)  # they lie beside the report
UNFINISHED = 75  # the exit code that asks for the command to be given again (EX_TEMPFAIL)


def run(command: list[str], *, seconds: float | None) -> int:
    """The command's exit code; ``UNFINISHED`` where its time was up, and it has been stopped."""
    process = subprocess.Popen(command)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return UNFINISHED


def sittings(path: Path) -> list[dict[str, Any]]:
    """Seconds and commit of each sitting so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def main(arguments: list[str] | None = None) -> int:
    """Run a sitting; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run an experiment to its tables, in several sittings.")
    parser.add_argument("experiment", help="name of a ready experiment, or a file")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file for the result")
    parser.add_argument("--minutes", type=float, help="of this sitting; default: until it is done")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for the launcher")
    parser.add_argument("--store", type=Path, default=Path("store"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args(arguments)
    said = ["python", "-m", "pipeline.launch", "all", given.experiment]
    said += [part for setting in given.set for part in ("--set", setting)]
    folder = given.runs / load_experiment(given.experiment, given.set).name
    places = ["--store", str(given.store), "--runs", str(given.runs)]
    began, at = time.monotonic(), commit()
    code = run(
        [sys.executable, *said[1:], "--cluster", "local", *places],
        seconds=None if given.minutes is None else 60 * given.minutes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "sittings.json"
    sat = [*sittings(record), {"seconds": round(time.monotonic() - began, 1), "commit": at}]
    record.write_text(json.dumps(sat), encoding="utf-8")
    seconds = sum(one["seconds"] for one in sat)
    if code:
        print(f"not done after {len(sat)} sittings, {seconds:.0f} s: give the same command again")
        return code
    report = (folder / "tables" / "report.md").read_text(encoding="utf-8")
    title, tables = report.split("\n", 1)
    head = [
        title,
        "",
        f"    {' '.join(said)}",
        "",
        f"Commit {', '.join(dict.fromkeys(one['commit'] for one in sat))}, {hardware()};"
        f" {seconds / 60:.0f} minutes in {len(sat)} sittings.",
    ]
    given.out.write_text("\n".join(head) + "\n" + PLOT.sub("", tables), encoding="utf-8")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
