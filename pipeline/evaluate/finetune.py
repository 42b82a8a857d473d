"""Fine-tuning: the whole net with a new classifier, light augmentation, the epoch picked by validation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.augment import Augment
from pipeline.data.draws import sample_keys
from pipeline.evaluate.images import images_of, plain_batches
from pipeline.evaluate.losses import class_weights, make_loss
from pipeline.evaluate.problem import Prediction, Problem, Split, reproducible
from pipeline.evaluate.select import classified, validation_score
from pipeline.nets.backbone import Net
from pipeline.nets.export import load_exported
from pipeline.specs import FinetuneSettings

EVAL_BATCH_SIZE = 128


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
    steps_per_epoch = len(_batches(len(problem.train), settings.batch_size, problem.seed, 0))
    steps = min(settings.epochs * steps_per_epoch, settings.max_steps or math.inf)
    epochs = math.ceil(steps / steps_per_epoch)
    optimizer = make_optimizer(net, settings, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps), eta_min=settings.lr_min)

    step, seen, best_epoch, best_score = 0, 0, 0, float("-inf")
    best: dict[str, Tensor] = {}
    best_val = np.empty(0)
    log = []
    for epoch in range(epochs):
        net.train()
        losses = []
        orders = _batches(len(problem.train), settings.batch_size, problem.seed, epoch)[: int(steps - step)]
        for chosen, batch in zip(orders, images.batches(where[chosen] for chosen in orders)):
            keys = sample_keys(
                torch.from_numpy(problem.train.rows[chosen] + (epoch << 32)), seed=problem.seed
            )
            augmented = augment(batch, keys).contiguous(memory_format=torch.channels_last)
            with problem.autocast():
                logits = net.logits(augmented)
            loss = loss_of(logits, targets[torch.from_numpy(chosen).to(device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            step, seen = step + 1, seen + len(chosen)
            problem.tick(step, steps, f"epoch {epoch + 1} of {epochs}")
        val = predict(problem, net, problem.val)
        metrics, score = validation_score(problem, val)
        log.append(
            {
                "epoch": epoch + 1,
                "step": step,
                "loss": float(torch.stack(losses).mean()),
                "lr": schedule.get_last_lr()[0],
                "val": metrics,
            }
        )
        if score > best_score:
            best_epoch, best_score, best_val = epoch + 1, score, val
            best = {name: value.detach().clone() for name, value in net.state_dict().items()}
        elif settings.patience and epoch + 1 - best_epoch >= settings.patience:
            break
    net.load_state_dict(best)
    return classified(
        problem,
        val=best_val,
        test=predict(problem, net, problem.test),
        best_epoch=best_epoch,
        log=log,
        images_seen=seen,
    )


@torch.no_grad()
def predict(problem: Problem, net: Net, split: Split) -> np.ndarray:
    """Probabilities float32 (N, K) of the split's images without augmentation."""
    net.eval()
    found = []
    for images in plain_batches(problem, split, image_size=net.image_size, batch_size=EVAL_BATCH_SIZE):
        with problem.autocast():
            logits = net.logits(images)
        found.append(problem.probabilities(logits))
    return np.concatenate(found)


def _batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's order in batches of nearly equal size, none above ``batch_size`` and none of a single
    image.

    A lone image would break batch normalisation at 1 × 1 resolution; three images at a batch size of two
    therefore go together, the one case above ``batch_size``.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    parts = math.ceil(count / batch_size)
    if batch_size > 1:
        parts = max(1, min(parts, count // 2))
    return np.array_split(order, parts)


def make_optimizer(net: nn.Module, settings: FinetuneSettings, *, fused: bool) -> torch.optim.Optimizer:
    """The optimiser of the settings; biases and norms are not decayed."""
    decayed = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, fused=fused)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr, fused=fused)
