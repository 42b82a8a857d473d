"""Segmentation: pixels counted by the field's definitions, predicted at the stored size, sampled fairly."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from pipeline.data.squares import extent, square_mask
from pipeline.evaluate.logistic import fit_logistic, predict_logits
from pipeline.evaluate.losses import balancing, class_weights, make_loss
from pipeline.evaluate.seg_linear import interpolated, share_out
from pipeline.evaluate.segmentation import at_stored_size, confusions
from pipeline.evaluate.segmentation_metrics import confusion, evaluate
from pipeline.evaluate.standardise import SampleSpan
from pipeline.nets.backbone import create_backbone
from pipeline.nets.semantic_fpn import SemanticFPN
from pipeline.specs import Backbone
from shards import IGNORE

torch.set_num_threads(1)


def masks(count: int, classes: list[int], size: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(classes, np.uint8), (count, size, size))


def counts(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    return np.stack([confusion(p, t, num_classes) for p, t in zip(predicted, truth)])


@pytest.mark.parametrize(
    ("true_classes", "predicted_classes"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 2, 3, IGNORE], [0, 1, 2, 3]),
        ([0, 1, IGNORE], [0, 1]),  # two classes nowhere
        ([0, 1], [0, 1, 3]),  # one predicted that is not there
        ([0, 1, 2], [0, 1]),  # one there that is never predicted
    ],
)
def test_metrics_are_torchmetrics(true_classes: list[int], predicted_classes: list[int]) -> None:
    truth, predicted = masks(6, true_classes), masks(6, predicted_classes, seed=1)
    found = evaluate(counts(predicted, truth, 4))
    p, t = torch.from_numpy(predicted.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))
    options: dict[str, Any] = {"num_classes": 4, "ignore_index": IGNORE}
    assert found["miou"] == pytest.approx(float(MulticlassJaccardIndex(average="macro", **options)(p, t)))
    assert found["mean_dice"] == pytest.approx(float(MulticlassF1Score(average="macro", **options)(p, t)))
    right = MulticlassAccuracy(average="micro", **options)(p, t)
    assert found["pixel_accuracy"] == pytest.approx(float(right))
    recall = MulticlassAccuracy(average="none", **options)(p, t).numpy()
    there = [k for k in true_classes if k != IGNORE]
    assert found["mean_accuracy"] == pytest.approx(recall[there].mean())


def test_confusion_is_scikit_learns_truth_by_prediction() -> None:
    truth, predicted = masks(1, [0, 1, 2])[0], masks(1, [0, 1, 2], seed=1)[0]
    found = confusion(predicted, truth, 3)
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, confusion_matrix(truth.ravel(), predicted.ravel()))


def test_pixels_of_no_class_never_count() -> None:
    truth = masks(3, [0, 1, IGNORE])
    first, second = masks(3, [0, 1], seed=1), masks(3, [0, 1], seed=2)
    second[truth != IGNORE] = first[truth != IGNORE]
    np.testing.assert_array_equal(counts(first, truth, 2), counts(second, truth, 2))
    assert counts(first, truth, 2).sum() == (truth != IGNORE).sum()
    empty = counts(first, np.full_like(truth, IGNORE), 2)
    assert empty.sum() == 0 and all(np.isnan(value) for value in evaluate(empty).values())


@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_mean_over_the_pixels_that_count(name: Any, weighted: bool) -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.from_numpy(masks(1, [0, 1, 2, IGNORE], size=10)[0].ravel()[:50]).long()
    kept = targets != IGNORE
    weights = class_weights(targets[kept], 3) if weighted else None
    found = make_loss(name, weights=weights, ignore=IGNORE)(logits, targets)
    expected = make_loss(name, weights=weights)(logits[kept], targets[kept])
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    assert (gradient[~kept] == 0).all() and gradient[kept].abs().sum() > 0
    nothing = make_loss(name, weights=weights, ignore=IGNORE)(logits, torch.full((50,), IGNORE))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing == 0 and (gradient == 0).all()


def test_balancing_counted_pixels_is_weighing_the_pixels() -> None:
    targets = torch.from_numpy(masks(1, [0, 0, 0, 1])[0].ravel()).long()
    assert torch.equal(balancing(torch.bincount(targets, minlength=3)), class_weights(targets, 3))


@dataclass
class Index:
    """The masks of a dataset."""

    stored: list[np.ndarray]

    def mask(self, row: int) -> np.ndarray:
        return self.stored[row]


def problem(stored: list[np.ndarray], *, fit: str = "squash", num_classes: int = 2) -> Any:
    """As much of a problem as counting takes."""
    return SimpleNamespace(index=Index(stored), settings=SimpleNamespace(fit=fit), num_classes=num_classes)


@pytest.mark.parametrize("shape", [(37, 50), (8, 8), (64, 64)])
def test_logits_are_interpolated_to_the_stored_size(shape: tuple[int, int]) -> None:
    logits = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = F.interpolate(logits[None], size=shape, mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(at_stored_size(logits, shape, image_size=32, fit="squash"), theirs)


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
def test_a_prediction_lies_on_the_stored_image_however_it_became_square(
    shape: tuple[int, int], fit: Any
) -> None:
    """The square's own mask, taken for a prediction, is the stored mask again but for borders."""
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 3 : shape[0] // 2, shape[1] // 2 : shape[1] // 4 * 3] = 1
    seen = torch.from_numpy(square_mask(mask, 32, fit).copy())
    logits = torch.stack([seen != 1, seen == 1]).float()
    predicted = at_stored_size(logits, shape, image_size=32, fit=fit).numpy()
    assert (predicted == mask).mean() > 0.97
    assert ((predicted == 1) & (mask == 1)).sum() > 0.85 * mask.sum()


