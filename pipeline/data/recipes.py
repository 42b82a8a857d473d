"""Augmentation recipes by name: what happens to a view, with which probability and how strongly.

:mod:`pipeline.data.augment` applies them. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.errors import UserError, nearest


@dataclass(frozen=True)
class Block:
    """Operations that happen together, with one probability.

    Attributes:
        p: probability of the block.
        jitter: brightness, contrast, saturation and hue, each the largest change (torchvision's arguments).
        perspective: largest distortion, as a share of half the side; 0 for none.
        perspective_p: probability of the perspective within the block.
        rotation: largest angle in degrees.
    """

    p: float
    jitter: tuple[float, float, float, float] = (0, 0, 0, 0)
    perspective: float = 0
    perspective_p: float = 1
    rotation: float = 0


@dataclass(frozen=True)
class Recipe:
    """One view's augmentation.

    Attributes:
        scale: area of the random resized crop, as shares of the image; None: the whole image.
        ratio: width over height of the crop.
        hflip, vflip, grayscale, solarise, blur: probabilities.
        blocks: colour jitter and warps.
        sigma: of the blur, in pixels; it is cut off at 5 % of the view's size, as in SimCLR.
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0
    vflip: float = 0
    blocks: tuple[Block, ...] = ()
    grayscale: float = 0
    blur: float = 0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0

    @property
    def warps(self) -> bool:
        """Whether points outside the image can come into view."""
        return any(block.perspective or block.rotation for block in self.blocks)


_SIMCLR_JITTER = Block(p=0.8, jitter=(0.8, 0.8, 0.8, 0.2))
_BYOL_JITTER = Block(p=0.8, jitter=(0.4, 0.4, 0.2, 0.1))
_GENTLE = Recipe(scale=(0.3, 1), hflip=0.5, blocks=(_BYOL_JITTER,), grayscale=0.1)
_DINO_GLOBAL = Recipe(scale=(0.4, 1), hflip=0.5, blocks=(_BYOL_JITTER,), grayscale=0.2)

RECIPES: dict[str, Recipe] = {
    # Nothing but a resize: evaluation, probes.
    "none": Recipe(),
    # Fine-tuning on few labels: mirror, shift and zoom a little.
    "light": Recipe(scale=(0.8, 1), ratio=(0.9, 1 / 0.9), hflip=0.5),
    # CASS, arXiv 2206.04170 and its code: colour jitter with a perspective, colour jitter with a rotation,
    # flips. torchvision's RandomPerspective has a probability of its own, one half.
    "cass": Recipe(
        hflip=0.3,
        vflip=0.3,
        blocks=(
            Block(p=0.3, jitter=(0.2, 0.2, 0.2, 0), perspective=0.2, perspective_p=0.5),
            Block(p=0.3, jitter=(0.2, 0.2, 0.2, 0), rotation=10),
        ),
    ),
    # SimCLR, arXiv 2002.05709, appendix A, strength 1.
    "simclr": Recipe(scale=(0.08, 1), hflip=0.5, blocks=(_SIMCLR_JITTER,), grayscale=0.2, blur=0.5),
    # BYOL, arXiv 2006.07733, table 6: its two views differ in blur and solarisation.
    "byol_1": Recipe(scale=(0.08, 1), hflip=0.5, blocks=(_BYOL_JITTER,), grayscale=0.2, blur=1.0),
    "byol_2": Recipe(
        scale=(0.08, 1), hflip=0.5, blocks=(_BYOL_JITTER,), grayscale=0.2, blur=0.1, solarise=0.2
    ),
    # DINO, arXiv 2104.14294 and its code: two global views of 40 % or more of the area, local ones of 5 %
    # to 40 %.
    "dino_global_1": replace(_DINO_GLOBAL, blur=1.0),
    "dino_global_2": replace(_DINO_GLOBAL, blur=0.1, solarise=0.2),
    "dino_local": replace(_DINO_GLOBAL, scale=(0.05, 0.4), blur=0.5),
    # iBOT without local views, arXiv 2111.07832, and HSSL, 2310.05108: of 14 % or more of the area.
    "wide_global_1": replace(_DINO_GLOBAL, scale=(0.14, 1), blur=1.0),
    "wide_global_2": replace(_DINO_GLOBAL, scale=(0.14, 1), blur=0.1, solarise=0.2),
    # Ours, for small images and short trainings: crops that show most of what is to be told apart, BYOL's
    # change of colours (half of SimCLR's and less), no blur.
    "gentle": _GENTLE,
    "gentle_local": replace(_GENTLE, scale=(0.1, 0.4)),
}
RECIPES["byol"] = RECIPES["byol_1"]


def find_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in RECIPES:
        known = ", ".join(sorted(RECIPES))
        raise UserError(f"no augmentation recipe is called '{name}'{nearest(name, RECIPES)} (known: {known})")
    return RECIPES[name]
