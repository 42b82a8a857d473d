"""Losses against direct, slow computations of their formulas."""

import math

import numpy as np
import pytest
import torch

from pipeline.methods.losses import cosine_distance, covariance_term, info_nce, nt_xent, variance_term


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_distance_is_0_for_one_direction_2_for_a_right_angle_4_for_opposites():
    a = torch.tensor([[1.0, 0.0]])
    values = [cosine_distance(a, torch.tensor([b])).item() for b in ([3.0, 0.0], [0.0, 2.0], [-1.0, 0.0])]
    assert values == pytest.approx([0, 2, 4], abs=1e-6)


def test_nt_xent_is_the_papers_sum_over_all_other_embeddings():
    a, b, tau = batch(5, 3), batch(5, 3, seed=1), 0.3
    z = torch.cat([a, b]).double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(10):
        j = (i + 5) % 10
        others = sum(math.exp(z[i] @ z[k] / tau) for k in range(10) if k != i)
        total -= math.log(math.exp(z[i] @ z[j] / tau) / others)
    assert nt_xent(a, b, temperature=tau).item() == pytest.approx(total / 10, rel=1e-5)


def test_info_nce_is_the_mean_of_both_directions_with_the_other_side_as_negatives():
    a, b, tau = batch(4, 3), batch(4, 3, seed=1), 0.2
    x = (a / a.norm(dim=1, keepdim=True)).double().numpy()
    y = (b / b.norm(dim=1, keepdim=True)).double().numpy()
    total = 0.0
    for one, other in ((x, y), (y, x)):
        for i in range(4):
            total -= math.log(
                math.exp(one[i] @ other[i] / tau) / sum(math.exp(one[i] @ other[k] / tau) for k in range(4))
            )
    assert info_nce(a, b, temperature=tau).item() == pytest.approx(total / 8, rel=1e-5)


def test_variance_term_is_the_hinge_on_each_dimensions_deviation():
    z = batch(20, 4) * torch.tensor([0.0, 0.5, 1.0, 3.0])
    deviation = np.sqrt(z.double().numpy().var(axis=0, ddof=1) + 1e-4)
    assert variance_term(z).item() == pytest.approx(np.maximum(0, 1 - deviation).mean(), rel=1e-5)
    assert variance_term(torch.ones(6, 3)).item() == pytest.approx(0.99)  # collapsed: 1 - sqrt(1e-4)


def test_covariance_term_is_the_sum_of_squared_off_diagonals():
    z = batch(20, 4)
    cov = np.cov(z.double().numpy().T)
    expected = (cov**2).sum() - (np.diag(cov) ** 2).sum()
    assert covariance_term(z).item() == pytest.approx(expected / 4, rel=1e-5)


def test_losses_are_float32_under_autocast():
    a, b = batch(4, 8).bfloat16(), batch(4, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = [
            cosine_distance(a, b),
            nt_xent(a, b, temperature=0.5),
            info_nce(a, b, temperature=0.5),
            variance_term(a),
            covariance_term(a),
        ]
    assert {value.dtype for value in values} == {torch.float32}
    assert values[1].item() == pytest.approx(nt_xent(a.float(), b.float(), temperature=0.5).item(), rel=1e-6)
