"""The search for HSSL's head: candidates side by side on one base, ranked by how much they differ from it.

Li et al. 2023, arXiv 2310.05108: the more a head's architecture makes it differ from the base, the more there
is to learn from it. No label is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.methods.base import Progress, Search
from pipeline.methods.dino import cross_entropy
from pipeline.methods.hssl import Hssl
from pipeline.methods.similarity import LinearCka


class HsslSearch(Hssl, Search):
    """HSSL with every candidate head on one base, which learns from the mean of their losses."""

    def _kinds(self) -> list[str]:
        return list(self.options["candidates"])

    @torch.no_grad()
    def rank(self, batches: Iterable[Tensor], progress: Progress) -> list[dict[str, Any]]:
        """Compare each candidate with the base on held-out images, of which each is seen whole and as it is.

        Args:
            batches: (B, 3, image_size, image_size) in [0, 1].
            progress: where the training ended; the teacher's temperature is the one it had there.

        Returns:
            For each candidate ``candidate`` (its kind); ``discrepancy``, the mean over images of H(head's,
            base's) of the teacher's outputs, or of 2 − 2·cos for hosts without prototypes; ``cka_distance``,
            1 − linear CKA of the teacher's base features and its head's; ``loss``, what the student's base
            and head lose to the teacher's head. The greatest discrepancy comes first, of equal ones the
            greatest ``cka_distance``.

        Raises:
            UserError: no images.
        """
        net, towers = self.backbone, self.towers
        if self.has_teacher:
            net, towers = self.teacher, self.teacher_towers
        totals = {kind: torch.zeros(2, dtype=torch.float64) for kind in self.kinds}
        alike = {kind: LinearCka() for kind in self.kinds}
        temperature, count = self.teacher_temperature(progress), 0
        for images in batches:
            images = images.to(next(net.parameters()).device)
            taught, learnt = towers.read(net, images), self.towers.read(self.backbone, images)
            pooled = towers.pooled(taught)
            targets, own = towers.project(pooled), self.towers.auxiliary(learnt)
            base, learner = towers.base(taught), self.towers.base(learnt)
            for number, kind in enumerate(self.kinds):
                sides = torch.stack(
                    [
                        self._differ(targets[kind], side, number, temperature).sum()
                        for side in (base, learner, own[kind])
                    ]
                ).cpu()
                totals[kind] += torch.stack([sides[0], (sides[1] + sides[2]) / 2])
                alike[kind].add(taught.features, pooled[kind])
            count += len(images)
        if not count:
            raise UserError("hssl: the search has no images to rank its candidates by")
        ranking = [
            {
                "candidate": kind,
                "discrepancy": float(totals[kind][0] / count),
                "cka_distance": 1 - alike[kind].value(),
                "loss": float(totals[kind][1] / count),
            }
            for kind in self.kinds
        ]
        return sorted(ranking, key=lambda row: (-row["discrepancy"], -row["cka_distance"]))

    def _differ(self, target: Tensor, output: Tensor, number: int, temperature: float) -> Tensor:
        """(B,) float64, of (B, D) each; ``number`` of the candidate, the teacher's ``temperature``."""
        if not self.towers.has_prototypes:
            return 2 - 2 * F.cosine_similarity(target.double(), output.double(), dim=1)
        return cross_entropy(
            target.double(),
            output.double(),
            centre=self.centres[number],
            student_temperature=self.options["student_temperature"],
            teacher_temperature=temperature,
        )
