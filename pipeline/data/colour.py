"""Colour operations in batches, each image with its own strength.

The semantics are those of torchvision's transforms on float images (``adjust_brightness`` and so on). Every
operation works on one image at a time in effect: its result does not depend on the rest of the batch, to
the bit. ``images`` are (B, 3, H, W) float in [0, 1]; strengths are (B,).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


def grayscale(images: torch.Tensor) -> torch.Tensor:
    """Luminance, (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is black, 1 changes nothing."""
    return (images * _broad(factor)).clamp(0, 1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is the image's mean grey, 1 changes nothing."""
    # A sum of whole numbers is the same in any order, so also whatever the number of images or threads.
    whole = (grayscale(images) * 65536).round().sum(dim=(1, 2, 3), dtype=torch.float64)
    mean = (whole / (65536 * images.shape[2] * images.shape[3])).float()
    return _blend(images, _broad(mean), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is grey, 1 changes nothing."""
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue by a share of the colour circle, -0.5 to 0.5."""
    red, green, blue = images.unbind(1)
    high, low = images.amax(dim=1), images.amin(dim=1)
    chroma = high - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sixths = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = torch.remainder(sixths + 6 * shift.reshape(-1, 1, 1), 6)
    channels = []
    for start in (5, 3, 1):  # red, green, blue: how far round the circle each begins to fade
        place = torch.remainder(sixths + start, 6)
        channels.append(high - chroma * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, dim=1)


def solarise(images: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Invert what is at or above the threshold."""
    return torch.where(images >= threshold, 1 - images, images)


def gaussian_weights(sigma: torch.Tensor, *, radius: int) -> torch.Tensor:
    """(B, 2 radius + 1): a Gaussian of (B,) ``sigma`` pixels at whole distances from the middle, of sum 1."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (distance / sigma.double().reshape(-1, 1)) ** 2)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, *, radius: int) -> torch.Tensor:
    """Blur with a Gaussian of ``sigma`` pixels, cut off at ``radius`` pixels; edges are reflected."""
    # Sums of shifted images, not a convolution: cuDNN and oneDNN pick another algorithm for another batch
    # size.
    weights = gaussian_weights(sigma, radius=radius)
    height, width = images.shape[2:]
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    rows = _broad(weights[:, 0]) * padded[..., :width]
    for i in range(1, 2 * radius + 1):
        rows.addcmul_(_broad(weights[:, i]), padded[..., i : i + width])
    columns = _broad(weights[:, 0]) * rows[:, :, :height]
    for i in range(1, 2 * radius + 1):
        columns.addcmul_(_broad(weights[:, i]), rows[:, :, i : i + height])
    return columns


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def colour_jitter(
    images: torch.Tensor, applies: np.ndarray, strengths: np.ndarray, order: np.ndarray
) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, in an order of each image's own.

    Args:
        images: changed in place where that saves a copy.
        applies: (B,) bool.
        strengths: (B, 4), three factors and the shift of the hue; a column of NaN leaves that operation out.
        order: (B, 4), a permutation of 0..3 an image.
    """
    used = [number for number in range(4) if not np.isnan(strengths[:, number]).any()]
    for place in range(4):
        for number in used:
            chosen = applies & (order[:, place] == number)
            images = apply_where(images, chosen, JITTER[number], strengths[:, number])
    return images


def apply_where(images: torch.Tensor, chosen: np.ndarray, operation, *strengths: np.ndarray) -> torch.Tensor:
    """Apply an operation to the images for which ``chosen`` (B,) is true; ``strengths`` are (B,) each."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return images
    values = [
        torch.from_numpy(s[rows].astype(np.float32)).to(images.device, non_blocking=True) for s in strengths
    ]
    if len(rows) == len(images):
        return operation(images, *values)
    where = torch.from_numpy(rows).to(images.device, non_blocking=True)
    changed = operation(images.index_select(0, where), *values)
    return images.index_copy_(0, where, changed)


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    share = _broad(factor)
    return (images * share + other * (1 - share)).clamp(0, 1)


def _broad(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1)
