"""Fine-tuning: the whole net with a classifier, light augmentation, the epoch picked by validation.

The classifier begins as the linear probe's (Kumar et al. 2022, arXiv 2202.10054: linear probing, then
fine-tuning), and the net as it is before the first step is left only for an epoch that is better on
validation beyond chance. So a training that is too short, or spoils the features, ends where the probe ends,
and so does one of few labels whose validation images cannot tell.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import Augment
from pipeline.data.squares import Fit
from pipeline.evaluate.images import images_of, plain_batches
from pipeline.evaluate.linear import probe
from pipeline.evaluate.losses import class_weights, make_loss
from pipeline.evaluate.problem import Classify, Prediction, Problem, Split, reproducible
from pipeline.evaluate.select import classified, gains_beyond_chance, validation_score
from pipeline.evaluate.training import train
from pipeline.nets.backbone import Net
from pipeline.nets.export import Classifier, export, load_exported

WARMUP = 0.1  # of the steps


def run(problem: Problem) -> Prediction:
    """The ``finetune`` protocol."""
    with reproducible(problem.seed, problem.device):
        return _run(problem)


def _run(problem: Problem) -> Prediction:
    settings, device = problem.settings, problem.device
    net = load_exported(
        problem.backbone,
        num_classes=problem.num_classes,
        image_size=settings.image_size,
        seed=problem.seed,
    )
    probed = settings.head == "probe" and net.set_linear_classifier(*probe(problem))
    net = net.to(device).to(memory_format=torch.channels_last)
    targets = problem.train.targets.to(device)
    balanced = settings.class_weights == "balanced"
    loss_of = make_loss(
        settings.loss,
        weights=class_weights(targets, problem.num_classes) if balanced else None,
        gamma=settings.focal_gamma,
    )
    images, where = images_of(problem, problem.train, image_size=net.image_size)
    augment = Augment(settings.augment, net.image_size)

    def loss(batch: Tensor, keys: Tensor, chosen: np.ndarray) -> Tensor:
        augmented = augment(batch, keys).contiguous(memory_format=torch.channels_last)
        with problem.autocast():
            logits = net.logits(augmented)
        return loss_of(logits, targets[torch.from_numpy(chosen).to(device)])

    def validate() -> tuple[np.ndarray, dict[str, float], float]:
        val = predict(problem, problem.val, net=net)
        return val, *validation_score(problem, val)

    trained = train(
        *(problem, net),
        images=images,
        where=where,
        loss_of=loss,
        validate=validate,
        warmup=WARMUP,
        surpasses=partial(gains_beyond_chance, problem) if probed else None,
    )
    return classified(
        problem,
        val=trained.best_val,
        test=predict(problem, problem.test, net=net),
        best_epoch=trained.best_epoch,
        chosen={"steps_capped": trained.capped},
        log=trained.log,
        images_seen=trained.images_seen,
        save=partial(_save, net, settings.fit),
    )


def _save(net: Net, fit: Fit, folder: Path, classifier: Classifier, trained: dict[str, Any]) -> None:
    export(net, folder, fit=fit, classifier=classifier, trained=trained)


def restore(problem: Problem, folder: Path) -> Classify:
    """The classifier that this protocol saved, for images of any index."""
    net = load_exported(folder, num_classes=None)
    net = net.to(problem.device).to(memory_format=torch.channels_last)
    return partial(predict, net=net)


@torch.no_grad()
def predict(problem: Problem, split: Split, *, net: Net) -> np.ndarray:
    """Probabilities float32 (N, K) of the split's images without augmentation."""
    net.eval()
    found = []
    for images, count in plain_batches(problem, split, image_size=net.image_size):
        with problem.autocast():
            logits = net.logits(images)
        found.append(problem.probabilities(logits[:count]))
    return np.concatenate(found)
