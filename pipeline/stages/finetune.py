"""Fine-tune stage: one pretrained backbone, one draw of labels, one protocol → predictions and their metrics.

Writes ``predictions.npz`` (of the test split, what intervals are made of, and its rows of samples.csv),
``log.jsonl`` and the model itself, ``model/``.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: a mistake or an installation that cannot work is one line
    from pipeline.stages.command import main

    main("finetune")

import hashlib
import io
import json
import shutil
import time
from typing import Any

import numpy as np
import torch

from pipeline.data.fractions import group_subset, no_groups, subset, units_of
from pipeline.errors import UserError, nearest
from pipeline.evaluate.problem import Prediction, Problem, Protocol, Split
from pipeline.evaluate.protocols import PROTOCOLS, check_metric
from pipeline.evaluate.select import existing
from pipeline.files import write_atomically
from pipeline.manifest import describe_files
from pipeline.nets.export import Classifier, said_intensity
from pipeline.specs import FinetuneSpec
from pipeline.stages.work import MODEL, Interrupted, Outcome, Work
from pipeline.targets import load_target
from pipeline.train.cpu import set_up_cpu
from pipeline.train.distributed import World, choose_device, peak_memory
from shards import Index


def run(work: Work) -> Outcome:
    """Learn from the drawn labels, predict the test split once, and write both down.

    Raises:
        UserError: unknown protocol or metric, one class only, a split without labels, or a GPU asked for
        where there is none.
        Interrupted: asked to stop; the task is short and starts again from its beginning.
    """
    spec = FinetuneSpec.model_validate(work.task.spec)
    set_up_cpu(work.resources.cpus_per_rank)
    problem = make_problem(work, spec)
    device = problem.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    prediction = _protocol(spec.protocol)(problem)
    seconds = time.perf_counter() - started

    arrays = prediction.arrays | {"rows": problem.test.rows.astype(np.int64)}
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(work.folder / "predictions.npz", content.getbuffer(), sync=False)
    log = "".join(json.dumps(line) + "\n" for line in prediction.log)
    write_atomically(work.folder / "log.jsonl", log.encode(), sync=False)
    model = _save(work, spec, problem, prediction)
    metrics: dict[str, Any] = {
        "num_labels": len(problem.train),
        "num_groups": _number_of_groups(problem),
        "fraction_drawn": len(problem.train) / len(problem.index.rows("train", labelled=True)),
        "num_val": len(problem.val),
        "num_test": len(problem.test),
        "best_epoch": prediction.best_epoch,
        **prediction.chosen,
        "val": existing(prediction.val),
        "test": existing(prediction.test),
        **({"model": model} if model else {}),
    }
    return Outcome(
        metrics=metrics,
        images_seen=prediction.images_seen,
        device=device.type,
        device_seconds=seconds,
        peak_memory_bytes=peak_memory(World(device=device)),
        spare=(MODEL,),
    )


def _save(work: Work, spec: FinetuneSpec, problem: Problem, prediction: Prediction) -> dict[str, Any]:
    """Write the model, unless none is kept; returns SHA-256 and bytes of each of its files.

    The receipt holds these among its metrics, not among its files: the task stays done when aggregation
    removes a model that is not the best of its seeds.
    """
    folder = work.folder / MODEL
    shutil.rmtree(folder, ignore_errors=True)
    if prediction.save is None or spec.settings.keep == "none":
        return {}
    classifier = Classifier(problem.index.classes, problem.multilabel, prediction.thresholds)
    trained = {name: getattr(spec, name) for name in ("dataset", "protocol", "fraction", "seed")}
    trained |= said_intensity(problem.index) | {
        "method": spec.label,
        "num_labels": len(problem.train),
        "val": existing(prediction.val),
    }
    prediction.save(folder, classifier, trained)
    return describe_files(folder)


def make_problem(work: Work, spec: FinetuneSpec) -> Problem:
    """What a specification asks to be learned, of the shards and the backbone in ``work.inputs``.

    Raises:
        UserError: one class only, a metric that does not exist, a split without labels, or a GPU asked for
        where there is none.
    """
    device = choose_device(work.resources.device, local_rank=work.ranks.local_rank)
    index = Index.open(work.inputs["shard"][0].folder)
    if index.task in ("multiclass", "multilabel") and len(index.classes) < 2:
        raise UserError(
            f"{spec.dataset} has only one class, '{index.classes[0]}'; fine-tuning needs at least two"
        )
    check_metric(spec.settings.select_by, task=index.task, key="select_by")
    by_group = spec.settings.fractions_by == "group" and spec.fraction < 1
    if by_group and not _groups(index)[index.rows("train", labelled=True)].any():
        raise UserError(no_groups(spec.dataset))
    train = _split(index, "train", spec.fraction, spec.seed, by_group)
    of_val = spec.fraction if spec.settings.validation == "fraction" else 1.0
    val = _split(index, "val", of_val, spec.seed, by_group)
    test = _split(index, "test", 1.0, spec.seed)
    for name, split in (("train", train), ("val", val), ("test", test)):
        if not len(split):
            raise UserError(f"{spec.dataset}: no labelled image in the {name} split, which fine-tuning needs")

    def tick(done: float, total: float, text: str) -> None:
        if work.stop_requested():
            raise Interrupted
        work.progress(done, total, text)

    return Problem(
        backbone=work.inputs["pretrain"][0].folder / spec.arch,
        index=index,
        train=train,
        val=val,
        test=test,
        settings=spec.settings,
        seed=task_seed(spec),
        device=device,
        tick=tick,
    )


def task_seed(spec: FinetuneSpec) -> int:
    """A seed of 48 bits from the seed and what is learned, but not from the method.

    Methods that are compared on one seed so share the new classifier's draw, the order and the augmentation,
    which makes their difference less noisy.
    """
    identity = json.dumps([spec.seed, spec.dataset, spec.arch, spec.protocol, spec.fraction])
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6], "big")


def _split(index: Index, name: str, fraction: float, seed: int, by_group: bool = False) -> Split:
    rows = np.sort(index.rows(name, labelled=True))
    targets = index.targets(rows)
    if by_group:
        chosen = group_subset(targets, _groups(index)[rows], fraction, seed=seed)
    else:
        chosen = subset(targets, fraction, seed=seed)
    return Split(rows[chosen], torch.from_numpy(np.ascontiguousarray(targets[chosen])))


def _groups(index: Index) -> np.ndarray:
    """The group of every sample, object (N,); "" where it has none."""
    return index.samples["group"].fillna("").to_numpy(object)


def _number_of_groups(problem: Problem) -> int | None:
    """How many groups (patients) the drawn labels are of; None in a data set without groups."""
    groups = _groups(problem.index)
    return len(np.unique(units_of(groups[problem.train.rows]))) if groups.any() else None


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise UserError(f"no protocol {name!r}{nearest(name, PROTOCOLS)} (expected one of {known})")
    return load_target(PROTOCOLS[name].target)
