"""How well altered copies are found among images, and at what cost.

    python -m benchmarks copies [--images FOLDER ...] [--seed N]

1,600 images and 400 altered copies of 400 of them, 50 a kind of alteration: synthetic images of one kind (a
shape that all share, with variations), or those of folders, scaled by ``--pixels``. Recall is over the copies
of a kind; precision over all pairs found, where the pairs that a folder has of itself count as wrong.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from shards import codec, duplicates
from shards.annotate import Entry
from shards.sources import Sample

Alter = Callable[[Image.Image, random.Random], Image.Image]
TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, rng: random.Random, least: float, most: float) -> Image.Image:
    """A window anywhere in the image, of a width and a height of so much of it."""
    width, height = (round(side * rng.uniform(least, most)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def several(image: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrored, cropped, of other contrast and brightness, scaled and recompressed."""
    image = cropped(ImageOps.mirror(image), rng, 0.9, 0.97)
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.8, 1.2))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))
    return recompressed(scaled(image, 0.75), rng.randint(50, 90))


KINDS: dict[str, Alter] = {
    "mirrored": lambda image, rng: rng.choice((ImageOps.mirror, ImageOps.flip))(image),
    "turned": lambda image, rng: image.transpose(rng.choice(TURNS)),
    "cropped to 92-98 % a side": lambda image, rng: cropped(image, rng, 0.92, 0.98),
    "cropped to 85-92 % a side": lambda image, rng: cropped(image, rng, 0.85, 0.92),
    "cropped, scaled back": lambda image, rng: cropped(image, rng, 0.85, 0.95).resize(image.size),
    "scaled to 50-150 %": lambda image, rng: scaled(image, rng.uniform(0.5, 1.5)),
    "recompressed": lambda image, rng: recompressed(image, rng.randint(30, 80)),
    "several at once": several,
}


def synthetic(count: int, rng: np.random.Generator, side: int = 160) -> list[Image.Image]:
    """Images of one kind: coarse shapes that they have in common, finer ones of their own, and noise."""

    def field(cells: int) -> np.ndarray:
        small = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
        return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))

    common = 40 * field(4)
    images = []
    for _ in range(count):
        grey = 128 + common + 10 * field(6) + 10 * field(14) + 6 * field(40) + rng.normal(0, 3, (side, side))
        images.append(Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB"))
    return images


def with_copies(
    images: Sequence[Image.Image], copies: int, rng: random.Random
) -> tuple[list[Image.Image], dict[tuple[int, int], str]]:
    """The images and, after them, altered copies of some of them; which pairs they are, and their kind."""
    each = copies // len(KINDS)
    chosen = rng.sample(range(len(images)), each * len(KINDS))
    everything, truth = list(images), {}
    for place, (kind, alter) in enumerate(KINDS.items()):
        for source in chosen[place * each : (place + 1) * each]:
            truth[source, len(everything)] = kind
            everything.append(alter(images[source], rng))
    return everything, truth


def entries_of(images: Sequence[Image.Image]) -> list[Entry]:
    """As the first pass of sharding has them."""
    entries = []
    for number, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, "PNG")
        entries.append(
            Entry(Sample(f"{number}.png", None), codec.inspect(file.getvalue(), rules=codec.Rules()), "")
        )
    return entries


def found_pairs(entries: Sequence[Entry]) -> set[tuple[int, int]]:
    """Numbers of the images that are found to be copies, the lesser first."""
    pairs = duplicates.find(entries)
    numbers = [sorted(int(one.path.split(".")[0]) for one in (pair.first, pair.second)) for pair in pairs]
    return {(first, second) for first, second in numbers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", nargs="+", type=Path, help="folders of images; default: synthetic ones")
    parser.add_argument("--pixels", type=int, help="scale the short sides of the folder's images to this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.images:
        files = sorted(
            path for top in args.images for path in top.rglob("*") if path.suffix.lower() in codec.SUFFIXES
        )
        images = [Image.open(path).convert("RGB") for path in rng.sample(files, min(1600, len(files)))]
        if args.pixels:
            images = [scaled(image, args.pixels / min(image.size)) for image in images]
    else:
        images = synthetic(1600, np.random.default_rng(args.seed))
    everything, truth = with_copies(images, min(400, len(images) // 4), rng)
    entries = entries_of(everything)
    start = time.perf_counter()
    found = found_pairs(entries)
    spent = time.perf_counter() - start
    print(f"{len(everything)} images, {len(truth)} copies: {spent / len(everything) * 1e3:.2f} ms an image")
    for kind in KINDS:
        mine = [pair for pair, name in truth.items() if name == kind]
        print(f"  {kind:26} recall {np.mean([pair in found for pair in mine]):.3f} of {len(mine)}")
    print(f"  precision {len(found & set(truth)) / max(1, len(found)):.3f} of {len(found)} pairs")


if __name__ == "__main__":
    main()
