"""The objects of a split's images: as stored, for judging, and as the views of training show them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.boxes import Placement, clip, masks_through, through
from pipeline.errors import UserError
from pipeline.evaluate.detection_metrics import Detections, Truth
from pipeline.evaluate.problem import Problem, Split
from pipeline.nets.detector import Target


class Objects:
    """The objects of some labelled images.

    Args:
        problem: whose index has ``boxes``.
        split: the images; an image's place in it is its number here.
        image_size: side S of the squares that stand for the images.
        masks: give masks too.

    Raises:
        UserError: masks are asked for, and an object has no outline.
    """

    def __init__(self, problem: Problem, split: Split, *, image_size: int, masks: bool) -> None:
        samples = problem.index.samples.iloc[split.rows]
        self.image_size, self.masks = image_size, masks
        self._sizes = list(zip(samples["width"].tolist(), samples["height"].tolist()))
        self._placements = [
            Placement.of(width, height, image_size, problem.settings.fit) for width, height in self._sizes
        ]
        self._stored = [problem.index.boxes(int(row)) for row in split.rows]
        for key, stored in zip(samples["key"], self._stored):
            if masks and len(stored.labels) and stored.masks(1, 1) is None:
                raise UserError(
                    f"detect_masks needs the outline of every object, but {key} has objects without one;"
                    " the protocol detect needs boxes only"
                )

    def targets(self, places: np.ndarray, views: np.ndarray, device: torch.device) -> list[Target]:
        """What a detector is to find in views of the images; crowds are not for training.

        Args:
            places: (B,) numbers of images.
            views: (B, 3, 3), the maps that the views were sampled with.
            device: where the targets are wanted.

        Returns:
            For each view what :meth:`pipeline.nets.detector.Detector.losses` takes.
        """
        targets = [self._target(int(place), view) for place, view in zip(places, views)]
        return [{name: value.to(device) for name, value in target.items()} for target in targets]

    def truth(self, place: int) -> Truth:
        """The objects of an image in its own pixels."""
        stored, (width, height) = self._stored[place], self._sizes[place]
        masks = self._drawn(place, height, width) if self.masks else None
        return Truth(stored.boxes, stored.labels, stored.crowd, stored.area, masks)

    def detected(self, place: int, found: Target) -> Detections:
        """What a detector found in the square of an image, in the image's own pixels."""
        found = {name: value.cpu() for name, value in found.items()}
        width, height = self._sizes[place]
        boxes = self._placements[place].back(found["boxes"].numpy()).clip(0, [width, height] * 2)
        within = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # and not in what pads the image
        boxes = boxes[within].astype(np.float32)
        masks = None
        if self.masks:
            masks = np.zeros((len(boxes), height, width), bool)
            for mask, box, chances in zip(masks, boxes, found["masks"][torch.from_numpy(within)]):
                _paint(mask, box, chances)
        return Detections(boxes, found["labels"].numpy()[within] - 1, found["scores"].numpy()[within], masks)

    def _target(self, place: int, view: np.ndarray) -> dict[str, Tensor]:
        stored, placement, size = self._stored[place], self._placements[place], self.image_size
        boxes, inside = clip(placement.into(stored.boxes), size)
        boxes, visible = clip(through(boxes, view, source=size, size=size), size)
        kept = np.flatnonzero(inside & visible & ~stored.crowd)
        target = {}
        if self.masks:
            masks = self._drawn(place, *placement.mask_size(*self._sizes[place]))[kept]
            masks = masks_through(placement.into_square(masks, size), view, size=size)
            drawn = masks.any(axis=(1, 2))  # of a thin object no pixel's centre may be left
            kept, target["masks"] = kept[drawn], torch.from_numpy(masks[drawn].astype(np.float32))
        target["boxes"] = torch.from_numpy(boxes[kept].astype(np.float32))
        target["labels"] = torch.from_numpy(stored.labels[kept] + 1)
        return target

    def _drawn(self, place: int, height: int, width: int) -> np.ndarray:
        masks = self._stored[place].masks(height, width)
        return np.zeros((0, height, width), bool) if masks is None else masks  # None: there is no object


def _paint(mask: np.ndarray, box: np.ndarray, chances: Tensor) -> None:
    """Set a mask's (H, W) pixels whose centres lie in a box, where (1, h, w) chances in it exceed a half."""
    first, last = np.ceil(box[:2] - 0.5).astype(int), np.ceil(box[2:] - 0.5).astype(int)
    if (first >= last).any():
        return
    across, down = (
        torch.from_numpy(2 * (np.arange(first[k], last[k]) + 0.5 - box[k]) / (box[k + 2] - box[k]) - 1)
        for k in (0, 1)
    )
    y, x = torch.meshgrid(down.float(), across.float(), indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None]
    drawn = F.grid_sample(chances[None], grid, padding_mode="border", align_corners=False)
    mask[first[1] : last[1], first[0] : last[0]] = drawn[0, 0].numpy() > 0.5
