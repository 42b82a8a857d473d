"""A mean whose gradient is computed a chunk at a time: the same numbers, in the memory of one chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from pipeline.methods.chunked import chunked_mean

WIDTH, K = 4, 64


class Saved:
    """A tensor that autograd keeps for its backward pass; counts what is kept at one time."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor, self.bytes = tensor, tensor.nbytes
        Saved.now += self.bytes
        Saved.most = max(Saved.most, Saved.now)

    def __del__(self):
        Saved.now -= self.bytes


def problem(n):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(n, WIDTH, generator=draw, requires_grad=True)
    weight = torch.randn(K, WIDTH, generator=draw, requires_grad=True)
    targets = torch.randint(K, (n,), generator=draw)
    return rows, weight, lambda x, where: F.cross_entropy(x @ weight.T, targets[where], reduction="sum")


@pytest.mark.parametrize("size", [1, 3, 10, 99])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_all_rows_at_once(size, precision):
    rows, weight, piece = problem(10)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        plain = 3 * piece(rows * 2, slice(None)) / 10
        chunked = 3 * chunked_mean(piece, rows * 2, [weight], size=size)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(chunked, plain, **tolerance)
    expected = torch.autograd.grad(plain, [rows, weight])
    for found, other in zip(torch.autograd.grad(chunked, [rows, weight]), expected):
        torch.testing.assert_close(found, other, **tolerance)


def test_without_gradient_only_the_value_is_computed():
    rows, weight, piece = problem(10)
    with torch.no_grad():
        value = chunked_mean(piece, rows, [weight], size=3)
    assert not value.requires_grad
    torch.testing.assert_close(value, piece(rows, slice(None)).detach() / 10)


def most_saved(step):
    """The most bytes that autograd keeps at one time during a step."""
    Saved.now = Saved.most = 0
    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step()
    return Saved.most


def test_memory_does_not_grow_with_rows_times_scores():
    def most(n, size):
        rows, weight, piece = problem(n)
        kept = most_saved(lambda: chunked_mean(piece, rows, [weight], size=size).backward())
        assert rows.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
        return kept

    assert most(2000, size=10) - most(20, size=10) <= 1980 * WIDTH * 4  # the gradient of the rows
    assert most(2000, size=2000) > 2000 * K * 4
