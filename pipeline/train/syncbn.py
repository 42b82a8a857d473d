"""Batch normalisation over the batches of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

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


def _seen(x: Tensor) -> int:
    """Values a channel of x: (B, C, ...) and of the other ranks' batches, which are of its size."""
    return x.numel() // x.shape[1] * dist.get_world_size()


class _Normalise(torch.autograd.Function):
    """Batch normalisation by the statistics of all ranks' batches: two messages, and torch's own kernels.

    A rank's share of the gradient to ``weight`` and ``bias`` is its own, as DDP wants it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        """x: (B, C, ...) float32, ranks have batches of one size → the same, and (C,) mean and variance."""
        own = torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0))  # mean, and variance about it
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        means, variances = torch.stack(every).unbind(1)
        mean = means.mean(dim=0)
        var = (variances + (means - mean).square()).mean(dim=0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """That of fixed statistics, and what the statistics themselves add, from sums over all ranks."""
        x, weight, mean, var = ctx.saved_tensors
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([to_bias, to_weight])  # of the gradient, and of it times the normalised x
        dist.all_reduce(sums)
        count = _seen(x)
        inverse = (var + ctx.eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        slope = -scale * inverse * sums[1] / count
        offset = -scale * sums[0] / count - slope * mean
        shape = (1, -1) + (1,) * (x.ndim - 2)
        to_x = to_x.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
        return to_x, None if weight is None else to_weight, None if weight is None else to_bias, None


class CpuSyncBatchNorm(nn.Module):
    """Batch normalisation with mean and variance over all ranks.

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
        x = x.float()  # under autocast too: statistics of halves would not do
        if not self.training and self.running_mean is not None:
            out = functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        else:
            out, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)
            self._remember(mean, var, count=_seen(x))
        return self.act(self.drop(out))

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, *, count: int) -> None:
        """Move the running statistics; ``count`` values a channel were seen by all ranks."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var * (count / max(1, count - 1)), share)


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