def test_what_a_crop_leaves_out_gets_what_is_nearest_and_counts() -> None:
    logits = torch.zeros(2, 8, 8)
    logits[1, :, :4] = 1  # the left half of what is seen
    predicted = at_stored_size(logits, (8, 24), image_size=8, fit="crop").numpy()
    assert extent(24, 8, 8, "crop") == (-1, 0, 2, 1)
    assert predicted[:, :12].all() and not predicted[:, 12:].any()
    split: Any = SimpleNamespace(rows=np.array([0]))
    stored = problem([np.ones((8, 24), np.uint8)], fit="crop")
    assert confusions(stored, split, [logits[None]], image_size=8).sum() == 8 * 24


def test_images_of_any_size_are_counted_in_the_splits_order() -> None:
    stored = [masks(1, [0, 1, IGNORE], size=size, seed=size)[0][: size - 3] for size in (9, 30, 14)]
    split: Any = SimpleNamespace(rows=np.array([2, 0, 1]))
    logits = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = confusions(problem(stored), split, logits.split(2), image_size=16)
    for counted, row, one in zip(found, split.rows, logits):
        predicted = at_stored_size(one, stored[row].shape, image_size=16, fit="squash").numpy()
        np.testing.assert_array_equal(counted, confusion(predicted, stored[row], 2))


def test_logits_that_are_no_numbers_are_no_prediction() -> None:
    split: Any = SimpleNamespace(rows=np.array([0]))
    with pytest.raises(ValueError, match="diverged"):
        confusions(
            problem([masks(1, [0, 1])[0]]), split, [torch.full((1, 2, 4, 4), float("nan"))], image_size=16
        )


def test_interpolated_features_give_the_interpolated_logits() -> None:
    """The probe learns on features at pixels what the 1 × 1 convolution then gives after upsampling."""
    generator = torch.Generator().manual_seed(0)
    maps, targets = torch.randn(6, 5, 7, generator=generator), torch.arange(300) % 3
    pixels = np.random.default_rng(0).choice(20 * 20, 300, replace=False)
    features = interpolated(maps, pixels, 20)
    scaled = SampleSpan(features)
    solution = fit_logistic(scaled(features), targets, num_classes=3, weight_decay=0.1)
    weight, bias = scaled.unscaled(solution)
    logits = torch.einsum("chw,ck->khw", maps.double(), weight) + bias[:, None, None]
    full = F.interpolate(logits[None], size=(20, 20), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(
        full.flatten(1)[:, pixels].T, predict_logits(scaled(features), solution), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("balanced", [True, False])
def test_pixels_are_shared_out_over_classes_and_images(balanced: bool) -> None:
    held = np.array([[900, 10, 0], [3000, 0, 0], [100, 90, 0], [0, 0, 0]])
    quotas = share_out(held, 400, balanced=balanced, rng=np.random.default_rng(0))
    assert (quotas <= held).all() and quotas.sum() <= 400
    if balanced:
        assert (quotas[:, 1] == held[:, 1]).all(), "all of a rare class"
        assert 190 <= quotas[:, 0].sum() <= 200
    else:
        assert quotas[:, 1].sum() <= 12, "as rare as it is"
        assert quotas.sum() > 380
    assert quotas[1, 0] > quotas[0, 0] > quotas[2, 0], "larger stretches give more"
    everything = share_out(held, 10_000, balanced=False, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(everything, held)


@pytest.mark.parametrize("width", [8, 20, 64])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_semantic_fpn_answers_at_stride_4_and_teaches_all_it_has(name: str, width: int) -> None:
    net = create_backbone(Backbone(name=name), 48, seed=0).headless()
    model = SemanticFPN(net, num_classes=3, width=width).train()
    logits = model(torch.rand(2, 3, 48, 48))
    assert logits.shape == (2, 3, 12, 12)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    heads = [p for name, p in model.named_parameters() if "pyramid.net" not in name and p.ndim > 1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)
