"""Batches spread over ranks, treated as one: gathering with gradient, means over all ranks.

Losses that compare images with each other (contrast, variance, covariance) are computed on the embeddings
of all ranks, so that a run on N ranks optimises what one rank would with the whole batch. Without a process
group everything here is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """All-gather whose backward adds up every rank's gradient for this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes, ctx.rank = sizes, dist.get_rank()
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.sizes)[ctx.rank], None


def batch_sizes(x: Tensor) -> list[int]:
    """Every rank's batch size, in rank order: the last batch of an epoch may differ between ranks."""
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    return [int(c) for c in torch.cat(counts).tolist()]


def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each (B, D) tensor → (sum of B over ranks, D) in rank order, with gradient.

    Every rank computes the same loss from the result. The backward pass adds the ranks' gradients; DDP then
    takes the mean over ranks of the parameters' gradients, which leaves exactly the whole batch's gradient.
    All tensors must have this rank's batch size.
    """
    if world_size() == 1:
        return tensors
    sizes = batch_sizes(tensors[0])
    widths = [t.shape[1] for t in tensors]
    return _Gather.apply(torch.cat(tensors, dim=1), sizes).split(widths, dim=1)


@torch.no_grad()
def mean_over_ranks(total: Tensor, count: int) -> Tensor:
    """Sum over ranks of ``total`` divided by the sum of ``count``: a mean of what all ranks have seen."""
    if world_size() == 1:
        return total / count
    packed = torch.cat([total.flatten(), total.new_tensor([float(count)])])
    dist.all_reduce(packed)
    return (packed[:-1] / packed[-1]).view_as(total)
