"""iBOT: DINO, and a student that must say of patches it does not see what its teacher says of them.

Zhou et al. 2021, arXiv 2111.07832. The student's global crops lose blocks of patches to a learnt token; of
each lost patch i the loss is H(softmax((t_i − C')/τt), softmax(s_i/τs)), with the teacher's t_i of the whole
crop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.methods.base import Progress, cosine_momentum
from pipeline.methods.dino import Dino, by_size
from pipeline.methods.masking import MaskedPatches
from pipeline.nets.backbone import Net
from pipeline.nets.last_block import last_block


class Ibot(Dino):
    """DINO's loss, on masked crops, plus the loss on masked patches; for a ViT.

    Raises:
        UserError: the backbone has no patch embeddings that could be masked.
    """

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__(nets, options, image_size=image_size, seed=seed)
        with self.seeded("patches"):
            self.patches = MaskedPatches(self.backbone, options)

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        whole = torch.cat(views[:2])
        with torch.no_grad():
            taught = last_block(self.teacher, whole)
            targets = self.teacher_head(taught.features).float()
        masks = self.patches.draw(len(whole), grid=(taught.height, taught.width))
        learnt = last_block(self.backbone, whole, masks=masks, mask_token=self.patches.mask_token)
        features = [learnt.features, *(self.backbone.features(batch) for batch in by_size(views[2:]))]
        scores = self.student_head(torch.cat(features)).float()
        image_loss, entropy = self.image_loss(scores, targets, progress)
        patch_loss = self.patches.loss(
            learnt,
            taught,
            masks,
            heads=(self.student_head, self.teacher_head),
            teacher_temperature=self.teacher_temperature(progress),
            progress=progress,
        )
        return {
            "loss": image_loss + self.options["patch_weight"] * patch_loss,
            "image_loss": image_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "teacher_entropy": entropy,
        }

    def after_backward(self, progress: Progress) -> None:
        super().after_backward(progress)
        if self.patches.head is not None:
            self._freeze_last_layer(self.patches.head, progress)

    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        self.patches.after_step(cosine_momentum(self.options["momentum"], progress))
