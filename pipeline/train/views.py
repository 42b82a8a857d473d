"""From a batch of decoded images to the views a method asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.data.augment import Augment
from pipeline.data.draws import sample_keys
from pipeline.data.feed import Batch
from pipeline.data.recipes import RECIPES
from pipeline.methods.base import View


class Views:
    """Augments batches into views.

    Args:
        views: what the method wants, in order.
        seed: of the run.
        recipe: replaces the recipe of whole views, where given; small crops take the recipe of that name with
            ``_local`` behind it, or their own where there is none.
        channels_last: memory format of the views.
    """

    def __init__(
        self, views: Sequence[View], *, seed: int, recipe: str | None = None, channels_last: bool = True
    ) -> None:
        self.views = list(views)
        self.seed = seed
        whole = max((view.size for view in self.views), default=0)
        self.augment = [
            Augment(_recipe(view, recipe, small=view.size < whole), view.size) for view in self.views
        ]
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batch: Batch, count: int | None = None) -> list[torch.Tensor]:
        """(B, 3, size, size) float32 in [0, 1] for each view, or for the first ``count``."""
        views = []
        for number, augment in enumerate(self.augment[:count]):
            keys = sample_keys(batch.counters, seed=self.seed, view=number)
            view = augment(self._turned(batch.images, number), keys)
            views.append(view.contiguous(memory_format=self.format))
        return views

    def _turned(self, images: torch.Tensor, number: int) -> torch.Tensor:
        turn = self.views[number].turn
        return torch.rot90(images, turn, (2, 3)) if turn else images


def _recipe(view: View, given: str | None, *, small: bool) -> str:
    if given is None:
        return view.recipe
    if not small:
        return given
    local = f"{given}_local"
    return local if local in RECIPES else view.recipe
