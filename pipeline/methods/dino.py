"""DINO: a student matches, from small crops, what its own slow average says of the whole image.

Caron et al. 2021, arXiv 2104.14294. Two global and n local crops; the loss is the mean over teacher crop q
and student crop v ≠ q of the cross-entropy between softmax((t_q − C)/τt) and softmax(s_v/τs).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.methods.base import OneNet, Progress, View, cosine_momentum, follow, slow_copy
from pipeline.methods.collective import mean_over_ranks
from pipeline.nets.backbone import Net, evaluating
from pipeline.nets.heads import DinoHead

GLOBAL = {  # recipes of the two global crops, by option ``crops``
    "dino": ("dino_global_1", "dino_global_2"),
    "wide": ("wide_global_1", "wide_global_2"),
}


class MultiCrop(OneNet):
    """Base of the methods whose teacher sees two global crops, and whose student sees small ones too."""

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__(nets, options, image_size=image_size, seed=seed)
        net = self.backbone.headless()
        self.local_size = options["local_size"] or default_local_size(image_size, net.patch_size or 8)
        if options["n_local"]:
            check_crop_size(net, self.local_size, label=f"{type(self).__name__.lower()}'s local crops")

    @property
    def views(self) -> list[View]:
        whole = [View(recipe, self.image_size) for recipe in GLOBAL[self.options["crops"]]]
        return whole + [View("dino_local", self.local_size)] * self.options["n_local"]

    def teacher_temperature(self, progress: Progress) -> float:
        """Linear from the first to the final temperature over the warm-up, then constant."""
        start, end = self.options["teacher_temperature_start"], self.options["teacher_temperature"]
        warmup = self.options["teacher_warmup_epochs"]
        return end if progress.epoch >= warmup else start + (end - start) * progress.epoch / warmup

    def _freeze_last_layer(self, head: DinoHead, progress: Progress) -> None:
        if progress.epoch < self.options["freeze_last_layer_epochs"]:
            for parameter in head.last_layer.parameters():
                parameter.grad = None


class Dino(MultiCrop):
    """Self-distillation with no labels, for a CNN or a ViT; the teacher is what gets exported."""

    centre: Tensor

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__(nets, options, image_size=image_size, seed=seed)
        net = self.backbone
        with self.seeded("head"):
            self.student_head = make_head(
                net.num_features, options, out_dim=options["out_dim"], bn=options["head_bn"]
            )
        self.teacher = slow_copy(net)
        self.teacher_head = slow_copy(self.student_head)
        self.register_buffer("centre", torch.zeros(options["out_dim"]))
        self._seen = Seen()

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = self.teacher_head(self.teacher.features(torch.cat(views[:2]))).float()
        features = torch.cat([self.backbone.features(batch) for batch in by_size(views)])
        loss, entropy = self.image_loss(self.student_head(features).float(), targets, progress)
        return {"loss": loss, "teacher_entropy": entropy}

    def image_loss(self, scores: Tensor, targets: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """The loss and the teacher's entropy; the centre will move by these targets.

        scores: (views · B, K) float32, the student's; targets: (2 · B, K) float32, the teacher's.
        """
        self._seen.add(targets.mean(dim=0), progress)
        return distillation_loss(
            scores.view(-1, len(targets) // 2, scores.shape[1]),
            targets.view(2, -1, targets.shape[1]),
            centre=self.centre,
            student_temperature=self.options["student_temperature"],
            teacher_temperature=self.teacher_temperature(progress),
        )

    def after_backward(self, progress: Progress) -> None:
        self._freeze_last_layer(self.student_head, progress)

    def after_step(self, progress: Progress) -> None:
        momentum = cosine_momentum(self.options["momentum"], progress)
        follow(self.teacher, self.backbone, momentum)
        follow(self.teacher_head, self.student_head, momentum)
        self._seen.move(self.centre, self.options["centre_momentum"])

    def exported(self) -> dict[str, Net]:
        return {self.arch: self.teacher}

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """The student's bottleneck, which the prototypes' scores are linear in: (B, bottleneck)."""
        return {self.arch: self.student_head.embed(self.backbone.features(images))}


class Seen:
    """The teacher's mean outputs in the micro-batches of one step, by which its centre moves after the step.

    A step that is not taken, because its loss was not finite, leaves nothing behind.
    """

    def __init__(self) -> None:
        self.step = -1
        self.means: list[Tensor] = []

    def add(self, mean: Tensor, progress: Progress) -> None:
        """mean: (K,), of one micro-batch."""
        if progress.step != self.step:
            self.step, self.means = progress.step, []
        self.means.append(mean)

    def move(self, centre: Tensor, momentum: float) -> None:
        """centre ← momentum · centre + (1 − momentum) · mean over micro-batches and ranks. (K,), in place."""
        if self.means:
            centre.lerp_(mean_over_ranks(torch.stack(self.means).mean(dim=0)), 1 - momentum)
            self.means = []


def make_head(in_dim: int, options: dict[str, Any], *, out_dim: int, bn: bool) -> DinoHead:
    """A head as DINO's options want it, with ``out_dim`` prototypes."""
    return DinoHead(
        in_dim,
        hidden=options["hidden"],
        bottleneck=options["bottleneck"],
        out_dim=out_dim,
        layers=options["head_layers"],
        bn=bn,
        norm_last_layer=options["norm_last_layer"],
    )


