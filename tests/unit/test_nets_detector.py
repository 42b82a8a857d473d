"""The detector's parts: anchors and regions lie where they should, on images of any size, empty ones too."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from detection_cases import BACKBONES
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from pipeline.nets.backbone import create_backbone
from pipeline.nets.detector import LEVELS, Anchors, Detector, RegionPool, _half_a_pixel_on
from pipeline.nets.pyramid import STRIDES
from pipeline.specs import Architecture

ALL_STRIDES = (*STRIDES, 64)


@pytest.mark.parametrize(
    ("size", "sides"),
    [(800, [32, 64, 128, 256, 512]), (224, [8.96, 17.92, 35.84, 71.68, 143.36]), (64, [8, 16, 32, 64])],
)
def test_anchors_shrink_with_the_image_down_to_two_strides(size: int, sides: list[float]) -> None:
    assert Anchors(size, ALL_STRIDES).sides == pytest.approx(sides)


def test_anchors_stand_about_the_middles_of_cells() -> None:
    anchors = Anchors(64, ALL_STRIDES)
    maps = [torch.zeros(2, 1, 64 // stride, 64 // stride) for stride in anchors.strides]
    first, second = anchors(ImageList(maps[0], [(64, 64)] * 2), maps)
    assert torch.equal(first, second) and first.shape == (3 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2), 4)
    centres, sides = (first[:, :2] + first[:, 2:]) / 2, first[:, 2:] - first[:, :2]
    assert centres[:4].tolist() == [[2, 2]] * 3 + [[6, 2]]
    assert centres[-1].tolist() == [48, 48]
    torch.testing.assert_close(sides[:3, 1] / sides[:3, 0], torch.tensor([0.5, 1, 2]))
    torch.testing.assert_close(sides.prod(dim=1)[[0, -1]].sqrt(), torch.tensor([8.0, 64.0]))


def test_regions_are_cut_where_they_are_from_the_level_of_their_size() -> None:
    size = 512

    def ramp(stride: int) -> Tensor:
        """Each cell holds the place of its middle in pixels, x and y, and its stride."""
        middle = (torch.arange(size // stride) + 0.5) * stride
        x, y = middle.expand(len(middle), -1), middle[:, None].expand(-1, len(middle))
        return torch.stack([x, y, torch.full_like(x, stride)])[None].repeat(2, 1, 1, 1)

    maps = OrderedDict((name, ramp(stride)) for name, stride in zip(LEVELS, STRIDES))
    boxes = torch.tensor([[40, 60, 75, 88], [40, 60, 180, 172], [40, 60, 320, 284], [40, 60, 495, 508.0]])
    cut = RegionPool(7)(maps, [boxes[:1], boxes[1:]], [(size, size)] * 2)
    assert cut[:, 2, 0, 0].tolist() == [4, 8, 16, 32]
    steps = (torch.arange(7) + 0.5) / 7
    for region, (left, top, right, bottom) in zip(cut, boxes):
        torch.testing.assert_close(region[0], (left + steps * (right - left)).expand(7, 7))
        torch.testing.assert_close(region[1], (top + steps * (bottom - top))[:, None].expand(7, 7))


def test_masks_for_training_lie_on_their_boxes() -> None:
    masks = torch.zeros(1, 32, 32)
    masks[:, 8:16, 10:20] = 1
    box = torch.tensor([[7.0, 5, 23, 19]])  # three pixels more on every side
    shifted = _half_a_pixel_on({"masks": masks})["masks"]
    target = project_masks_on_boxes(shifted, box, torch.zeros(1), 28)[0]
    torch.testing.assert_close(target, target.flip(0))
    torch.testing.assert_close(target, target.flip(1))
    assert target.max() == 1 and target.min() == 0
    assert _half_a_pixel_on({"masks": torch.zeros(0, 32, 32)})["masks"].shape == (0, 32, 32)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("arch", ["cnn", "vit"])
@pytest.mark.parametrize("size", [32, 40, 64])
def test_every_size_trains_and_finds_with_objects_and_without(
    size: int, arch: Architecture, masks: bool
) -> None:
    net = create_backbone(BACKBONES[arch], size, seed=0, arch=arch).headless()
    detector = Detector(net, num_classes=2, width=8, masks=masks)
    images = torch.rand(3, 3, size, size)
    box = torch.tensor([[4.0, 6, 20, 18]])
    targets = [
        {"boxes": box, "labels": torch.tensor([2])},
        {"boxes": box[:0], "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": box.repeat(2, 1) + 5, "labels": torch.tensor([1, 1])},
    ]
    for target in targets:
        target["masks"] = torch.ones(len(target["boxes"]), size, size)
    empty = [targets[1]] * 3
    for given in (targets, empty):
        losses = detector.losses(detector.maps(images), given)
        assert ("loss_mask" in losses) == masks
        total = torch.stack(list(losses.values())).sum()
        assert torch.isfinite(total)
        detector.zero_grad()
        total.backward()
        gradients = [p.grad.abs().sum() for p in detector.parameters() if p.grad is not None]
        assert torch.isfinite(torch.stack(gradients)).all()
    detector.eval()
    with torch.no_grad():
        found = detector.detections(detector.maps(images))
    assert len(found) == 3
    for one in found:
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= size).all()
        assert len(one["scores"]) <= 100 and (one["scores"].diff() <= 0).all()
        assert not masks or one["masks"].shape == (len(one["scores"]), 1, 28, 28)


def test_images_are_normalised_once_and_only_by_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = create_backbone(BACKBONES["cnn"], 64, seed=0, arch="cnn").headless()
    detector = Detector(net, num_classes=1, width=8)
    images, seen = torch.rand(2, 3, 64, 64), []
    monkeypatch.setattr(net, "normalise", lambda given: seen.append(given) or given)
    detector.eval()
    with torch.no_grad():
        detector.detections(detector.maps(images))
    assert len(seen) == 1 and seen[0] is images
