"""Figures of benchmarks: printed, and kept in results.csv with date, hardware and commit."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).with_name("results.csv")


@dataclass(frozen=True)
class Figure:
    """One measured number and, where there is one, the greatest or the least that is good."""

    name: str
    value: float
    unit: str
    aim: float | None = None
    at_least: float | None = None

    @property
    def aimed(self) -> str:
        """The aim in words, empty where there is none; one that is missed says so."""
        if self.aim is not None:
            missed, words = self.value > self.aim, f"at most {self.aim:g} {self.unit}"
        elif self.at_least is not None:
            missed, words = self.value < self.at_least, f"at least {self.at_least:g} {self.unit}"
        else:
            return ""
        return words.rstrip() + ": missed" * missed


def report(figures: Sequence[Figure], *, append_to: Path | None = None) -> None:
    """Print what, figure and aim; keep them with date, hardware and commit."""
    width = max((len(figure.name) for figure in figures), default=0)
    for figure in figures:
        shown = f"{figure.value:,.2f}".removesuffix(".00")
        print(f"{figure.name:{width}} {shown:>12} {figure.unit:8} {figure.aimed}".rstrip())
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    if append_to is None:
        return
    new = not append_to.exists()
    with append_to.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["date", "hardware", "commit", "name", "value", "unit"])
        today = datetime.date.today().isoformat()
        where, at = hardware(), commit()
        for figure in figures:
            writer.writerow([today, where, at, figure.name, f"{figure.value:.6g}", figure.unit])


def commit() -> str:
    """Of the project, with ``-dirty`` where files other than the results differ from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    ran = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    other = [*git, "diff", "--quiet", "HEAD", "--", ":/", f":(exclude){RESULTS.name}"]
    return ran.stdout.strip() + "-dirty" * (subprocess.run(other, check=False).returncode == 1)


def hardware() -> str:
    """CPU cores, and the GPUs where there are any."""
    cpus = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return cpus
    gpus = [name.strip() for name in names if name.strip()]
    return ", ".join([f"{gpus.count(name)} {name}" for name in dict.fromkeys(gpus)] + [cpus])
