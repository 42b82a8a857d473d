"""Optimisers and the schedules of learning rate and weight decay, as functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.methods.base import Method
from pipeline.specs import Training


def parameter_groups(method: Method) -> list[dict]:
    """Trained parameters in two groups: with weight decay, and without (as the method says)."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            (plain if method.no_decay(name, parameter) else decay).append(parameter)
    groups = [{"params": decay, "decays": True}, {"params": plain, "decays": False}]
    return [group for group in groups if group["params"]]


def make_optimizer(method: Method, training: Training) -> torch.optim.Optimizer:
    """AdamW, Adam (weight decay as an L2 term) or SGD with momentum 0.9."""
    groups = parameter_groups(method)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=0.9)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=training.lr, fused=True)


def learning_rate(training: Training, *, step: int, steps: int, steps_per_epoch: float) -> float:
    """Linear from lr / warm-up steps to lr, then half a cosine to lr_min at the last step, or constant."""
    warmup = min(round(training.warmup_epochs * steps_per_epoch), steps - 1)
    if step < warmup:
        return training.lr * (step + 1) / warmup
    if training.schedule == "constant":
        return training.lr
    return _half_cosine(training.lr, training.lr_min, step - warmup, steps - warmup)


def weight_decay(training: Training, *, step: int, steps: int) -> float:
    """Half a cosine from weight_decay to weight_decay_end, or constant."""
    if training.weight_decay_end is None:
        return training.weight_decay
    return _half_cosine(training.weight_decay, training.weight_decay_end, step, steps)


def set_schedule(
    optimizer: torch.optim.Optimizer, training: Training, *, step: int, steps: int, steps_per_epoch: float
) -> dict[str, float]:
    """Give the optimiser this step's learning rate and weight decay.

    Returns:
        Both, for the log.
    """
    rate = learning_rate(training, step=step, steps=steps, steps_per_epoch=steps_per_epoch)
    decay = weight_decay(training, step=step, steps=steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
    return {"lr": rate, "weight_decay": decay}


def _half_cosine(start: float, end: float, step: int, steps: int) -> float:
    share = min(1.0, step / max(1, steps - 1))
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
