from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.evaluate.logistic import fit_logistic, predict_logits
from pipeline.evaluate.losses import class_weights
from pipeline.evaluate.standardise import SampleSpan


def blobs(n: int, d: int, k: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % k
    centres = torch.randn(k, d, generator=generator)
    return centres[targets] + 2 * torch.randn(n, d, generator=generator), targets


@pytest.mark.parametrize("balanced", [False, True])
def test_solution_is_scikit_learns(balanced: bool) -> None:
    features, targets = blobs(120, 8)
    features, targets = features[:100], targets[:100].clone()
    targets[:30] = 0
    standardise = SampleSpan(features)
    x = standardise(features).double()
    decay = 0.03
    weights = class_weights(targets, 3) if balanced else None
    found = fit_logistic(x, targets, num_classes=3, weight_decay=decay, weights=weights)
    theirs = LogisticRegression(
        C=1 / (decay * len(x)), class_weight="balanced" if balanced else None, tol=1e-10, max_iter=5000
    ).fit(x.numpy(), targets.numpy())
    ours = predict_logits(x, found).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(x.numpy()), atol=1e-5)


def test_start_does_not_change_the_solution() -> None:
    features, targets = blobs(60, 5)
    x = SampleSpan(features)(features).double()
    far = fit_logistic(x, targets, num_classes=3, weight_decay=1.0)
    cold = fit_logistic(x, targets, num_classes=3, weight_decay=0.01)
    warm = fit_logistic(x, targets, num_classes=3, weight_decay=0.01, start=far)
    torch.testing.assert_close(
        predict_logits(x, warm).softmax(1), predict_logits(x, cold).softmax(1), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("samples", [12, 60])
def test_coordinates_of_the_own_span_keep_the_solution(samples: int) -> None:
    features, targets = blobs(samples, 40)
    more, _ = blobs(30, 40, seed=1)
    span = SampleSpan(features)
    assert span(features).shape == (samples, min(samples, 40))

    def plain(x: torch.Tensor) -> torch.Tensor:
        return (x.double() - span.mean) / span.std

    found = fit_logistic(span(features), targets, num_classes=3, weight_decay=0.1)
    full = fit_logistic(plain(features), targets, num_classes=3, weight_decay=0.1)
    torch.testing.assert_close(
        predict_logits(span(more), found), predict_logits(plain(more), full), atol=1e-4, rtol=1e-4
    )


def test_constant_feature_stays_finite() -> None:
    features, _ = blobs(10, 4)
    features[:, 2] = 7.5
    scaled = SampleSpan(features)(features)
    assert torch.isfinite(scaled).all()
    total = scaled.square().mean(dim=0).sum()
    assert torch.allclose(total, torch.full_like(total, 3)), "three features of variance 1, however rotated"


def test_multilabel_is_one_regression_a_class() -> None:
    features, labels = blobs(90, 6)
    targets = torch.nn.functional.one_hot(labels, 3).float()
    targets[:, 1] = (features[:, 0] > 0).float()
    x = SampleSpan(features)(features).double()
    found = fit_logistic(x, targets, num_classes=3, weight_decay=0.05)
    for k in range(3):
        # the mean is over samples and classes, so one class alone has a third of the loss
        theirs = LogisticRegression(C=1 / (0.05 * 3 * len(x)), tol=1e-10, max_iter=5000)
        theirs.fit(x.numpy(), targets[:, k].numpy())
        ours = predict_logits(x, found)[:, k].sigmoid().numpy()
        np.testing.assert_allclose(ours, theirs.predict_proba(x.numpy())[:, 1], atol=1e-5)
