"""Colour operations in batches, each image with its own strength, in place.

The semantics are those of torchvision's transforms on float images (``adjust_brightness`` and so on). Every
operation works on one image at a time in effect: its result does not depend on the rest of the batch, to
the bit. ``images`` are (B, 3, H, W) float32 in [0, 1], are changed and returned; strengths are (B,).
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.data.chosen import put, rows_of, take
from pipeline.data.rows import sum_rows

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it
REACH = 6.0  # sigmas at which a blur is cut off


def grayscale(images: torch.Tensor) -> torch.Tensor:
    """Luminance, (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def make_grey(images: torch.Tensor) -> torch.Tensor:
    """Luminance in all three channels."""
    return images.copy_(grayscale(images))


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is black, 1 changes nothing."""
    return images.mul_(_broad(factor)).clamp_(0, 1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is the image's mean grey, 1 changes nothing."""
    # A sum of whole numbers is the same in any order, so also whatever the number of images or threads.
    whole = grayscale(images).mul_(65536).round_().sum(dim=(1, 2, 3), dtype=torch.float64)
    mean = (whole / (65536 * images.shape[2] * images.shape[3])).float()
    return _blend(images, _broad(mean), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is grey, 1 changes nothing."""
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue by a share of the colour circle, -0.5 to 0.5.

    Hues lie on a circle of six sixths, from -3 to 3 with red at 0. A channel is at its lowest within a sixth
    of the hue opposite to its own, at its highest from two sixths on, and linear in between. All is
    multiplied by the chroma, so that nothing is divided by it.
    """
    red, green, blue = images.split(1, dim=1)
    high = torch.maximum(red, green).clamp_min_(blue)
    low = torch.minimum(red, green).clamp_max_(blue)
    chroma = high - low
    # (high - red) + (green - low) + (blue - low) is how far it lies from red, towards green or towards blue.
    hue = (green + blue).sub_(red).add_(high).sub_(low, alpha=2).copysign_(green - blue)
    opposites = 2 * torch.arange(3, device=images.device) - 3  # of red, green and blue
    opposite = torch.remainder(opposites - 6 * shift.reshape(-1, 1) + 3, 6) - 3  # the same before the turn
    apart = torch.addcmul(hue, chroma, opposite[:, :, None, None], value=-1).abs_()
    beyond = apart.sub_(3 * chroma).abs_()  # 3 less the distance, the short way round
    return torch.clamp(torch.sub(high + chroma, beyond, out=beyond), low, high, out=images)


def solarise(images: torch.Tensor) -> torch.Tensor:
    """Invert what is at or above one half."""
    return torch.minimum(images, 1 - images, out=images)


def gaussian_weights(sigma: torch.Tensor, *, radius: int) -> torch.Tensor:
    """(B, 2 radius + 1): a Gaussian of (B,) ``sigma`` pixels at whole distances from the middle, of sum 1.

    At ``REACH`` sigmas it is cut off: less than 10^-8 of it remains there.
    """
    sigmas = torch.arange(-radius, radius + 1, device=sigma.device) / sigma.double().reshape(-1, 1)
    weights = torch.exp(-0.5 * sigmas**2) * (sigmas.abs() <= REACH)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def gaussian_blur(
    images: torch.Tensor, sigma: torch.Tensor, *, radius: int, reach: int | None = None
) -> torch.Tensor:
    """Blur with a Gaussian of ``sigma`` pixels, cut off at ``radius`` pixels; edges are reflected.

    ``reach``, of :func:`blur_reach`, saves the sums of what weighs nothing, and changes no bit.
    """
    reach = radius if reach is None else min(radius, reach)
    weights = gaussian_weights(sigma, radius=radius)[:, None, radius - reach : radius + reach + 1]
    distance = torch.arange(-reach, reach + 1, device=images.device)
    blurred = images
    for side in images.shape[2:]:
        last = side - 1
        places = torch.arange(side, device=images.device)[:, None] + distance
        reflected = last - (last - places.abs()).abs()
        blurred = sum_rows(blurred, reflected[None], weights).transpose(2, 3)
    return images.copy_(blurred)


def blur_reach(sigma: np.ndarray) -> int:
    """A radius that is enough for all of some blurs, in pixels."""
    return int(REACH * sigma.max(initial=0)) + 1


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def colour_jitter(
    images: torch.Tensor, applies: np.ndarray, strengths: np.ndarray, order: np.ndarray
) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, in an order of each image's own.

    Args:
        images: as for all.
        applies: (B,) bool.
        strengths: (B, 4), three factors and the shift of the hue; a column of NaN leaves that operation out.
        order: (B, 4), a permutation of 0..3 an image.
    """
    if not applies.any():
        return images
    used = np.flatnonzero(~np.isnan(strengths).any(axis=0))
    for numbers in np.where(applies[:, None], order, -1).T:
        for number in set(numbers.tolist()).intersection(used.tolist()):
            apply_where(images, numbers == number, JITTER[number], strengths[:, number])
    return images


def apply_where(images: torch.Tensor, chosen: np.ndarray, operation, *strengths: np.ndarray) -> torch.Tensor:
    """Apply an operation to the images for which ``chosen`` (B,) is true; ``strengths`` are (B,) each."""
    if not chosen.any():
        return images
    values = [
        torch.from_numpy(s[chosen].astype(np.float32)).to(images.device, non_blocking=True) for s in strengths
    ]
    rows = rows_of(chosen, images.device)
    changed = operation(take(images, rows), *values)
    return images if isinstance(rows, slice) else put(images, rows, changed)  # of a slice, changed in place


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    share = _broad(factor)
    return images.mul_(share).add_(other * (1 - share)).clamp_(0, 1)


def _broad(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1)