def by_size(views: list[Tensor]) -> list[Tensor]:
    """Views of one size that follow each other as one batch each, so that they go through a net together."""
    return [torch.cat(list(group)) for _, group in itertools.groupby(views, key=lambda view: view.shape)]


def distillation_loss(
    scores: Tensor, targets: Tensor, *, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean over pairs (teacher view q, student view v ≠ q) and over the batch of the cross-entropy.

    Args:
        scores: (V, B, K) float32, the student's, the teacher's views first.
        targets: (Q, B, K) float32, the teacher's, without gradient.
        centre: (K,)

    Returns:
        The loss, and the mean entropy of the teacher's softened outputs (log K when they are uniform, 0 when
        they are one-hot: either, for long, is a collapse).
    """
    with torch.autocast(scores.device.type, enabled=False):
        teacher_log = F.log_softmax((targets - centre) / teacher_temperature, dim=-1)
        teacher = teacher_log.exp()
        student_log = F.log_softmax(scores / student_temperature, dim=-1)
        others = student_log.sum(dim=0) - student_log[: len(targets)]  # for each q: over all v ≠ q
        pairs = len(targets) * (len(scores) - 1)
        loss = -(teacher * others).sum(dim=-1).mean(dim=1).sum() / pairs
        return loss, -(teacher * teacher_log).sum(dim=-1).mean().detach()


def cross_entropy(
    targets: Tensor, scores: Tensor, *, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """H(softmax((t − C)/τt), softmax(s/τs)) of each row: (N, K) float32 each and (K,) → (N,)."""
    with torch.autocast(scores.device.type, enabled=False):
        teacher = F.softmax((targets - centre) / teacher_temperature, dim=-1)
        return -(teacher * F.log_softmax(scores / student_temperature, dim=-1)).sum(dim=-1)


def default_local_size(image_size: int, grid: int) -> int:
    """3/7 of the image (96 of 224 pixels), as the nearest multiple of the patch size."""
    return max(1, round(image_size * 3 / 7 / grid)) * grid


def check_crop_size(net: Net, size: int, *, label: str) -> None:
    """Refuse a size of small crops that a backbone cannot take, or that is not small.

    Raises:
        UserError: names the backbone and what the crops are.
    """
    if size >= net.image_size:
        raise UserError(
            f"{label} of {size} pixels are not smaller than the images of {net.image_size}: set a smaller"
            " local_size, or n_local 0"
        )
    try:
        with torch.no_grad(), evaluating(net):
            net.features(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"backbone '{net.name}' cannot take {label} of {size} pixels "
            f"({str(error).splitlines()[0][:120]}); set local_size, or n_local 0"
        ) from None
