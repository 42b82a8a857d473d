from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.evaluate import linear, logistic
from pipeline.evaluate.logistic import (
    Rounded,
    fit_logistic,
    loss_and_gradient,
    predict_logits,
    second_moments,
)
from pipeline.evaluate.losses import class_weights, make_loss
from pipeline.evaluate.standardise import SampleSpan, Standardise


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def samples(count: int = 70, width: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator) * torch.logspace(0, -2, width)
    noise = 0.3 * torch.randn(count, classes, generator=generator)
    return Standardise(features)(features), (features[:, :classes] + noise).argmax(dim=1)


@pytest.mark.parametrize("multilabel", [False, True])
def test_gradient_is_that_of_the_loss_however_many_rows_at_a_time(
    multilabel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic, "IN_CACHE", 100)  # 17 rows of 6
    features, labels = samples()
    targets = torch.nn.functional.one_hot(labels, 3).float() if multilabel else labels
    weights = class_weights(targets, 3).double()
    loss_of = make_loss("cross_entropy", weights=weights)
    solution = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    expected = loss_of(predict_logits(features.double(), solution), targets)
    expected.backward()
    found, gradient = loss_and_gradient(
        solution.detach().T, features, targets, loss_of=loss_of, precision=torch.float64
    )
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient.T, solution.grad)


def test_second_moments_are_symmetric_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "BLOCK", 4)
    monkeypatch.setattr(logistic, "IN_CACHE", 40)
    features, _ = samples(width=10)
    expected = features.double().T @ features.double() / len(features)
    torch.testing.assert_close(second_moments(features), expected, rtol=1e-5, atol=1e-6)


def test_coordinates_round_the_bound_of_the_curvature() -> None:
    features, _ = samples()
    moments = second_moments(features.double())
    rounded = Rounded(moments, curvature=0.25, weight_decay=0.1, precision=torch.float64)
    solution, gradient = torch.randn(2, 3, 7, dtype=torch.float64)
    there = rounded.coordinates(solution)
    torch.testing.assert_close(rounded.solution(there), solution)
    torch.testing.assert_close((rounded.gradient(gradient) * there).sum(), (gradient * solution).sum())
    weights = solution[:, :-1]
    curved = (weights @ (0.25 * moments + 0.1 * torch.eye(6)) * weights).sum()
    torch.testing.assert_close(there[:, :-1].square().sum(), curved, rtol=1e-4, atol=0)


def test_features_without_variance_or_alike_are_solved() -> None:
    features, targets = samples()
    odd = torch.cat([features, features[:, :1], torch.zeros(len(features), 1)], dim=1)
    found = fit_logistic(odd, targets, num_classes=3, weight_decay=1e-5)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0], found[6], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[7], torch.zeros(3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("decays", [(0.1,), (1.0, 1e-4)])
def test_what_is_picked_is_solved_by_gradients_in_float64(
    decays: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def imprecise(*given: Any, precision: torch.dtype, **more: Any) -> Tensor:
        found = fit_logistic(*given, precision=precision, **more)
        return found + 1e-3 if precision == torch.float32 else found

    monkeypatch.setattr(linear, "fit_logistic", imprecise)
    monkeypatch.setattr(linear, "WEIGHT_DECAYS", decays)
    features, targets = samples()
    scores = iter(range(len(decays)))
    solution, decay, log = linear.pick_weight_decay(
        features,
        targets,
        num_classes=3,
        weights=None,
        score=lambda found: ({}, next(scores)),
        tick=lambda *_: None,
    )
    assert decay == decays[-1] and len(log) == len(decays)
    _, gradient = loss_and_gradient(
        solution.T, features, targets, loss_of=make_loss("cross_entropy"), precision=torch.float64
    )
    gradient[:, :-1] += decay * solution.T[:, :-1]
    rounded = Rounded(second_moments(features), curvature=0.25, weight_decay=decay, precision=torch.float64)
    assert rounded.gradient(gradient).abs().max() <= 1e-6


def test_standardised_features_are_rounded_once() -> None:
    features = torch.randn(1100, 5) * 3 + 100
    x = features.double()
    expected = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    torch.testing.assert_close(Standardise(features)(features), expected.float(), rtol=1e-6, atol=1e-12)


def test_few_samples_lose_nothing_in_their_own_span() -> None:
    features = torch.randn(9, 30)
    scaled, inside = Standardise(features)(features), SampleSpan(features)(features)
    assert inside.shape == (9, 9)
    torch.testing.assert_close(inside @ inside.T, scaled @ scaled.T, rtol=1e-4, atol=1e-4)
