"""A mean over very many rows whose gradient is computed a chunk at a time, together with its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Piece = Callable[[Tensor, slice], Tensor]


def chunked_mean(piece: Piece, rows: Tensor, parameters: Sequence[Tensor], *, size: int) -> Tensor:
    """The mean of a loss over rows; of what its backward pass needs, no more than one chunk's is ever there.

    What is kept until the backward pass are the gradients, as large as ``rows`` and ``parameters``.

    Args:
        piece: (n, C) rows and their place among all → the sum of their losses, a scalar.
        rows: (N, C)
        parameters: all that ``piece`` uses and that learns.
        size: rows a chunk.

    Returns:
        A float32 scalar, with gradient to ``rows`` and ``parameters``.
    """
    return _ChunkedMean.apply(piece, size, torch.is_grad_enabled(), rows, *parameters)


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Piece, size: int, learns: bool, rows: Tensor, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), device=rows.device)
        gradients = [torch.zeros_like(x) for x in (rows, *parameters)] if learns else []
        for first in range(0, len(rows), size):
            where = slice(first, first + size)
            chunk = rows[where].detach()
            with torch.set_grad_enabled(learns):
                part = piece(chunk.requires_grad_(learns), where).float()
            total += part.detach()
            if learns:
                found = torch.autograd.grad(part, [chunk, *parameters])
                for gradient, one in zip([gradients[0][where], *gradients[1:]], found, strict=True):
                    gradient += one
        ctx.rows = len(rows)
        ctx.save_for_backward(*gradients)
        return total / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(found * (gradient / ctx.rows) for found in ctx.saved_tensors))
