from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.evaluate.losses import class_weights, make_loss


def test_rare_classes_weigh_more() -> None:
    targets = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    weights = class_weights(targets, 4)
    assert weights[0] < weights[1] < weights[2]
    assert weights[targets].mean() == pytest.approx(1)
    total = torch.stack([weights[k] * (targets == k).sum() for k in range(3)])
    assert torch.allclose(total, total[0].expand(3))  # each class pulls equally
    assert weights[3] == 1  # never occurs


def test_rare_labels_weigh_more_in_multilabel() -> None:
    targets = torch.zeros(100, 3)
    targets[:50, 0] = 1
    targets[:10, 1] = 1
    weights = class_weights(targets, 3)
    assert weights.shape == (2, 3)
    assert weights[1, 0] == weights[0, 0] == 1
    assert weights[1, 1] == pytest.approx(5) and weights[0, 1] == pytest.approx(100 / 180)
    assert weights[:, 2].tolist() == [1, 1]


@pytest.mark.parametrize("multilabel", [False, True])
def test_focal_at_gamma_zero_is_cross_entropy(multilabel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator)
    labels = torch.randint(0, 4, (20,), generator=generator)
    targets = F.one_hot(labels, 4).float() if multilabel else labels
    plain = make_loss("cross_entropy")(logits, targets)
    assert make_loss("focal", gamma=0.0)(logits, targets) == pytest.approx(plain.item())
    expected = (
        F.binary_cross_entropy_with_logits(logits, targets) if multilabel else F.cross_entropy(logits, labels)
    )
    assert plain == pytest.approx(expected.item())


def test_focal_is_the_papers_formula() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.0, 0.3]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    p = logits.softmax(1)[torch.arange(2), targets]
    weights = torch.tensor([0.5, 3.0, 1.0])
    expected = (weights[targets] * (1 - p) ** 2 * -p.log()).mean()
    assert make_loss("focal", weights=weights, gamma=2.0)(logits, targets) == pytest.approx(expected.item())


def test_binary_focal_is_the_papers_formula() -> None:
    logits = torch.tensor([[2.0, -0.5]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    p = torch.stack([logits[0, 0].sigmoid(), 1 - logits[0, 1].sigmoid()])
    expected = ((1 - p) ** 2 * -p.log()).mean()
    assert make_loss("focal", gamma=2.0)(logits, targets) == pytest.approx(expected.item())


def test_focal_turns_from_easy_to_hard_samples() -> None:
    logits = torch.tensor([[6.0, 0.0], [0.0, 1.0]], requires_grad=True)
    targets = torch.tensor([0, 0])
    (plain,) = torch.autograd.grad(make_loss("cross_entropy")(logits, targets), logits)
    (focal,) = torch.autograd.grad(make_loss("focal", gamma=2.0)(logits, targets), logits)
    assert focal[0].abs().sum() / focal[1].abs().sum() < 0.01 * plain[0].abs().sum() / plain[1].abs().sum()


def test_gradient_is_finite_where_the_answer_is_certain() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(make_loss("focal", gamma=0.5)(logits, torch.tensor([0])), logits)
    assert torch.isfinite(gradient).all()
