"""Segmentation by fine-tuning: the whole net under a Semantic FPN, the epoch picked by validation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.augment import Augment
from pipeline.evaluate.images import images_of, plain_batches
from pipeline.evaluate.losses import balancing, make_loss
from pipeline.evaluate.problem import Prediction, Problem, Split, reproducible
from pipeline.evaluate.segmentation import confusions, pixel_counts, score, segmented
from pipeline.evaluate.training import train
from pipeline.nets.export import load_exported
from pipeline.nets.seeding import seeded
from pipeline.nets.semantic_fpn import SemanticFPN
from shards import IGNORE

EVAL_BATCH_SIZE = 16


def run(problem: Problem) -> Prediction:
    """The ``seg_fpn`` protocol."""
    with reproducible(problem.seed, problem.device):
        return _run(problem)


def _run(problem: Problem) -> Prediction:
    settings, device = problem.settings, problem.device
    net = load_exported(problem.backbone, num_classes=0, image_size=settings.image_size)
    size = net.image_size
    with seeded(problem.seed, "segmentation head"):
        model = SemanticFPN(net, num_classes=problem.num_classes, width=settings.head_width)
    model = model.to(device).to(memory_format=torch.channels_last)
    images, where = images_of(problem, problem.train, image_size=size, masks=True)
    weights = None
    if settings.class_weights == "balanced":
        counts = pixel_counts(images, where, problem.num_classes).sum(axis=0)
        weights = balancing(torch.from_numpy(counts)).to(device)
    loss_of = make_loss(settings.loss, weights=weights, gamma=settings.focal_gamma, ignore=IGNORE)
    augment = Augment(settings.augment, size)

    def loss(batch: Tensor, keys: Tensor, chosen: np.ndarray) -> Tensor:
        views, masks = augment.pair(batch[:, :3], batch[:, 3], keys)
        with problem.autocast():
            logits = model(views.contiguous(memory_format=torch.channels_last))
        full = F.interpolate(logits.float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
        return loss_of(full.movedim(1, -1).flatten(0, 2), masks.flatten().long())

    def validate() -> tuple[np.ndarray, dict[str, float], float]:
        found = predict(problem, model, problem.val, image_size=size)
        return found, *score(problem, found)

    trained = train(problem, model, images=images, where=where, loss_of=loss, validate=validate)
    return segmented(
        val=trained.best_val,
        test=predict(problem, model, problem.test, image_size=size),
        best_epoch=trained.best_epoch,
        chosen={"steps_capped": trained.capped},
        log=trained.log,
        images_seen=trained.images_seen,
    )


def predict(problem: Problem, model: SemanticFPN, split: Split, *, image_size: int) -> np.ndarray:
    """Pixel counts uint32 (N, K, K) of the split's images without augmentation."""
    model.eval()

    def logits() -> Iterator[Tensor]:
        batches = plain_batches(problem, split, image_size=image_size, batch_size=EVAL_BATCH_SIZE)
        for images, count in batches:
            with problem.autocast():
                found = model(images)
            yield found[:count]

    return confusions(problem, split, logits(), image_size=image_size)
