"""Averages of the exported weights: EMA (every step) or SWA (the mean of the last steps)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.methods.base import Method, Progress
from pipeline.nets.backbone import Net
from pipeline.specs import Training
from pipeline.train.syncbn import batch_norms


class Averaging:
    """Keeps the averaged backbones beside the trained ones.

    SWA (Izmailov et al. 2018, arXiv 1803.05407) takes the equal mean of the weights after every step of the
    last ``1 - swa_start`` of the training; EMA has the given decay a step.
    """

    def __init__(self, method: Method, training: Training) -> None:
        self.start = training.swa_start if training.averaging == "swa" else 0.0
        self.model: AveragedModel | None = None
        if training.averaging == "swa":
            self.model = AveragedModel(nn.ModuleDict(method.exported()))
        elif training.averaging == "ema":
            average = get_ema_multi_avg_fn(training.ema_decay)
            self.model = AveragedModel(nn.ModuleDict(method.exported()), multi_avg_fn=average)

    def update(self, method: Method, progress: Progress) -> None:
        """Take in the weights after a step."""
        if self.model is not None and progress.step + 1 > self.start * progress.steps:
            self.model.update_parameters(nn.ModuleDict(method.exported()))

    def nets(self, method: Method) -> dict[str, Net]:
        """The averaged backbones; the trained ones where nothing was averaged."""
        if self.model is None or not self.model.n_averaged.bool():
            return method.exported()
        averaged = self.model.module
        assert isinstance(averaged, nn.ModuleDict)
        return {arch: net for arch, net in averaged.items() if isinstance(net, Net)}

    def state_dict(self) -> dict:
        return {} if self.model is None else self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.model is not None:
            self.model.load_state_dict(state)


@torch.no_grad()
def refresh_batch_norm(nets: dict[str, Net], batches: Iterable[Tensor]) -> None:
    """Measure batch statistics anew: those of averaged weights are not the average of the statistics.

    Args:
        nets: backbones, left in eval mode.
        batches: (B, 3, H, W) in [0, 1], as many on every rank.
    """
    norms = [norm for net in nets.values() for norm in batch_norms(net)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for net in nets.values():
        net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    for images in batches:
        for net in nets.values():
            net.features(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
