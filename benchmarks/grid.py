"""What 360 tiny fine-tunings cost in jobs of many, beside a process a task.

    python -m benchmarks grid [--together N] [--small]

The bundled digits, two test nets, three protocols, 10 label fractions, 6 seeds; CPU seconds of all processes
but the launcher's. A process a task is measured on 12 of the tasks, and multiplied.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import children

EXPERIMENT = """
dataset: {source: digits}
backbones: {cnn: {name: test_resnet}, vit: {name: test_vit}}
methods: [supervised]
pretrain: {image_size: 32}
finetune: {epochs: 1, max_steps: 4, batch_size: 16}
"""
TIMES = 5.0
Grid = dict[str, str]
WHOLE: Grid = {
    "finetune.protocols": "[linear, knn, finetune]",
    "finetune.fractions": "[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]",
    "seeds": "[0, 1, 2, 3, 4, 5]",
}
SMALL: Grid = {"finetune.protocols": "[linear, knn]", "finetune.fractions": "[0.5, 1.0]", "seeds": "[0, 1]"}


def launch(folder: Path, verb: str, grid: Grid, *, together: int) -> float:
    """CPU seconds of a launch."""
    file = folder / "grid.yaml"
    file.write_text(EXPERIMENT, encoding="utf-8")
    settings = grid | {"resources.finetune.tasks_per_job": str(together)}
    words = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    places = ["--store", str(folder / "store"), "--runs", str(folder / "runs"), "--cluster", "local"]
    before = children()
    command = [sys.executable, "-m", "pipeline.launch", verb, str(file), *words, *places]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return children() - before


def count(grid: Grid) -> int:
    """Tasks of a grid, for two nets."""
    number = 2
    for values in grid.values():
        number *= values.count(",") + 1
    return number


def measure(scratch: Path, whole: Grid, apart: Grid, *, together: int) -> list[Figure]:
    """CPU seconds of the whole grid packed, and of a process a task."""
    seconds = {}
    for name, grid, packed in (("packed", whole, together), ("apart", apart, 1)):
        folder = scratch / name
        folder.mkdir()
        launch(folder, "pretrain", grid, together=packed)  # sharding and initial weights do not count
        all_of_it = launch(folder, "finetune", grid, together=packed)
        launcher = launch(folder, "finetune", grid, together=packed)  # nothing is left to run
        seconds[name] = (all_of_it - launcher) / count(grid)
    tasks = count(whole)
    return [
        Figure(f"grid: {tasks} fine-tunings in jobs of {together}", seconds["packed"] * tasks, "s"),
        Figure(f"grid: a process each, from {count(apart)} of them", seconds["apart"] * tasks, "s"),
        Figure("grid: times as fast", seconds["apart"] / seconds["packed"], "x", at_least=TIMES),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--together", type=int, default=60, help="tasks a job")
    parser.add_argument("--small", action="store_true", help="16 tasks, to try it")
    given = parser.parse_args()
    apart = WHOLE | {"finetune.fractions": "[0.1, 1.0]", "seeds": "[0]"}
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        whole, some = (SMALL, SMALL | {"seeds": "[0]"}) if given.small else (WHOLE, apart)
        figures = measure(Path(folder), whole, some, together=given.together)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
