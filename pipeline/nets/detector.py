"""Faster R-CNN and Mask R-CNN on a backbone's pyramid, from torchvision's parts.

Ren et al. 2015 (arXiv 1506.01497), He et al. 2017 (arXiv 1703.06870), and for the pyramid Lin et al. 2017
(arXiv 1612.03144). torchvision's own ``GeneralizedRCNN`` resizes, normalises and pads images once more; here
they come as squares of one size, and the backbone normalises them.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.nets.backbone import Net
from pipeline.nets.pyramid import STRIDES, Pyramid

RATIOS = (0.5, 1.0, 2.0)  # height over width of an anchor
SCORE = 0.01  # least score of a detection
MOST = 100  # detections an image
LEVELS = ("0", "1", "2", "3")  # names of the maps that regions are cut from
FINEST = 56  # regions of a side below twice this come from the finest map, below four times from the next, …

Target = dict[str, Tensor]


class Anchors(nn.Module):
    """The boxes that proposals start from, of one size a level and three shapes a place.

    On large images the side is 8 strides, as Lin et al. have it: 32 to 512 pixels on 800. On smaller ones
    objects are smaller too, so that it shrinks with the image, yet no further than to 2 strides, below which
    objects could fall between two anchors. Levels whose anchors would not fit into the image have none.

    Args:
        image_size: side of the images in pixels.
        strides: of the levels.
    """

    _shapes: Tensor

    def __init__(self, image_size: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        factor = min(8.0, max(2.0, image_size / 100))
        self.strides = [stride for stride in strides if stride * factor <= image_size]
        self.sides = [stride * factor for stride in self.strides]
        root = torch.tensor(RATIOS).sqrt()
        half = torch.stack([-1 / root, -root, 1 / root, root], dim=1) / 2
        self.register_buffer("_shapes", half, persistent=False)

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """For each image (N, 4): all anchors, in the order of the levels, rows, columns and shapes."""
        found = []
        for level, stride, side in zip(maps, self.strides, self.sides):
            rows, columns = (
                (torch.arange(count, device=level.device) + 0.5) * stride for count in level.shape[-2:]
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            found.append((centres + side * self._shapes).reshape(-1, 4))
        anchors = torch.cat(found)
        return [anchors for _ in images.image_sizes]


class RegionPool(nn.Module):
    """Cuts regions out of the pyramid, each from the level that suits its size (He et al. 2017's RoIAlign).

    torchvision's own takes a cell's middle for its edge, half a cell beside what anchors and images mean. On
    large images that is little; on small ones it is as much as a tenth of an object.

    Args:
        size: cells along a side of what is cut out.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(
        self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Maps (B, C, h, w) by name and boxes (N_i, 4) of each image → (ΣN_i, C, size, size)"""
        images = [torch.full_like(found[:, :1], number) for number, found in enumerate(boxes)]
        regions = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)
        sides = (regions[:, 3:] - regions[:, 1:3]).prod(dim=1).sqrt()
        levels = torch.log2(sides / FINEST + 1e-6).floor().clamp(0, len(STRIDES) - 1)
        cut = regions.new_zeros(len(regions), maps[LEVELS[0]].shape[1], self.size, self.size)
        for number, (name, stride) in enumerate(zip(LEVELS, STRIDES)):
            here = torch.where(levels == number)[0]
            cut[here] = roi_align(
                maps[name], regions[here], self.size, spatial_scale=1 / stride, sampling_ratio=2, aligned=True
            )
        return cut


class Detector(nn.Module):
    """A backbone with feature pyramid, proposals and heads for boxes and, if asked, masks.

    Thresholds, samples and loss are torchvision's, but for two: detections count from a score of 0.01 on,
    since average precision never falls with more of them and detectors trained on few labels are rarely sure;
    and there are at most 1,000 proposals an image in training too, as in later implementations.

    Args:
        net: the backbone, without a classifier; its ``image_size`` is that of all images.
        num_classes: K, without a background.
        width: channels of the feature pyramid and of the mask head; the box head has four times as many.
        masks: predict masks too (Mask R-CNN).

    Raises:
        UserError: the backbone has no feature map.
    """

    def __init__(self, net: Net, *, num_classes: int, width: int = 256, masks: bool = False) -> None:
        super().__init__()
        self.image_size = net.image_size
        self.pyramid = Pyramid(net)
        self.fpn = FeaturePyramidNetwork(list(self.pyramid.channels), width, extra_blocks=LastLevelMaxPool())
        anchors = Anchors(net.image_size, (*STRIDES, 2 * STRIDES[-1]))
        self.rpn = RegionProposalNetwork(
            anchors,  # type: ignore[arg-type]
            RPNHead(width, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 500},
            nms_thresh=0.7,
        )
        self._proposing = len(anchors.strides)
        mask_parts = {}
        if masks:
            mask_parts = {
                "mask_roi_pool": RegionPool(14),
                "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
                "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
            }
        self.heads = RoIHeads(
            RegionPool(7),
            TwoMLPHead(width * 7 * 7, 4 * width),
            FastRCNNPredictor(4 * width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=256,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=SCORE,
            nms_thresh=0.5,
            detections_per_img=MOST,
            **mask_parts,
        )

    def maps(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """images: (B, 3, S, S) float in [0, 1] → the pyramid's maps, finest first: (B, width, h, w) each"""
        return self.fpn(OrderedDict(zip(LEVELS, self.pyramid(images))))

    def losses(self, maps: OrderedDict[str, Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """What training lowers the sum of.

        Args:
            maps: of a batch, float32.
            targets: for each image ``boxes`` float32 (M, 4) within it, ``labels`` int64 (M,) from 1 on, and
                for masks ``masks`` float32 (M, S, S).
        """
        targets = [target | _half_a_pixel_on(target) for target in targets]
        proposals, losses = self._propose(maps, len(targets), targets)
        _, more = self.heads(maps, proposals, self._sizes(len(targets)), targets)
        return losses | more

    def detections(self, maps: OrderedDict[str, Tensor]) -> list[Target]:
        """For each image ``boxes`` (D, 4), ``labels`` (D,) from 1 on, ``scores`` (D,) falling and, for masks,
        ``masks`` (D, 1, 28, 28): probabilities within the box."""
        count = len(maps[LEVELS[0]])
        proposals, _ = self._propose(maps, count, None)
        found, _ = self.heads(maps, proposals, self._sizes(count))
        return found

    def _propose(
        self, maps: OrderedDict[str, Tensor], count: int, targets: list[Target] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        levels = OrderedDict(list(maps.items())[: self._proposing])
        images = ImageList(maps[LEVELS[0]], self._sizes(count))  # of which only the sizes are looked at
        return self.rpn(images, levels, targets)

    def _sizes(self, count: int) -> list[tuple[int, int]]:
        return [(self.image_size, self.image_size)] * count


def _half_a_pixel_on(target: Target) -> Target:
    """The target's masks as they have to be for torchvision, which takes a pixel's middle for its edge."""
    if "masks" not in target:
        return {}
    size = target["masks"].shape[-1]
    shifted = F.avg_pool2d(target["masks"][:, None], 2, stride=1, padding=1)
    return {"masks": shifted[:, 0, :size, :size]}
