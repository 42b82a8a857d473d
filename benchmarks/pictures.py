"""Made-up photographs: shapes, shading and grain, so that a JPEG is about as large as a real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

GRAIN = 6.0  # of 255
QUALITY = 90


def picture(width: int, height: int, *, seed: int) -> Image.Image:
    """An image that is a function of its seed."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    blobs = Image.fromarray((draws.random((height // 8, width // 8)) < 0.15).astype(np.uint8) * 255)
    edges = blobs.filter(ImageFilter.GaussianBlur(1)).resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(smooth, np.float32) * 0.7 + np.asarray(edges, np.float32)[..., None] * 0.3
    values += draws.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def write_folder(folder: Path, count: int, *, width: int, height: int, classes: int = 2) -> Path:
    """Write ``CLASS/NUMBER.jpg`` files; what is there already stays."""
    for number in range(count):
        path = folder / f"class{number % classes}" / f"{number:06d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(width, height, seed=number).save(path, quality=QUALITY)
    return folder
