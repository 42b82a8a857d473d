"""Training a whole net on few labels: the order, the schedule, and the epoch that validation picks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.draws import sample_keys
from pipeline.data.images import ImageSet
from pipeline.errors import UserError
from pipeline.evaluate.problem import Problem
from pipeline.specs import FinetuneSettings

Found = TypeVar("Found")
Loss = Callable[[Tensor, Tensor, np.ndarray], Tensor]
Validate = Callable[[], tuple[Found, dict[str, float], float]]


@dataclass(frozen=True)
class Trained(Generic[Found]):
    """What a training came to.

    Attributes:
        best_val: what was predicted for the validation split at the best epoch.
        best_epoch: whose weights the net has now.
        capped: whether ``max_steps`` ended the training while validation still rose: the last epoch is best.
        log: one entry an epoch.
        images_seen: over all epochs.
    """

    best_val: Found
    best_epoch: int
    log: list[dict[str, Any]]
    images_seen: int
    capped: bool


def train(
    problem: Problem,
    net: nn.Module,
    *,
    images: ImageSet,
    where: np.ndarray,
    loss_of: Loss,
    validate: Validate[Found],
    warmup: float = 0,
    clip_grad: float | None = None,
    surpasses: Callable[[Found, Found], bool] | None = None,
) -> Trained[Found]:
    """Train, and leave the net with the weights of the epoch that scored best.

    Args:
        problem: its settings say for how long, and with which optimiser.
        net: on the device.
        images: holds the training images.
        where: (N,) their positions in it, in the order of ``problem.train``.
        loss_of: ``loss_of(batch, keys, chosen)``: the loss on uint8 images as ``images`` gives them, whose
            augmentation is drawn by the keys and whose positions in ``problem.train`` are ``chosen``.
        validate: what the net predicts for the validation split, its metrics, and the one that counts.
        warmup: share of the steps in which the learning rate rises.
        clip_grad: largest norm of all gradients together.
        surpasses: where given, the net as it is now is epoch 0 and stays the best unless the best other
            epoch surpasses it: ``surpasses(at the start, at that epoch)``, of what they predict for the
            validation split.

    Raises:
        UserError: the loss is no longer a number.
    """
    settings, device = problem.settings, problem.device
    steps_per_epoch = len(_batches(len(problem.train), settings.batch_size, problem.seed, 0))
    steps = int(min(settings.epochs * steps_per_epoch, settings.max_steps or math.inf))
    epochs = math.ceil(steps / steps_per_epoch)
    optimizer = make_optimizer(net, settings, fused=device.type == "cuda")
    schedule = make_schedule(optimizer, steps=steps, warmup=int(warmup * steps), lr_min=settings.lr_min)

    step, seen, worse, best_epoch, best_score = 0, 0, 0, 0, float("-inf")
    best: dict[str, Tensor] = {}
    best_val: Found
    log: list[dict[str, Any]] = []
    if surpasses is not None:
        best_val, metrics, best_score = validate()
        best = {name: value.detach().clone() for name, value in net.state_dict().items()}
        start, start_val = best, best_val
        log.append({"epoch": 0, "step": 0, "loss": None, "lr": settings.lr, "val": metrics})
    for epoch in range(epochs):
        net.train()
        losses = []
        orders = _batches(len(problem.train), settings.batch_size, problem.seed, epoch)[: steps - step]
        for chosen, batch in zip(orders, images.batches(where[chosen] for chosen in orders)):
            keys = sample_keys(
                torch.from_numpy(problem.train.rows[chosen] + (epoch << 32)), seed=problem.seed
            )
            with _of_one_image(settings.batch_size):
                loss = loss_of(batch, keys, chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip_grad is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip_grad)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            step, seen = step + 1, seen + len(chosen)
            problem.tick(step, steps, f"epoch {epoch + 1} of {epochs}")
        mean_loss = float(torch.stack(losses).mean())
        if not math.isfinite(mean_loss):
            raise UserError(
                f"the training diverged in epoch {epoch + 1}: its loss is not a number; lower finetune.lr"
            )
        val, metrics, score = validate()
        log.append(
            {
                "epoch": epoch + 1,
                "step": step,
                "loss": mean_loss,
                "lr": schedule.get_last_lr()[0],
                "val": metrics,
            }
        )
        if score > best_score:
            best_epoch, best_score, best_val, worse = epoch + 1, score, val, 0
            best = {name: value.detach().clone() for name, value in net.state_dict().items()}
        elif score < best_score and (worse := worse + 1) == settings.patience:  # what ties says nothing yet
            break
    capped = step == settings.max_steps and best_epoch == log[-1]["epoch"] and epochs < settings.epochs
    if surpasses is not None and best_epoch and not surpasses(start_val, best_val):
        best_epoch, best, best_val = 0, start, start_val
    net.load_state_dict(best)
    return Trained(best_val, best_epoch, log, seen, capped)


@contextmanager
def _of_one_image(batch_size: int) -> Iterator[None]:
    """Turn torch's error at batch normalisation of a single value into one line."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"finetune.batch_size {batch_size}: at this image size batch normalisation has a single value a"
            " channel, and needs two; raise batch_size or image_size"
        ) from None


def _batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's order in batches of nearly equal size, none above ``batch_size`` and none of a single
    image.

    A lone image would break batch normalisation at 1 × 1 resolution; three images at a batch size of two
    therefore go together, the one case above ``batch_size``. Where there is but one image, it goes in twice.
    """
    if count == 1 and batch_size > 1:
        return [np.zeros(2, np.int64)]
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


def make_schedule(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup: int, lr_min: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear rise over ``warmup`` steps, then half a cosine from the learning rate to ``lr_min``."""
    kinds = torch.optim.lr_scheduler
    falling = kinds.CosineAnnealingLR(optimizer, steps - warmup, eta_min=lr_min)
    if not warmup:
        return falling
    rising = kinds.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return kinds.SequentialLR(optimizer, [rising, falling], milestones=[warmup])
