"""L-BFGS for smooth convex functions whose curvature is known to be about 1 or below."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

HISTORY = 20
OVERSHOT = 0.9  # a step ends where the slope along it has risen to so much of the slope where it began
NOISE = 1e-7  # of the function: what rounding in float32 may add to it
SHORTENED = 10  # times that a step is shortened; what is still no step is rounding


def minimise(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    tolerance: float,
    iterations: int,
) -> Tensor:
    """The point from ``start`` on at which no entry of the gradient is above ``tolerance``.

    PyTorch's own begins with a tiny step, since it knows no scale, and looks for a step's length by cubic
    interpolation; here the length 1 nearly always does, the first time too.

    Args:
        value_and_gradient: of a point; float64, a scalar and one of the point's shape.
        start: float64, of any shape.
        iterations: at most; it also ends where rounding leaves no way down.
    """
    point, (value, gradient) = start, value_and_gradient(start)
    history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=HISTORY)
    for _ in range(iterations):
        if gradient.abs().max() <= tolerance:
            break
        direction = -_preconditioned(gradient, history)
        slope = _dot(gradient, direction)
        length = 1.0
        for _ in range(SHORTENED):
            step = length * direction
            reached, there = value_and_gradient(point + step)
            risen = _dot(there, direction)
            if risen <= -OVERSHOT * slope and reached <= value + NOISE * value.abs():
                break
            length *= min(0.5, float(slope / (slope - risen)))  # where a straight slope is 0
        else:
            break
        change = there - gradient
        history.append((step, change, 1 / _dot(step, change)))
        point, value, gradient = point + step, reached, there
    return point


def _preconditioned(gradient: Tensor, history: deque[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The gradient times the inverse curvature that the steps so far suggest: the two loops of L-BFGS."""
    found = gradient.clone()
    shares = []
    for step, change, inverse in reversed(history):
        shares.append(inverse * _dot(step, found))
        found -= shares[-1] * change
    if history:
        _, change, inverse = history[-1]
        found /= inverse * _dot(change, change)
    for (step, change, inverse), share in zip(history, reversed(shares), strict=True):
        found += (share - inverse * _dot(change, found)) * step
    return found


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return torch.dot(first.flatten(), second.flatten())
