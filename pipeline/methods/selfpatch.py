"""SelfPatch on DINO: each patch also matches what its most similar neighbours say of it together.

Yun et al. 2022, arXiv 2206.07990. The ViT has no class token; an aggregation head of class attention makes
patch tokens one vector. For a whole crop, this vector goes into DINO's loss. For the neighbours of patch i
that the teacher finds most similar, without patch i itself, it gives the teacher's target t_i; the patch loss
is the mean of H(softmax((t_i − C)/τt), softmax(s_i/τs)), with s_i the student's scores of LN(token i) at the
same place of the same crop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.methods.base import Progress, cosine_momentum, follow, slow_copy
from pipeline.methods.chunked import chunked_mean
from pipeline.methods.dino import Dino, Seen, by_size, make_head
from pipeline.methods.neighbours import most_similar, window
from pipeline.nets.architectures import PLAIN_VIT
from pipeline.nets.backbone import Net
from pipeline.nets.class_attention import ClassAttention


class SelfPatch(Dino):
    """DINO's image loss plus a patch loss; the teacher's backbone, without the heads, is what gets exported.

    Raises:
        UserError: the backbone is no ViT with patch tokens alone, or a crop has too few patches.
    """

    patch_centre: Tensor

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        if len(nets) == 1:
            _check_backbone(*nets.values())
        super().__init__(nets, options, image_size=image_size, seed=seed)
        net, width = self.backbone, self.backbone.num_features
        heads = net.net.blocks[0].attn.num_heads
        with self.seeded("patch heads"):
            self.aggregate = ClassAttention(width, heads=heads, depth=options["aggregation_depth"])
            # Without batch normalisation: its statistics would be those of a chunk.
            self.patch_head = make_head(width, options, out_dim=options["patch_out_dim"], bn=False)
        self.teacher_aggregate = slow_copy(self.aggregate)
        self.teacher_patch_head = slow_copy(self.patch_head)
        self.register_buffer("patch_centre", torch.zeros(options["patch_out_dim"]))
        self._patches_seen = Seen()
        for size in {view.size for view in self.views}:
            _check_grid(net, size, least=3 if options["neighbours"] == "wrap" else 2)

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        crops = by_size(views)
        with torch.no_grad():
            shown = crops if self.options["patch_crops"] == "all" else by_size(views[:2])
            taught = [self.teacher.raw_tokens(images) for images in shown]
            whole = taught[0][: 2 * len(views[0])]
            targets = self.teacher_head(self.teacher_aggregate(whole)).float()
        learnt = [self.backbone.raw_tokens(images) for images in crops]
        vectors = torch.cat([self.aggregate(tokens) for tokens in learnt])
        image_loss, entropy = self.image_loss(self.student_head(vectors).float(), targets, progress)
        patch_loss, patch_entropy = self._patch_loss(learnt, taught, progress)
        return {
            "loss": image_loss + self.options["patch_weight"] * patch_loss,
            "image_loss": image_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "teacher_entropy": entropy,
            "patch_teacher_entropy": patch_entropy,
        }

    def after_backward(self, progress: Progress) -> None:
        super().after_backward(progress)
        self._freeze_last_layer(self.patch_head, progress)

    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        momentum = cosine_momentum(self.options["momentum"], progress)
        follow(self.teacher_aggregate, self.aggregate, momentum)
        follow(self.teacher_patch_head, self.patch_head, momentum)
        self._patches_seen.move(self.patch_centre, self.options["centre_momentum"])

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """The student's bottleneck of the whole image: (B, bottleneck)."""
        return {self.arch: self.student_head.embed(self.aggregate(self.backbone.raw_tokens(images)))}

    def _patch_loss(
        self, learnt: list[Tensor], taught: list[Tensor], progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """The loss over the patches of the taught crops, and the mean entropy of the teacher's targets.

        learnt, taught: the student's and the teacher's raw tokens, (crops · B, N, C) for each size of crop;
        the taught crops are the first of the learnt ones.
        """
        by_patch = self.options["patch_mean"] == "patches"
        weights = [len(tokens) * (tokens.shape[1] if by_patch else 1) for tokens in taught]
        outputs, entropy = torch.zeros_like(self.patch_centre), self.patch_centre.new_zeros(())
        losses = [
            weight / sum(weights) * self._crops_loss(own[: len(others)], others, outputs, entropy)
            for weight, own, others in zip(weights, learnt, taught)
        ]
        patches = sum(tokens.shape[:2].numel() for tokens in taught)
        self._patches_seen.add(outputs / patches, progress)
        return torch.stack(losses).sum(), entropy / patches

    def _crops_loss(self, learnt: Tensor, taught: Tensor, outputs: Tensor, entropy: Tensor) -> Tensor:
        """The mean cross-entropy over all patches of crops of one size.

        learnt, taught: (crops · B, N, C) raw tokens. The teacher's outputs (K,) and entropies () are added to
        ``outputs`` and ``entropy``.
        """
        options = self.options
        grid = window(math.isqrt(taught.shape[1]), options["neighbours"], device=taught.device)
        chosen, exists = most_similar(taught, *grid, count=options["top_k"])
        first = torch.arange(len(taught), device=taught.device) * taught.shape[1]
        chosen, exists = (chosen + first[:, None, None]).flatten(0, 1), exists.flatten(0, 1)
        pool, norm = taught.flatten(0, 1), self.backbone.final_norm()

        def piece(rows: Tensor, where: slice) -> Tensor:
            with torch.no_grad():
                together = self.teacher_aggregate(pool[chosen[where]], exists[where])
                targets = self.teacher_patch_head(together).float()
                outputs.add_(targets.sum(dim=0))
                targets = (targets - self.patch_centre) / options["patch_teacher_temperature"]
                teacher_log = targets.log_softmax(dim=1)
                teacher = teacher_log.exp()
                entropy.sub_((teacher * teacher_log).sum())
            scores = self.patch_head(norm(rows)).float()
            return -(teacher * (scores / options["patch_student_temperature"]).log_softmax(dim=1)).sum()

        learns = [*self.patch_head.parameters(), *norm.parameters()]
        return chunked_mean(piece, learnt.flatten(0, 1), learns, size=options["patch_chunk"])


def _check_backbone(net: Net) -> None:
    """Refuse what has no patch tokens of one grid, or pools something that SelfPatch does not train."""
    inner = net.net
    plain = all(hasattr(inner, name) for name in ("blocks", "norm", "fc_norm", "forward_intermediates"))
    if not plain or not hasattr(inner.blocks[0].attn, "num_heads"):
        raise UserError(
            f"backbone '{net.name}': selfpatch needs one grid of patch tokens: expected {PLAIN_VIT}"
        )
    if net.args.get("patch_drop_rate"):
        raise UserError(
            f"backbone '{net.name}': selfpatch compares patches with their neighbours and can drop none;"
            " set patch_drop_rate 0"
        )
    wrong = [name for name in ("cls_token", "attn_pool") if getattr(inner, name, None) is not None]
    if wrong:
        raise UserError(
            f"backbone '{net.name}': selfpatch trains patch tokens alone, and this net has a"
            f" {' and a '.join(wrong)}; give it args {{class_token: false, global_pool: avg}}"
        )


def _check_grid(net: Net, size: int, *, least: int) -> None:
    side = size // (net.patch_size or size)
    if side < least:
        raise UserError(
            f"backbone '{net.name}': crops of {size} pixels have {side} x {side} patches, and selfpatch with"
            f" these neighbours needs {least} x {least}; set image_size, local_size or a smaller patch"
        )
