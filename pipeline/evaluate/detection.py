"""Detection: Faster R-CNN or Mask R-CNN on the backbone, all of it trained, the epoch picked by validation.

Batch normalisation of a CNN stays as in the ``finetune`` protocol: it learns, and takes its statistics from
the batch. Detectors often freeze it, as their batches of two large images are too small and their backbones
come with statistics of millions of images. Here batches are of many small images, and a backbone with random
weights (the ``supervised`` baseline) has no statistics worth freezing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import Augment
from pipeline.evaluate.detection_metrics import AveragePrecision
from pipeline.evaluate.images import images_of, plain_batches
from pipeline.evaluate.objects import Objects
from pipeline.evaluate.problem import Prediction, Problem, Split, reproducible
from pipeline.evaluate.select import picked
from pipeline.evaluate.training import train
from pipeline.nets.detector import Detector
from pipeline.nets.export import load_exported

EVAL_BATCH_SIZE = 16
WARMUP = 0.05  # share of the steps: proposals are noise at first, and the heads learn from them
CLIP_GRAD = 10.0  # a safeguard: a batch with one odd box must not end the training


def run(problem: Problem) -> Prediction:
    """The ``detect`` protocol."""
    return _reproducibly(problem, masks=False)


def run_masks(problem: Problem) -> Prediction:
    """The ``detect_masks`` protocol. Raises UserError where an object has no outline."""
    return _reproducibly(problem, masks=True)


def _reproducibly(problem: Problem, *, masks: bool) -> Prediction:
    with reproducible(problem.seed, problem.device):
        if problem.device.type == "cuda":
            # A deterministic RoIAlign wants a compiler and gigabytes; `reproducible` puts this back.
            torch.use_deterministic_algorithms(False)
        return _run(problem, masks=masks)


def _run(problem: Problem, *, masks: bool) -> Prediction:
    settings, device = problem.settings, problem.device
    net = load_exported(problem.backbone, num_classes=0, image_size=settings.image_size)
    size = net.image_size
    objects = {
        name: Objects(problem, split, image_size=size, masks=masks)
        for name, split in (("train", problem.train), ("val", problem.val), ("test", problem.test))
    }
    detector = Detector(net, num_classes=problem.num_classes, width=settings.head_width, masks=masks)
    detector = detector.to(device).to(memory_format=torch.channels_last)
    augment = Augment(settings.augment, size)

    def loss(batch: Tensor, keys: Tensor, chosen: np.ndarray) -> Tensor:
        views, maps = augment.with_maps(batch, keys)
        targets = objects["train"].targets(chosen, maps, device)
        return torch.stack(list(detector.losses(features(problem, detector, views), targets).values())).sum()

    def validate() -> tuple[dict[str, float], dict[str, float], float]:
        metrics = judged(problem, detector, problem.val, objects["val"]).metrics()
        return metrics, *picked(problem, metrics, lacking="objects that are no crowds")

    images, where = images_of(problem, problem.train, image_size=size)
    trained = train(
        problem,
        detector,
        images=images,
        where=where,
        loss_of=loss,
        validate=validate,
        warmup=WARMUP,
        clip_grad=CLIP_GRAD,
    )
    test = judged(problem, detector, problem.test, objects["test"], matches=True)
    return Prediction(
        val=trained.best_val,
        test=test.metrics(),
        arrays=test.arrays(),
        best_epoch=trained.best_epoch,
        chosen={"steps_capped": trained.capped},
        log=trained.log,
        images_seen=trained.images_seen,
    )


def features(problem: Problem, detector: Detector, images: Tensor) -> OrderedDict[str, Tensor]:
    """The detector's maps, float32: boxes are computed from them, for which bf16 is too coarse.

    images: (B, 3, S, S) float in [0, 1]
    """
    with problem.autocast():
        maps = detector.maps(images.contiguous(memory_format=torch.channels_last))
    return OrderedDict((name, level.float()) for name, level in maps.items())


@torch.no_grad()
def judged(
    problem: Problem, detector: Detector, split: Split, objects: Objects, **options: Any
) -> AveragePrecision:
    """Find the objects of a split's images, without augmentation, and compare them with the truth.

    Args:
        objects: of the split.
        options: of the average precision.
    """
    detector.eval()
    score = AveragePrecision(problem.num_classes, masks=objects.masks, **options)
    place = 0
    batches = plain_batches(problem, split, image_size=objects.image_size, batch_size=EVAL_BATCH_SIZE)
    for images, count in batches:
        for found in detector.detections(features(problem, detector, images))[:count]:
            score.add(objects.detected(place, found), objects.truth(place))
            place += 1
    return score
