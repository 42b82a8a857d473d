"""How long the launcher takes to answer, beside a Python that does nothing.

    python -m benchmarks startup [--small]

``--help``, and ``plan`` and ``status`` of an experiment of 144 fine-tunings, each in a process of its own:
the CPU time of that process over that of ``python -c pass``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.load import launch
from benchmarks.pairs import children, in_turn, ratio
from benchmarks.synthetic import Shape, make

SHAPE = Shape(fractions=3, seeds=3)
ROUNDS = 15
MOST = 10.0  # times what a bare Python takes


def measure(folder: Path, rounds: int) -> list[Figure]:
    make(SHAPE, folder)
    commands = {
        "python -c pass": ["-c", "pass"],
        "--help": ["-m", "pipeline.launch", "--help"],
        "plan": ["-m", *launch("plan", folder, "--cluster", "local")],
        "status": ["-m", *launch("status", folder)],
    }
    alternatives = {
        name: partial(subprocess.run, [sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
        for name, words in commands.items()
    }
    seconds = in_turn(alternatives, rounds, clock=children)
    bare = seconds.pop("python -c pass")
    figures = [Figure("startup: python -c pass", statistics.median(bare) * 1e3, "ms")]
    for name, times in seconds.items():
        figures.append(Figure(f"startup: {name}", statistics.median(times) * 1e3, "ms"))
        figures.append(Figure(f"startup: {name} over bare", ratio(times, bare), "x", MOST))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="one round, to try it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        figures = measure(Path(folder), 1 if given.small else ROUNDS)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
