"""Streams are even over ranks, complete, shuffled by epoch, and fail loudly."""

from __future__ import annotations

import functools
import shutil
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import FolderSource, Index, InputError, ShardOptions, stream, write
from shards.reader import stretch


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> FolderSource:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 25), ("val", 4), ("test", 4)):
        for number in range(count):
            folder = root / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(folder / f"{number}.png")
    return FolderSource(root)


@pytest.fixture(scope="module")
def three(source, tmp_path_factory) -> Index:
    """Three shards of train samples, of 8, 8 and 9."""
    return write(source, tmp_path_factory.mktemp("three"), ShardOptions(shard_samples=9))


@pytest.fixture(scope="module")
def one(source, tmp_path_factory) -> Index:
    return write(source, tmp_path_factory.mktemp("one"))


def rows(
    index: Index, rank: int, world_size: int, *, epoch: int = 0, seed: int = 0, buffer: int = 10
) -> list[int]:
    where = dict(rank=rank, world_size=world_size, epoch=epoch, seed=seed, shuffle_buffer=buffer)
    found = []
    for row, data in stream(index.folder, "train", **where):
        assert data == index.read(row)
        found.append(row)
    return found


def check_even_and_complete(index: Index, world_size: int) -> None:
    total = len(index.rows("train"))
    ranks = [rows(index, rank, world_size) for rank in range(world_size)]
    assert {len(found) for found in ranks} == {-(-total // world_size)}
    seen = Counter(row for found in ranks for row in found)
    assert sorted(seen) == index.rows("train").tolist()
    assert sum(seen.values()) - total < world_size


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_three_shards_are_even_on_any_number_of_ranks(three, world_size):
    assert [shard["samples"] for shard in three.meta["shards"] if shard["split"] == "train"] == [8, 8, 9]
    check_even_and_complete(three, world_size)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world_size", [4, 40])
def test_one_shard_is_even_on_more_ranks_than_shards_or_samples(one, world_size):
    assert sum(shard["split"] == "train" for shard in one.meta["shards"]) == 1
    check_even_and_complete(one, world_size)


def test_order_is_a_function_of_epoch_and_seed(three):
    first = rows(three, 0, 2)
    assert first == rows(three, 0, 2)
    assert first != rows(three, 0, 2, epoch=1) and first != rows(three, 0, 2, seed=1)
    assert sorted(rows(three, 0, 1)) == sorted(rows(three, 0, 1, epoch=1))


def test_buffer_shuffles_within_a_stretch(three):
    plain = rows(three, 0, 1, buffer=0)
    shards = three.samples["shard"].to_numpy()[plain].tolist()
    assert len({*pairwise(shards)} - {(name, name) for name in shards}) == 2
    assert rows(three, 0, 1, buffer=10) != plain


def test_a_rank_opens_only_the_shards_of_its_stretch():
    shards = [(f"{number}.tar", 10) for number in range(8)]
    assert [segment.shard for segment in stretch(shards, 1, 4)] == ["2.tar", "3.tar"]


def test_stretches_are_even_and_cover_the_ring_whatever_the_sizes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = rng.integers(1, 12, rng.integers(1, 6))
        world_size = int(rng.integers(1, 30))
        shards = [(str(number), int(size)) for number, size in enumerate(sizes)]
        ranks = [stretch(shards, rank, world_size) for rank in range(world_size)]
        counts = [sum(segment.stop - segment.start for segment in segments) for segments in ranks]
        assert set(counts) == {-(-int(sizes.sum()) // world_size)}
        places = Counter(
            (segment.shard, place)
            for segments in ranks
            for segment in segments
            for place in range(segment.start, segment.stop)
        )
        assert len(places) == sizes.sum() and max(places.values()) - min(places.values()) <= max(
            1, world_size
        )
        assert all(0 <= place < sizes[int(name)] for name, place in places)


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads HTTP through curl")
def test_over_http(three):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(three.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        settings = dict(rank=1, world_size=2, epoch=0, seed=0, shuffle_buffer=10)
        found = list(stream(url, "train", **settings))
        assert [row for row, _ in found] == rows(three, 1, 2)
        assert all(data == three.read(row) for row, data in found)
        with pytest.raises(InputError, match=r"nowhere/index.json cannot be read"):
            next(stream(f"{url}/nowhere", "train", **settings))
    finally:
        server.shutdown()
        server.server_close()


def test_cut_shard_is_an_error_not_a_short_epoch(source, tmp_path: Path):
    index = write(source, tmp_path / "cut", ShardOptions(shard_samples=9))
    path = index.folder / "train-000001.tar"
    content = path.read_bytes()
    place = int(index.samples[index.samples["shard"] == path.name]["offset"].iloc[4])
    for broken in (content[: place + 10], content[: place - 512] + bytes(1024)):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"train-000001.tar"):
            rows(index, 0, 1)
    path.unlink()
    with pytest.raises(InputError, match=r"train-000001.tar cannot be read"):
        rows(index, 0, 1)


@pytest.mark.parametrize(
    ("split", "rank", "message"),
    [("valid", 0, "no split 'valid'"), ("train", 2, "rank is 2, expected 0 to 1")],
)
def test_wrong_arguments_are_named(three, split, rank, message):
    with pytest.raises(InputError, match=message):
        next(stream(three.folder, split, rank=rank, world_size=2, epoch=0, seed=0))
