"""HSSL: a base model learns from an auxiliary head of another architecture that stands on its own last block.

Li et al. 2023, arXiv 2310.05108. The head A takes the base's raw patch tokens, or feature map, and learns
with it; what the slow teacher's head says is the target of both: L = ½·[ℓ(b, sg a') + ℓ(a, sg a')], where ℓ
is the loss of a host method. Nothing is detached on the student's side: A's loss reaches the base too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.methods.base import Progress, View, cosine_momentum, follow, slow_copy
from pipeline.methods.collective import gather
from pipeline.methods.dino import MultiCrop, Seen, by_size, distillation_loss
from pipeline.methods.losses import agreement
from pipeline.methods.masking import MaskedPatches
from pipeline.methods.towers import Towers
from pipeline.nets.backbone import Net
from pipeline.nets.last_block import LastBlock

HOMOGENEOUS = {"cnn": "resnet", "vit": "vit"}  # the control: a head of the base's own kind


class Hssl(MultiCrop):
    """One base with one auxiliary head; a subclass may put several side by side, whose losses are averaged.

    With hosts ``dino`` and ``ibot`` the teacher's base is exported, with ``simclr`` and ``cass`` the
    student's.

    Raises:
        UserError: the head is not named, or the net lacks what the options ask for.
    """

    centres: Tensor

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__(nets, options, image_size=image_size, seed=seed)
        self.kinds = self._kinds()
        self.has_teacher = options["host"] != "cass"
        with self.seeded("towers"):
            self.towers = Towers(self.backbone, self.kinds, options)
        self.patches: MaskedPatches | None = None
        if options["host"] == "ibot":
            with self.seeded("patches"):
                self.patches = MaskedPatches(self.backbone, options)
        if self.has_teacher:
            self.teacher = slow_copy(self.backbone)
            self.teacher_towers = slow_copy(self.towers)
        if self.towers.has_prototypes:
            self.register_buffer("centres", torch.zeros(len(self.kinds), options["out_dim"]))
            self._seen = Seen()

    def _kinds(self) -> list[str]:
        head = self.options["head"]
        if head == "search":
            raise UserError("hssl: head 'search' stands for the winner of a search: name a head here")
        return [HOMOGENEOUS[self.arch] if head == "homogeneous" else head]

    @property
    def views(self) -> list[View]:
        return super().views if self.towers.has_prototypes else [View("simclr", self.image_size)] * 2

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        whole = torch.cat(views[:2])
        masks = None if self.patches is None else self.patches.draw(len(whole), grid=self.towers.grid)
        learnt = self._learn(views, masks)
        base = torch.cat([self.towers.base(one) for one in learnt])
        parts = [self.towers.auxiliary(one) for one in learnt]
        own = {kind: torch.cat([part[kind] for part in parts]) for kind in self.kinds}
        taught, targets = self._teach(whole, progress) if self.has_teacher else (None, own)
        rows, entropies = [], []
        for number, kind in enumerate(self.kinds):
            sides = (base, own[kind]) if self.has_teacher else (base,)
            losses, entropy = zip(*(self._loss(side, targets[kind], number, progress) for side in sides))
            rows.append(torch.stack(losses))
            entropies += [one for one in entropy if one is not None]
        table = torch.stack(rows)  # a row a head: what its output asks of the base, and of the head itself
        outputs = {"loss": table.mean()}
        if self.has_teacher:
            outputs |= dict(zip(("loss_base", "loss_auxiliary"), table.detach().mean(dim=0)))
        if len(self.kinds) > 1:
            outputs |= {f"loss_{kind}": row.mean() for kind, row in zip(self.kinds, table.detach())}
        if entropies:
            outputs["teacher_entropy"] = torch.stack(entropies).mean()
        if self.patches is not None and masks is not None and taught is not None:
            patch_loss = self.patches.loss(
                learnt[0],
                taught,
                masks,
                heads=(self.towers.image_head, self.teacher_towers.image_head),
                teacher_temperature=self.teacher_temperature(progress),
                progress=progress,
            )
            outputs["loss"] = outputs["loss"] + self.options["patch_weight"] * patch_loss
            outputs["patch_loss"] = patch_loss.detach()
        return outputs

    def after_backward(self, progress: Progress) -> None:
        if self.towers.has_prototypes:
            self._freeze_last_layer(self.towers.image_head, progress)
        if self.patches is not None and self.patches.head is not None:
            self._freeze_last_layer(self.patches.head, progress)

    def after_step(self, progress: Progress) -> None:
        momentum = cosine_momentum(self.options["momentum"], progress)
        if self.has_teacher:
            follow(self.teacher, self.backbone, momentum)
            follow(self.teacher_towers, self.towers, momentum)
        if self.towers.has_prototypes:
            self._seen.move(self.centres, self.options["centre_momentum"])
        if self.patches is not None:
            self.patches.after_step(momentum)

    def exported(self) -> dict[str, Net]:
        return {self.arch: self.teacher} if self.towers.has_prototypes else super().exported()

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """The student's base: what its scores are linear in, or what is compared. (B, bottleneck)"""
        return {self.arch: self.towers.embed(self.backbone.features(images))}

    def _learn(self, views: list[Tensor], masks: Tensor | None) -> list[LastBlock]:
        """The student's base on all views, one forward pass a size; the first two views masked."""
        if self.patches is None:
            return [self.towers.read(self.backbone, batch) for batch in by_size(views)]
        token = self.patches.mask_token
        whole = self.towers.read(self.backbone, torch.cat(views[:2]), masks=masks, mask_token=token)
        return [whole, *(self.towers.read(self.backbone, batch) for batch in by_size(views[2:]))]

    @torch.no_grad()
    def _teach(self, whole: Tensor, progress: Progress) -> tuple[LastBlock, dict[str, Tensor]]:
        """The teacher's base on the first two views, and what its heads say; the centres will move by it."""
        taught = self.towers.read(self.teacher, whole)
        targets = self.teacher_towers.auxiliary(taught)
        if self.towers.has_prototypes:
            self._seen.add(torch.stack([target.mean(dim=0) for target in targets.values()]), progress)
        return taught, targets

    def _loss(
        self, vectors: Tensor, targets: Tensor, number: int, progress: Progress
    ) -> tuple[Tensor, Tensor | None]:
        """The host's loss, and the teacher's entropy with prototypes.

        vectors: (V · B, D), of all views; targets: (2 · B, D), of head ``number``.
        """
        options = self.options
        match options["host"]:
            case "simclr" | "cass":
                name = "infonce" if options["host"] == "simclr" else options["agreement"]
                return _across(vectors, targets, partial(agreement, name, options=options)), None
            case _:
                return distillation_loss(
                    vectors.view(-1, len(targets) // 2, vectors.shape[1]),
                    targets.view(2, -1, targets.shape[1]),
                    centre=self.centres[number],
                    student_temperature=options["student_temperature"],
                    teacher_temperature=self.teacher_temperature(progress),
                )


def _across(one: Tensor, other: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean over both view orders of a loss between the batches of all ranks. (2 · B, D) each → scalar."""
    first, second, third, fourth = gather(*one.chunk(2), *other.chunk(2))
    return (compare(first, fourth) + compare(second, third)) / 2
