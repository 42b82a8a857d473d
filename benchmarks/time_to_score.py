"""The time that CASS needs to reach the linear-probe scores of DINO, on both nets.

    python -m benchmarks time_to_score [EXPERIMENT] [--set KEY=VALUE] [--methods NAME,NAME] [--small]

The pretrainings of an experiment (``pbc``), as it gives them, looked at ``--looks`` times on the way: a
linear probe on 1,000 labelled images, its weight decay chosen on 1,000 validation images, scored on 2,000
test images. The scores to reach are DINO's at its end. DINO's time is what its two trainings take until each
first reaches them, a joint method's until one look finds both of its nets there. Looks and start-up do not
count; on a CPU it is this process's CPU time on one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import shards
from benchmarks.figures import RESULTS, Figure, report
from benchmarks.probes import Features, linear_ours
from pipeline.data.feed import IndexedFeed
from pipeline.data.images import ImageSet
from pipeline.data.sampler import EpochSampler
from pipeline.data.squares import Fill
from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.methods.base import Method
from pipeline.methods.load import load_method
from pipeline.nets.backbone import Net
from pipeline.plan import plan
from pipeline.specs import PretrainSpec
from pipeline.stages.shard import options_of, source_of
from pipeline.stages.training import make_nets, read_images, train_images
from pipeline.train.cpu import set_up_cpu
from pipeline.train.distributed import World, choose_device
from pipeline.train.loop import Loop
from pipeline.train.probe import evenly, plain

AGAINST = "dino"
SHARE = 0.31  # of DINO's time: the paper's 69 % less
MOST = {"train": 1000, "val": 1000, "test": 2000}
SMALL = [
    "dataset={source: digits}",
    "backbones={cnn: {name: test_resnet}, vit: {name: test_vit}}",
    "pretrain.image_size=32",
    "pretrain.epochs=0.3",
    "pretrain.warmup_epochs=0",
    "methods={dino: {options: {out_dim: 64, hidden: 32, bottleneck: 16, n_local: 0}}, cass_plus: {}}",
    "seeds=[0]",
    "report.baseline=dino",
]


@dataclass
class Course:
    """One training's seconds, and each net's score, at every look."""

    seconds: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def until(self, wanted: dict[str, float]) -> float:
        """Seconds to the first look, after that at the start, at which each net has the score that is wanted
        of it; infinite if there is none."""
        for number, seconds in enumerate(self.seconds):
            if number and all(scores[number] >= wanted[arch] for arch, scores in self.scores.items()):
                return seconds
        return math.inf


class Looks:
    """A probe that remembers what it found and takes its own time out of the clock."""

    def __init__(self, index: shards.Index, spec: PretrainSpec, device: torch.device, *, fill: Fill) -> None:
        self.device, self.course = device, Course()
        self.clock = time.perf_counter if device.type == "cuda" else time.process_time
        self.num_classes = len(index.classes)
        self.images: dict[str, ImageSet] = {}
        self.targets: dict[str, np.ndarray] = {}
        for split, most in MOST.items():
            rows = index.rows(split, labelled=True)
            rows = rows[evenly(len(rows), most)]
            self.images[split] = read_images(index, rows, spec, World(), fill=fill)
            self.targets[split] = index.targets(rows)
        self.began = 0.0  # set when the training begins

    def __call__(self, method: Method, nets: dict[str, Net]) -> dict[str, dict[str, float]]:
        at = self.clock()
        self.course.seconds.append(at - self.began)
        found = {arch: self.score(net) for arch, net in nets.items()}
        for arch, score in found.items():
            self.course.scores.setdefault(arch, []).append(score)
        self.began += self.clock() - at
        return {"linear": found}

    def score(self, net: Net) -> float:
        """Accuracy on the test images."""
        parts = {}
        for split, images in self.images.items():
            batches = plain(images, np.arange(len(images)))
            with torch.no_grad():
                features = torch.cat([net.features(batch.to(self.device)).float() for batch in batches])
            parts[split] = features.cpu().numpy(), self.targets[split]
        return linear_ours(Features(parts), num_classes=self.num_classes)


def follow(spec: PretrainSpec, index: shards.Index, folder: Path, *, looks: int) -> Course:
    """One pretraining as the experiment gives it, on one thread or a GPU."""
    world = World(device=choose_device("auto", local_rank=0))
    nets = make_nets(spec)
    images = train_images(index, spec, world, nets)
    training = spec.train.model_copy(update={"probe_epochs": spec.train.epochs / looks})
    method = load_method(spec.method)(nets, spec.options, image_size=training.image_size, seed=spec.seed)
    probe = Looks(index, spec, world.device, fill=images.fill)
    folder.mkdir(parents=True)
    sampler = EpochSampler(len(images), batch_size=training.batch_size, seed=spec.seed)
    loop = Loop(
        method,
        IndexedFeed(images, sampler),
        training=training,
        world=world,
        folder=folder,
        seed=spec.seed,
        data=index.fingerprint,
        probe=probe,
    )
    probe.began = probe.clock()
    loop.run()
    return probe.course


def measure(
    experiment: str, settings: list[str], methods: list[str], scratch: Path, *, looks: int
) -> list[Figure]:
    """DINO's scores, and each method's share of DINO's time to them, by seed and in the middle."""
    given = load_experiment(experiment, settings)
    if missing := {AGAINST, *methods} - set(given.methods):
        raise UserError(f"{experiment} has no {', '.join(sorted(missing))}")
    (dataset,) = given.all_datasets
    index = shards.write(source_of(dataset), scratch / "shards", options_of(dataset))
    courses: dict[tuple[str, int], list[Course]] = {}
    for task in plan(given):
        if task.stage == "pretrain" and task.spec["label"] in (AGAINST, *methods):
            spec = PretrainSpec.model_validate(task.spec)
            course = follow(spec, index, scratch / task.id, looks=looks)
            courses.setdefault((spec.label, spec.seed), []).append(course)
            shown = {arch: [f"{score:.3f}" for score in scores] for arch, scores in course.scores.items()}
            print(f"{task.id}: {course.seconds[-1]:.0f} s, {shown}", flush=True)
    figures: list[Figure] = []
    shares: dict[str, list[float]] = {method: [] for method in methods}
    title = f"time to score, {given.name}"
    for seed in sorted({seed for _, seed in courses}):
        wanted = {arch: s[-1] for course in courses[AGAINST, seed] for arch, s in course.scores.items()}
        took = sum(course.until(wanted) for course in courses[AGAINST, seed])
        figures += [Figure(f"{title}: {AGAINST}, seed {seed}, {a}", 100 * s, "%") for a, s in wanted.items()]
        figures.append(Figure(f"{title}: {AGAINST}, seed {seed}", took, "s"))
        for method in methods:
            share = sum(course.until(wanted) for course in courses[method, seed]) / took
            shares[method].append(share)
            figures.append(Figure(f"{title}: {method} over {AGAINST}, seed {seed}", share, "x"))
    return figures + [
        Figure(f"{title}: {method} over {AGAINST}, middle of the seeds", statistics.median(each), "x", SHARE)
        for method, each in shares.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiment", nargs="?", default="pbc", help="a ready experiment or a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for the launcher")
    parser.add_argument("--methods", default="cass_plus,cass", help="joint methods of the experiment")
    parser.add_argument("--looks", type=int, default=12, help="at each training, evenly spaced")
    parser.add_argument("--small", action="store_true", help="test nets on bundled digits, to try it")
    given = parser.parse_args()
    set_up_cpu(1)
    methods = ["cass_plus"] if given.small else given.methods.split(",")
    with tempfile.TemporaryDirectory(prefix="time-to-score-") as folder:
        figures = measure(
            given.experiment,
            SMALL if given.small else given.set,
            methods,
            Path(folder),
            looks=2 if given.small else given.looks,
        )
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
