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
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[dist.get_rank()]


def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each (B, D) tensor → (ranks · B, D) in rank order, with gradient.

    Every rank computes the same loss from the result. The backward pass adds the ranks' gradients; DDP then
    takes the mean over ranks of the parameters' gradients, which leaves exactly the whole batch's gradient.
    All ranks must have the same batch size, and one call gathers all tensors in one message.
    """
    if world_size() == 1:
        return tensors
    widths = [t.shape[1] for t in tensors]
    return _Gather.apply(torch.cat(tensors, dim=1)).split(widths, dim=1)


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over ranks of a tensor that is itself a mean over batches of one size."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()
