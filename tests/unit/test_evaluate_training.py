"""The training that the protocols share: its schedule, and what it says when it diverges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detection_cases import RectangleIndex, problem_of, rectangles
from torch import nn

from pipeline.errors import UserError
from pipeline.evaluate.images import images_of
from pipeline.evaluate.training import make_schedule, train


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine(warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, steps=20, warmup=warmup, lr_min=0.1)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    rising = (np.arange(warmup) + 1) / (warmup + 1)
    falling = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(20 - warmup) / (20 - warmup))) / 2
    np.testing.assert_allclose(rates, np.concatenate([rising, falling]), atol=1e-9)
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)


def small(tmp_path: Path, **settings):
    rng = np.random.default_rng(0)
    index = RectangleIndex([rectangles(rng, (16, 16), 1) for _ in range(6)])
    problem = problem_of(index, tmp_path, "cnn", [range(4), [4], [5]], size=16, **settings)
    images, where = images_of(problem, problem.train, image_size=16)
    return problem, {"images": images, "where": where}


def test_a_loss_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    problem, data = small(tmp_path, epochs=3)
    net = nn.Linear(1, 1)
    losses = iter([1.0, float("nan"), 1.0])
    with pytest.raises(UserError, match=r"diverged in epoch 2: .*lower finetune.lr"):
        train(
            problem,
            net,
            **data,
            loss_of=lambda batch, keys, chosen: net.weight.sum() * next(losses),
            validate=lambda: (None, {}, 0.0),
        )


def test_gradients_are_no_longer_than_they_may_be(tmp_path: Path) -> None:
    problem, data = small(tmp_path, epochs=1, optimizer="sgd", lr=1.0, lr_min=1.0)
    for limit, expected in ((None, 1000.0), (2.0, 2.0)):
        net = nn.Linear(1, 1, bias=False)
        before = net.weight.item()
        train(
            problem,
            net,
            **data,
            loss_of=lambda batch, keys, chosen, net=net: 1000 * net.weight.sum(),
            validate=lambda: (None, {}, 0.0),
            clip_grad=limit,
        )
        assert before - net.weight.item() == pytest.approx(expected, rel=1e-3)


def test_a_batch_of_one_image_that_batch_normalisation_cannot_take_is_one_line(tmp_path: Path) -> None:
    problem, data = small(tmp_path, epochs=1, batch_size=1)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    with pytest.raises(UserError, match=r"finetune\.batch_size 1: .*raise batch_size or image_size"):
        train(
            problem,
            net,
            **data,
            loss_of=lambda batch, keys, chosen: net(batch.float()).sum(),
            validate=lambda: (None, {}, 0.0),
        )
    with pytest.raises(ValueError, match="something else"):
        train(
            problem,
            net,
            **data,
            loss_of=lambda batch, keys, chosen: (_ for _ in ()).throw(ValueError("something else")),
            validate=lambda: (None, {}, 0.0),
        )
