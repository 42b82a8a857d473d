"""How fast a folder of images becomes shards, beside copying its bytes into tars with webdataset's writer.

    python -m benchmarks sharding [--images FOLDER] [--rounds N] [--small]

Copying looks at nothing. Ours decodes every image once, to find what cannot be read, what is there twice and
what is in two splits, and hashes bytes and pixels; with one process and with two. Between the two: copying
that decodes and hashes in the plainest way. A quarter of the images, too, with one process and with two, as
two take a while to start; and memory: what a process that shards a folder takes at most beyond its imports,
for all images and for the quarter.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import webdataset as wds
from PIL import Image

import shards
from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio
from benchmarks.pictures import write_folder

COUNT, WIDTH, HEIGHT = 4000, 512, 384
ONE, TWO = 0.9, 1.8  # of copying's speed; of one process's
PEAK = """
import sys
import PIL.Image, webdataset
import shards

def most():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

open("/proc/self/clear_refs", "w").write("5")
before = most()
shards.write(shards.FolderSource(sys.argv[1]), sys.argv[2])
print(most() - before)
"""


def copy(folder: Path, out: Path, *, looking: bool = False) -> None:
    """What webdataset's documentation does: a writer of tars, and every file's bytes into it."""
    with wds.ShardWriter(str(out / "%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
            data = path.read_bytes()
            if looking:
                pixels = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
                hashlib.sha256(data), hashlib.sha256(pixels)
            writer.write({"__key__": f"{number:06d}", "jpg": data, "cls": path.parent.name.encode()})


def write(folder: Path, out: Path, processes: int) -> None:
    shards.write(shards.FolderSource(folder), out, shards.ShardOptions(processes=processes))


def peak_megabytes(folder: Path, out: Path) -> float:
    """Of a process of its own that shards a folder."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(out)], capture_output=True, text=True, check=True
    )
    return float(ran.stdout)


def quarter(folder: Path, some: Path) -> Path:
    """Every fourth image of a folder, in another."""
    for path in sorted(folder.rglob("*.jpg"))[::4]:
        (some / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, some / path.parent.name)
    return some


def measure(folder: Path, scratch: Path, *, rounds: int) -> list[Figure]:
    out, some = scratch / "out", quarter(folder, scratch / "some")
    images, few = (sum(1 for _ in place.rglob("*.jpg")) for place in (folder, some))

    def fresh(make: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            make()

        return run

    seconds = in_turn(
        {
            "copying": fresh(lambda: copy(folder, out)),
            "copying, decoding, hashing": fresh(lambda: copy(folder, out, looking=True)),
            "one process": fresh(lambda: write(folder, out / "shards", 1)),
            "two processes": fresh(lambda: write(folder, out / "shards", 2)),
            "one process, a quarter": fresh(lambda: write(some, out / "shards", 1)),
            "two processes, a quarter": fresh(lambda: write(some, out / "shards", 2)),
        },
        rounds,
    )

    def times(of: str, over: str) -> float:
        return ratio(seconds[over], seconds[of])

    peaks = [peak_megabytes(place, scratch / f"peak-{place.name}") for place in (folder, some)]
    one, looking = "one process", "copying, decoding, hashing"
    return [
        *(
            Figure(
                f"sharding: {who}",
                (few if "quarter" in who else images) / statistics.median(took),
                "images/s",
            )
            for who, took in seconds.items()
        ),
        Figure(f"sharding: {one} over copying", times(one, "copying"), "x", at_least=ONE),
        Figure(f"sharding: {one} over {looking}", times(one, looking), "x"),
        Figure(
            f"sharding: two processes over one, {images} images",
            times("two processes", one),
            "x",
            at_least=TWO,
        ),
        Figure(
            f"sharding: two processes over one, {few} images",
            times("two processes, a quarter", "one process, a quarter"),
            "x",
        ),
        Figure(f"sharding: memory for {images} images", peaks[0], "MB"),
        Figure(f"sharding: memory for {few} images", peaks[1], "MB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, help="folder with a folder of JPEG images a class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few small images, one round, to try it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sharding-") as temporary:
        folder = given.images
        if folder is None:
            count, width, height = (60, 64, 48) if given.small else (COUNT, WIDTH, HEIGHT)
            folder = write_folder(Path(temporary) / "images", count, width=width, height=height)
        figures = measure(folder, Path(temporary), rounds=1 if given.small else given.rounds)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
