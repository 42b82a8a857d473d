"""Masked patch prediction: which patches a student does not see, and what it has to say of them.

Blocks of patches as in BEiT (Bao et al. 2021, arXiv 2106.08254); the loss is iBOT's (arXiv 2111.07832).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.methods.base import Progress, follow, slow_copy
from pipeline.methods.dino import Seen, cross_entropy, make_head
from pipeline.nets.backbone import Net
from pipeline.nets.heads import DinoHead
from pipeline.nets.last_block import LastBlock, check_maskable

ASPECT = 0.3  # of a block: the least; the greatest is its inverse
TRIES = 10  # blocks drawn for one place, before single patches fill up what is missing


class MaskedPatches(nn.Module):
    """The student's mask token, the loss on masked patches, its centre, and its own head if there is one.

    Args:
        net: a ViT.
        options: those of ``pipeline.methods.options.IbotOptions``.

    Raises:
        UserError: the net has no patch embeddings that could be masked.
    """

    centre: Tensor

    def __init__(self, net: Net, options: dict[str, Any]) -> None:
        super().__init__()
        check_maskable(net)
        self.options = options
        self.mask_token = nn.Parameter(torch.zeros(net.num_features))
        self.head: DinoHead | None = None
        self.teacher_head: DinoHead | None = None
        out_dim = options["out_dim"]
        if not options["shared_head"]:
            out_dim = options["patch_out_dim"]
            self.head = make_head(net.num_features, options, out_dim=out_dim, bn=options["head_bn"])
            self.teacher_head = slow_copy(self.head)
        self.register_buffer("centre", torch.zeros(out_dim))
        self._seen = Seen()

    def draw(self, count: int, *, grid: tuple[int, int]) -> Tensor:
        """Masks for so many crops of (height, width) patches: (count, height · width) bool, on the CPU."""
        options = self.options
        return block_masks(
            count,
            grid=grid,
            probability=options["mask_probability"],
            share=(options["mask_share_min"], options["mask_share_max"]),
        )

    def loss(
        self,
        student: LastBlock,
        teacher: LastBlock,
        masks: Tensor,
        *,
        heads: tuple[DinoHead, DinoHead],
        teacher_temperature: float,
        progress: Progress,
    ) -> Tensor:
        """Mean over crops of the mean over their masked patches of the cross-entropy; 0 where none is masked.

        The centre will move by all of the teacher's patches.

        Args:
            student: of the masked crops.
            teacher: of the same crops, whole.
            masks: (crops, N) bool, on the CPU.
            heads: the student's and the teacher's, of whole images; for patches where they share them.
        """
        assert student.normed is not None and teacher.normed is not None
        own, other = self.head or heads[0], self.teacher_head or heads[1]
        crop, place = masks.nonzero(as_tuple=True)
        weights = 1 / masks.sum(dim=1)[crop] / len(masks)
        device = student.normed.device
        crop, place, weights = crop.to(device), place.to(device), weights.to(device)
        with torch.no_grad():
            vectors = other.embed(teacher.normed.flatten(0, 1)).view(*masks.shape, -1)
            # The prototypes' scores are linear in these: no need for the scores of patches that are seen.
            self._seen.add(other.last_layer(vectors.mean(dim=(0, 1))).float(), progress)
            targets = other.last_layer(vectors[crop, place]).float()
        losses = cross_entropy(
            targets,
            own(student.normed[crop, place]).float(),
            centre=self.centre,
            student_temperature=self.options["student_temperature"],
            teacher_temperature=teacher_temperature,
        )
        return (losses * weights).sum()

    def after_step(self, momentum: float) -> None:
        """The teacher's own head follows the student's; the centre moves by the patches of the step."""
        if self.head is not None and self.teacher_head is not None:
            follow(self.teacher_head, self.head, momentum)
        self._seen.move(self.centre, self.options["centre_momentum"])


def block_masks(
    count: int, *, grid: tuple[int, int], probability: float, share: tuple[float, float]
) -> Tensor:
    """Masks of blocks of patches, from torch's random numbers.

    Args:
        count: images.
        grid: height and width.
        probability: share of the images that are masked; rounded to whole images, at least one.
        share: least and greatest part of an image's patches, drawn evenly for each; rounded to whole patches,
            at least one.

    Returns:
        (count, height · width) bool, on the CPU.
    """
    # One number of torch's, whose state a checkpoint holds, for many of NumPy's, which are drawn faster.
    rng = np.random.default_rng(int(torch.randint(2**62, ())))
    masks = np.zeros((count, *grid), dtype=bool)
    for image in rng.permutation(count)[: max(1, round(probability * count))]:
        _mask(masks[image], max(1, round(rng.uniform(*share) * grid[0] * grid[1])), rng)
    return torch.from_numpy(masks).flatten(1)


def _mask(mask: np.ndarray, wanted: int, rng: np.random.Generator) -> None:
    """Set exactly so many places of (H, W), in blocks as far as they fit."""
    height, width = mask.shape
    missing, tries = wanted, 0
    while missing and tries < TRIES:
        area = rng.uniform(min(4, missing), missing)
        ratio = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
        high, wide = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        tries += 1
        if high > height or wide > width:
            continue
        top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
        block = mask[top : top + high, left : left + wide]
        new = block.size - int(block.sum())
        if 0 < new <= missing:
            block[:] = True
            missing, tries = missing - new, 0
    seen = np.flatnonzero(~mask.ravel())
    mask.reshape(-1)[rng.permutation(seen)[:missing]] = True
