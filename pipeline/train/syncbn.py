"""Batch normalisation over the batches of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from pipeline.train.distributed import World


def synchronise_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Replace every batch normalisation by one that uses the statistics of all ranks.

    PyTorch's own works on GPUs only; on CPUs :class:`CpuSyncBatchNorm` does the same. Names of parameters and
    buffers stay as they are.
    """
    if world.world_size == 1:
        return module
    if world.device.type == "cuda":
        return convert_sync_batchnorm(module)
    return _convert(module)


def _convert(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return CpuSyncBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _convert(child))
    return module


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(nn.Module):
    """Batch normalisation with mean and variance over all ranks, by differentiable all-reduces.

    Args:
        norm: the layer whose parameters, statistics and settings it takes over; timm's fused activation too.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.num_batches_tracked: Tensor | None
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def reset_running_stats(self) -> None:
        """As torch's: no batch seen."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ...)"""
        if not self.training and self.running_mean is not None:
            mean, var = self.running_mean, self.running_var
            assert var is not None
        else:
            mean, var = self._over_all_ranks(x)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return self.act(self.drop(x * scale.view(shape) + shift.view(shape)))

    def _over_all_ranks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1] * dist.get_world_size()  # ranks have batches of one size
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean = _SumOverRanks.apply(x.sum(axes)) / count
        var = _SumOverRanks.apply((x - mean.view(shape)).square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(var * (count / max(1, count - 1)), share)
        return mean, var


@contextlib.contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Within this, a module in eval mode normalises each batch by its own statistics, and forgets them."""
    norms = batch_norms(module)
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, seen) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(seen)
            norm.eval()


def batch_norms(module: nn.Module) -> list[Any]:
    """All layers that keep batch statistics, synchronised or not."""
    kinds = (nn.modules.batchnorm._BatchNorm, CpuSyncBatchNorm)
    return [part for part in module.modules() if isinstance(part, kinds) and part.running_mean is not None]
