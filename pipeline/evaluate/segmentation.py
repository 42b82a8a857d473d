"""What the segmentation protocols share: pixels counted, predicted at the stored size, and judged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.images import ImageSet
from pipeline.data.squares import Fit, extent
from pipeline.evaluate.problem import Prediction, Problem, Split
from pipeline.evaluate.segmentation_metrics import confusion, evaluate
from pipeline.evaluate.select import picked

COUNTED_AT_ONCE = 64  # masks


def pixel_counts(images: ImageSet, where: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (N, K): pixels of each class in each mask, as the training sees them.

    Args:
        images: a set with masks.
        where: (N,) positions in it.
        num_classes: K.
    """
    orders = [where[i : i + COUNTED_AT_ONCE] for i in range(0, len(where), COUNTED_AT_ONCE)]
    rows = [
        np.bincount(mask.flatten(), minlength=num_classes)[:num_classes]
        for batch in images.batches(orders)
        for mask in batch[:, 3].cpu().numpy()
    ]
    return np.stack(rows).astype(np.int64)


@torch.no_grad()
def confusions(problem: Problem, split: Split, logits: Iterable[Tensor], *, image_size: int) -> np.ndarray:
    """Count the pixels of every image by true and by predicted class, at the image's stored size.

    Args:
        logits: float (B, K, h, w), batch by batch in the split's order, on any device.
        image_size: side of the squares from which they come.

    Returns:
        uint32 (N, K, K): truth × predicted; pixels of no class are left out.

    Raises:
        ValueError: a logit is not a number.
    """
    counts: list[np.ndarray] = []
    for batch in logits:
        if not torch.isfinite(batch).all():
            raise ValueError("a predicted logit is not a number: the training has diverged")
        for one in batch:
            truth = problem.index.mask(int(split.rows[len(counts)]))
            predicted = at_stored_size(one, truth.shape, image_size=image_size, fit=problem.settings.fit)
            counts.append(confusion(predicted.cpu().numpy(), truth, problem.num_classes))
    return np.stack(counts)


def at_stored_size(logits: Tensor, shape: tuple[int, ...], *, image_size: int, fit: Fit) -> Tensor:
    """The predicted class of every pixel of a stored image.

    Logits are interpolated bilinearly at the pixels' places in the square that the net has seen. A pixel that
    ``crop`` has cut off gets what is predicted for the nearest one in view.

    Args:
        logits: (K, h, w) of the whole square.
        shape: height and width of the stored image.
        image_size: side of the square in pixels.
        fit: how the image became square.

    Returns:
        int64 (H, W).
    """
    height, width = shape
    left, top, right, bottom = extent(width, height, image_size, fit)
    places = [
        low + (high - low) * (torch.arange(count, device=logits.device) + 0.5) / count
        for low, high, count in ((left, right, width), (top, bottom, height))
    ]
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), dim=-1) * 2 - 1
    full = F.grid_sample(
        logits[None].float(), grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return full[0].max(dim=0).indices  # several times as fast as argmax


def score(problem: Problem, counts: np.ndarray) -> tuple[dict[str, float], float]:
    """Every metric of the validation split, and the one that ``select_by`` names.

    Raises:
        UserError: no pixel of the validation split has a class.
    """
    return picked(problem, evaluate(counts), lacking="pixels of any class")


def segmented(*, val: np.ndarray, test: np.ndarray, **more: Any) -> Prediction:
    """The prediction of a segmentation.

    Args:
        val, test: (N, K, K) pixel counts of the two splits' images.
        more: other fields of the prediction.
    """
    return Prediction(val=evaluate(val), test=evaluate(test), arrays={"confusion": test}, **more)
