"""Streamed reading: one shard after the other through webdataset, from a folder or over HTTP."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.index import INDEX, SAMPLES, check_version, read_json, read_samples
from shards.sources import SPLITS
from shards.splits import order


@dataclass(frozen=True)
class Segment:
    """Samples ``start`` to ``stop`` of one shard."""

    shard: str
    start: int
    stop: int


def stream(
    folder: str | Path,
    split: str,
    *,
    rank: int,
    world_size: int,
    epoch: int,
    seed: int,
    shuffle_buffer: int = 1000,
) -> Iterator[tuple[int, bytes]]:
    """One rank's samples of one epoch, read from start to end of each shard.

    Shards come in an order drawn from (seed, epoch); their samples, one after the other, make a ring that is
    cut into ``world_size`` stretches of ceil(samples / world_size). So every rank yields the same number of
    samples whatever the number and size of the shards, every sample comes at least once in an epoch, and the
    ranks together repeat fewer than ``world_size`` samples. A rank reads only the shards its stretch
    touches. Within a stretch, samples pass through a shuffle buffer. Worker processes of a rank are ranks of
    their own here: pass ``rank * workers + worker`` and ``world_size * workers``.

    Args:
        folder: a dataset folder, or the URL of one (http, https, or any scheme that webdataset opens).
        split: train, val or test.
        rank: of this process, from 0.
        world_size: number of ranks.
        epoch: from 0; each has another order.
        seed: of the orders.
        shuffle_buffer: samples held for shuffling; 0 or 1 keeps the order.

    Yields:
        (row number in samples.csv, bytes of the image file)

    Raises:
        InputError: no dataset there, another format version, an empty split, a shard that is cut or gone.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank is {rank}, expected 0 to {world_size - 1}")
    if split not in SPLITS:
        raise InputError(f"there is no split '{split}' (expected train, val or test)")
    where = str(folder).rstrip("/")
    meta = check_version(_json(where, INDEX), where)
    sizes = {shard["name"]: shard["samples"] for shard in meta["shards"] if shard["split"] == split}
    if not sizes:
        raise InputError(f"{where} has no sample in the {split} split")
    file = io.BytesIO(_fetch(f"{where}/{SAMPLES}")) if _is_url(where) else Path(where) / SAMPLES
    table = read_samples(file)
    table = table[table["split"] == split]
    images = {key: (row, format) for row, key, format in zip(table.index, table["key"], table["format"])}
    names = sorted(sizes, key=lambda name: order(seed, f"{epoch}/{name}"))
    samples = _read(where, stretch([(name, sizes[name]) for name in names], rank, world_size), images)
    if shuffle_buffer > 1:
        from webdataset.filters import shuffle

        drawn = random.Random(f"{seed}/{epoch}/{rank}")
        samples = shuffle(shuffle_buffer, initial=shuffle_buffer, rng=drawn)(samples)
    yield from samples


def stretch(shards: list[tuple[str, int]], rank: int, world_size: int) -> list[Segment]:
    """The rank's stretch of the ring of all samples.

    Args:
        shards: (name, samples) in the order in which they follow each other.
        rank, world_size: which stretch of how many.

    Returns:
        Segments with ceil(samples / world_size) samples together.
    """
    total = sum(size for _, size in shards)
    position, left = rank * -(-total // world_size) % total, -(-total // world_size)
    segments: list[Segment] = []
    while left:
        begin = 0
        for name, size in shards:
            start, stop = position - begin, min(size, position - begin + left)
            if 0 <= start < stop:
                segments.append(Segment(name, start, stop))
                left -= stop - start
                position += stop - start
            begin += size
        position = 0
    return segments


def _read(
    where: str, segments: list[Segment], images: dict[str, tuple[int, str]]
) -> Iterator[tuple[int, bytes]]:
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for segment in segments:
        url = f"{where}/{segment.shard}"
        count = segment.start
        try:
            with gopen(url) as file:
                samples = group_by_keys(tar_file_expander([{"url": url, "stream": file}]))
                for sample in islice(samples, segment.start, segment.stop):
                    row, format = images[sample["__key__"]]
                    yield row, sample[format]
                    count += 1
        except KeyError as error:
            raise InputError(f"{url} holds a sample or file that {SAMPLES} does not know: {error}") from None
        except (OSError, ValueError, tarfile.TarError) as error:
            raise InputError(f"{url} cannot be read: {_line(error)}") from None
        if count < segment.stop:
            raise InputError(f"{url} ends after {count} samples, but {INDEX} counts {segment.stop} or more")


def _is_url(where: str) -> bool:
    return "://" in where


def _json(where: str, name: str) -> dict[str, Any]:
    if not _is_url(where):
        return read_json(Path(where) / name)
    data = _fetch(f"{where}/{name}")
    try:
        return json.loads(data)
    except ValueError:
        raise InputError(f"{where}/{name} is not valid JSON") from None


def _fetch(url: str) -> bytes:
    from webdataset.gopen import gopen

    try:
        with gopen(url) as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"{url} cannot be read: {_line(error)}") from None
    if not data:  # a failed transfer may show only in its length
        raise InputError(f"{url} cannot be read: it is missing or empty")
    return data


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
