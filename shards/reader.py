"""Streamed reading: one shard after the other, from a folder or, through webdataset, over HTTP."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from shards.errors import InputError
from shards.files import MOST_BYTES, open_regular
from shards.index import INDEX, SAMPLES, check_index, parse_json, read_json, read_samples
from shards.sources import SPLITS
from shards.splits import order
from shards.tars import BLOCK, read_header

if TYPE_CHECKING:
    import pandas as pd

PIECE = 1 << 20  # bytes read at once


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
    if _is_url(where) and re.search(
        r"[^!#%&*+,./0-9:;=?@A-Z\[\]_a-z~-]", where
    ):  # webdataset gives it to a shell
        raise InputError(
            f"{where} is no URL (what is not a letter, a digit or one of -._~/ is written as %XX)"
        )
    meta = check_index(_json(where, INDEX), where)
    sizes = {shard["name"]: shard["samples"] for shard in meta["shards"] if shard["split"] == split}
    if not sizes:
        raise InputError(f"{where} has no sample in the {split} split")
    file = io.BytesIO(_fetch(f"{where}/{SAMPLES}")) if _is_url(where) else Path(where) / SAMPLES
    table = read_samples(file, meta, f"{where}/{SAMPLES}")
    names = sorted(sizes, key=lambda name: order(seed, f"{epoch}/{name}"))
    segments = stretch([(name, sizes[name]) for name in names], rank, world_size)
    samples = _read(where, segments, table[table["split"] == split])
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


def _read(where: str, segments: list[Segment], table: pd.DataFrame) -> Iterator[tuple[int, bytes]]:
    shards = dict(list(table.groupby("shard", sort=False)))
    for segment in segments:
        url = f"{where}/{segment.shard}"
        part = shards[segment.shard].iloc[segment.start : segment.stop]
        columns = (part["key"], part["format"], part["offset"].tolist(), part["length"].tolist())
        try:
            with _open(url) as file:
                position = 0
                for row, key, format, offset, length in zip(part.index.tolist(), *columns):
                    _skip(file, offset - BLOCK - position, url)
                    name, size = read_header(_take(file, BLOCK, url), url)
                    if (name, size) != (f"{key}.{format}", length):
                        expected = f"'{key}.{format}' of {length}"
                        raise InputError(f"{url} holds '{name}' of {size} bytes, {SAMPLES} has {expected}")
                    yield row, _take(file, length, url)
                    position = offset + length
        except OSError as error:
            raise InputError(f"{url} cannot be read: {error}") from None


def _skip(file: BinaryIO, number: int, url: str) -> None:
    """Read on by so many bytes (a pipe cannot seek)."""
    if number < 0:
        raise InputError(f"{url} holds samples in another order than {SAMPLES}")
    while number:
        number -= len(_take(file, min(number, PIECE), url))


def _take(file: BinaryIO, number: int, url: str) -> bytes:
    """So many bytes, read piecewise: memory grows with what comes, not with what is claimed."""
    data = bytearray()
    while len(data) < number:
        if not (piece := file.read(min(number - len(data), PIECE))):
            raise InputError(f"{url} is cut short")
        data += piece
    return bytes(data)


def _is_url(where: str) -> bool:
    return "://" in where


def _open(url: str) -> BinaryIO:
    from webdataset.gopen import gopen

    return gopen(url) if _is_url(url) else open_regular(url)


def _json(where: str, name: str) -> dict[str, Any]:
    if not _is_url(where):
        return read_json(Path(where) / name)
    return parse_json(_fetch(f"{where}/{name}"), f"{where}/{name}")


def _fetch(url: str) -> bytes:
    data = bytearray()
    try:
        with _open(url) as file:
            while piece := file.read(PIECE):
                data += piece
                if len(data) > MOST_BYTES:
                    raise InputError(f"{url} is larger than {MOST_BYTES} bytes")
    except OSError as error:
        raise InputError(f"{url} cannot be read: {error}") from None
    if not data:  # a failed transfer may show only in its length
        raise InputError(f"{url} cannot be read: it is missing or empty")
    return bytes(data)
