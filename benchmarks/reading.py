"""How fast images come as squares of one size, beside torchvision's and webdataset's usual ways.

    python -m benchmarks reading [--images FOLDER] [--size 224] [--workers 2] [--rounds N] [--small]

Every image once, in batches of 64, as uint8: torchvision's ImageFolder of the source files and a DataLoader,
webdataset's pipeline and loader on our tars, and an ImageSet on the same tars, with as many workers each
(processes there, threads here); then an ImageSet that has all in its cache, and one that keeps them on disk.
Starting the workers counts. The files, that of the disk cache too, are in the system's memory. FOLDER has a
folder a class; without it, made-up photographs of two sizes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import shards
from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio
from benchmarks.pictures import write_folder
from pipeline.data.disk_cache import FOLDER_VARIABLE
from pipeline.data.images import ImageSet
from shards import FolderSource, ShardOptions

BATCH = 64
SIZES = ((512, 384), (1024, 768))
COUNT = 512
COLD, CACHED = 1.5, 20.0  # times as fast as either


def drain(batches: Iterable, expected: int) -> None:
    seen = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        seen += len(images)
    assert seen == expected, f"{seen} images of {expected}"


def measure(name: str, folder: Path, scratch: Path, *, size: int, workers: int, rounds: int) -> list[Figure]:
    """Images a second of each, and how many times as fast ours are."""
    index = shards.write(FolderSource(folder), scratch, ShardOptions(shard_samples=128))
    rows = np.arange(len(index.samples))
    orders = np.split(np.arange(len(rows)), range(BATCH, len(rows), BATCH))
    transform = v2.Compose([v2.Resize((size, size), antialias=True), v2.PILToTensor()])

    def torchvision() -> None:
        files = DataLoader(ImageFolder(str(folder), transform), BATCH, num_workers=workers)
        drain(files, len(rows))

    def webdataset() -> None:
        urls = sorted(str(path) for path in index.folder.glob("*.tar"))
        samples = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg;png;webp")
        whole = samples.map_tuple(lambda image: transform(image.convert("RGB"))).batched(BATCH)
        drain(wds.WebLoader(whole, batch_size=None, num_workers=workers), len(rows))

    def cold() -> None:
        images = ImageSet(index, rows, image_size=size, cache="none", workers=workers)
        drain(images.batches(orders), len(rows))

    kept = ImageSet(index, rows, image_size=size, cache="ram", workers=workers)
    on_disk = ImageSet(index, rows, image_size=size, cache="disk", workers=workers)
    alternatives = {
        "torchvision": torchvision,
        "webdataset": webdataset,
        "cold": cold,
        "cache": lambda: drain(kept.batches(orders), len(rows)),
        "disk": lambda: drain(on_disk.batches(orders), len(rows)),
    }
    seconds = in_turn(alternatives, rounds)
    speeds = {who: len(rows) / statistics.median(times) for who, times in seconds.items()}
    figures = [Figure(f"reading {name}: {who}", speed, "images/s") for who, speed in speeds.items()]
    for mine, aim in (("cold", COLD), ("cache", CACHED), ("disk", None)):
        for peer in ("torchvision", "webdataset"):
            times = ratio(seconds[peer], seconds[mine])
            figures.append(Figure(f"reading {name}: {mine} over {peer}", times, "x", at_least=aim))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, help="folder with a folder of images a class")
    parser.add_argument("--size", type=int, default=224, help="side of the squares in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a few small images, one round, to try it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    with tempfile.TemporaryDirectory(prefix="reading-") as temporary:
        os.environ[FOLDER_VARIABLE] = str(Path(temporary) / "squares")
        places = {}
        if given.images:
            places[f"{given.images.name} at {given.size} px"] = given.images
        else:
            for width, height in [(96, 64)] if given.small else SIZES:
                folder = Path(temporary) / f"{width}x{height}"
                write_folder(folder, 128 if given.small else COUNT, width=width, height=height)
                places[f"{width}x{height} at {given.size} px"] = folder
        for name, folder in places.items():
            figures += measure(
                name,
                folder,
                Path(temporary) / "shards" / name.replace(" ", "-"),
                size=32 if given.small else given.size,
                workers=given.workers,
                rounds=1 if given.small else given.rounds,
            )
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
