"""Pretrain stage: train images without labels → backbones.

Writes one folder a backbone (``cnn/``, ``vit/``) in timm's local-dir layout, ``log.jsonl`` and
``tensorboard/``. ``torchrun --nproc-per-node=N -m pipeline.stages.pretrain --manifest FILE --task ID`` runs
it on N ranks by hand.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: a mistake or an installation that cannot work is one line
    from pipeline.stages.command import main

    main("pretrain")

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from pipeline.data.images import ImageSet
from pipeline.evaluate.knn import knn_predict
from pipeline.methods.load import load_method
from pipeline.methods.registry import method_info
from pipeline.nets.cost import cost
from pipeline.nets.export import export, said_intensity
from pipeline.specs import PretrainSpec
from pipeline.stages import computes_on_gpu
from pipeline.stages.training import batch_warnings, make_nets, read_images, train, train_images
from pipeline.stages.work import Outcome, Work
from pipeline.train.distributed import World, join, peak_memory
from pipeline.train.health import is_collapsed
from pipeline.train.loop import Trained
from pipeline.train.probe import (
    HEALTH_IMAGES,
    KNN_TRAIN_IMAGES,
    KNN_VAL_IMAGES,
    Labelled,
    Probe,
    evenly,
)
from pipeline.train.step import autocast
from shards import Index

KNN = 20


def run(work: Work) -> Outcome:
    """Pretrain, export the backbones and say how healthy they are.

    Raises:
        UserError: no such backbone, weights or device; a batch that cannot be shared; a loss that is not
        finite. Interrupted: asked to stop; the checkpoint is written, and the same task goes on from it.
    """
    spec = PretrainSpec.model_validate(work.task.spec)
    resources = work.resources
    if resources.device == "auto" and not computes_on_gpu(work.task.stage, work.task.spec):
        resources = resources.model_copy(update={"device": "cpu"})
    with join(work.ranks, resources, on_lost=work.rank_lost) as world:
        index = Index.open(work.inputs["shard"][0].folder)
        spec = _decided(spec, work)
        nets = make_nets(spec)
        images = train_images(index, spec, world, nets)
        method = load_method(spec.method)(
            nets, spec.options, image_size=spec.train.image_size, seed=spec.seed
        )
        # Now, since a net that cannot be counted must not be found at the end of a long training.
        costs = {arch: cost(net) for arch, net in method.exported().items()}
        steps = method_info(spec.method).steps
        probe = _probe(index, images, spec, world)
        probe.begin({arch: net.to(world.device) for arch, net in nets.items()})
        if steps == "none":
            method.to(world.device).eval()
            exported = method.exported()
            trained = Trained(exported, None, 0, 0, 0.0, probe(method, exported))
        else:
            trained = train(method, images, work=work, spec=spec, world=world, steps=steps, probe=probe)
        peak = peak_memory(world)
        if world.is_first:
            _export(trained, work.folder, spec, said_intensity(index))
        return Outcome(
            metrics=_metrics(trained, learns=steps == "train")
            | {"backbones": costs, "warnings": [] if steps == "none" else batch_warnings(images, spec)},
            images_seen=trained.images_seen,
            device=world.device.type,
            device_seconds=trained.seconds * world.world_size,
            peak_memory_bytes=peak,
            discard=("checkpoints",),
        )


def _decided(spec: PretrainSpec, work: Work) -> PretrainSpec:
    """The specification with what a search has found in place of ``search``."""
    found = {
        done.receipt.metrics["decides"]: done.receipt.metrics["winner"]
        for done in work.inputs.get("search", ())
    }
    return spec.model_copy(update={"options": spec.options | found})


def _probe(index: Index, images: ImageSet, spec: PretrainSpec, world: World) -> Probe:
    """What rank 0 looks at: the same images for every method of an experiment."""
    probe = Probe(
        images=images,
        positions=evenly(len(images), HEALTH_IMAGES),
        autocast=autocast(spec.train, world),
        score=lambda *tables: _knn_score(index, *tables),
    )
    labelled, val = index.rows("train", labelled=True), index.rows("val", labelled=True)
    if len(labelled) and len(val) and world.is_first:
        chosen = labelled[evenly(len(labelled), KNN_TRAIN_IMAGES)]
        probe.train = Labelled(images, np.searchsorted(images.rows, chosen), index.targets(chosen))
        asked = val[evenly(len(val), KNN_VAL_IMAGES)]
        probe.val = Labelled(
            read_images(index, asked, spec, world, fill=images.fill),
            np.arange(len(asked)),
            index.targets(asked),
        )
    return probe


def _knn_score(
    index: Index, features: Tensor, targets: np.ndarray, asked: Tensor, truth: np.ndarray
) -> float:
    """k-NN on validation images: accuracy; multi-label: mean average precision of the classes that occur."""
    known = torch.from_numpy(targets).to(features.device)
    predicted = knn_predict(features, known, asked, k=KNN, num_classes=len(index.classes)).cpu().numpy()
    if index.task == "multiclass":
        return float((predicted.argmax(1) == truth).mean())
    occurring = truth.any(axis=0)
    if not occurring.any():
        return 0.0
    return float(average_precision_score(truth[:, occurring], predicted[:, occurring], average="macro"))


def _export(trained: Trained, folder: Path, spec: PretrainSpec, intensity: dict[str, Any]) -> None:
    said = {
        **intensity,
        "dataset": spec.dataset,
        "method": spec.method,
        "options": spec.options,
        "epochs": spec.train.epochs if trained.steps else 0,
        "steps": trained.steps,
        **({"batch_size": spec.train.batch_size} if trained.steps else {}),
        "image_size": spec.train.image_size,
        "seed": spec.seed,
    }
    for arch, net in trained.nets.items():
        export(
            net,
            folder / arch,
            fit=spec.train.fit,
            trained=said | {"initial_weights": spec.backbones[net.arch].weights},
        )


def _metrics(trained: Trained, *, learns: bool) -> dict[str, Any]:
    """Of rank 0; the other ranks have not probed."""
    health = trained.probe.get("health", {})
    return {
        "loss": trained.loss,
        "collapsed": {arch: learns and is_collapsed(numbers) for arch, numbers in health.items()},
        "health": health,
        "knn": trained.probe.get("knn", {}),
        "steps": trained.steps,
        "images_per_second": round(trained.images_seen / trained.seconds, 3) if trained.seconds else None,
    }
