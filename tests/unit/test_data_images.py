"""Reading images: the same pixels however they are cached, and feeds that run on without a hang."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from benchmarks.pictures import picture
from pipeline.data.feed import IndexedFeed, StreamedFeed
from pipeline.data.images import ImageSet
from pipeline.data.sampler import EpochSampler
from pipeline.data.squares import border, square, square_mask
from pipeline.nets.export import CROP_MODES
from shards import FolderSource, Index, InputError, ShardOptions, write

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(30):
        path = folder / "images" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(path)
    write(FolderSource(folder / "images"), folder / "shards", ShardOptions(shard_samples=7, processes=1))
    return Index.open(folder / "shards")


def test_every_cache_gives_the_same_pixels_in_the_order_asked_for(index, tmp_path, monkeypatch):
    monkeypatch.setenv("CASS_CACHE", str(tmp_path))
    rows = index.rows("train")
    order = np.array([3, 0, 3, 11])
    expected = np.stack([square(index.decode(int(r)), 16, "squash") for r in rows[order]])
    for cache in ("auto", "gpu", "ram", "disk", "none"):
        images = ImageSet(index, rows, image_size=16, cache=cache)
        assert len(images) == len(rows)
        assert np.array_equal(images.batch(order).numpy(), expected)
        assert np.array_equal(images.batch(torch.from_numpy(order)).numpy(), expected)
        several = list(images.batches([order[:2], order[2:], order, order, order, order]))
        assert [len(batch) for batch in several] == [2, 2, 4, 4, 4, 4]
        assert np.array_equal(torch.cat(several[:2]).numpy(), expected)


def test_auto_keeps_images_in_memory_only_where_they_fit(index, monkeypatch):
    rows = index.rows("train")
    assert ImageSet(index, rows, image_size=16).cache == "ram"
    monkeypatch.setattr("pipeline.data.images.available_memory", lambda: 3 * 16 * 16 * len(rows))
    assert ImageSet(index, rows, image_size=16).cache == "none"
    monkeypatch.setattr("pipeline.data.images.available_memory", lambda: 30 * 16 * 16 * len(rows))
    assert ImageSet(index, rows, image_size=16, ranks_on_node=1).cache == "ram"
    assert ImageSet(index, rows, image_size=16, ranks_on_node=8).cache == "none"


def test_fits_squash_crop_and_pad_do_what_they_say():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    image = Image.fromarray(wide)
    assert square(image, 10, "crop").min() == 255
    padded = square(image, 30, "pad")
    assert padded.shape == (3, 30, 30) and padded[:, :9].max() == 0 and padded[:, 15, 15].min() == 255
    squashed = square(image, 9, "squash")
    assert squashed[0, 4, 4] == 255 and squashed[0, 4, 0] == 0


@pytest.mark.parametrize("size", [(3, 400), (400, 6)])
def test_a_very_long_image_is_a_line_in_its_square(size):
    padded = square(Image.new("RGB", size, (255, 255, 255)), 32, "pad")
    assert (padded[0] > 0).sum() == 32
    mask = square_mask(np.ones(size[::-1], np.uint8), 32, "pad")
    assert np.array_equal(mask == 1, padded[0] > 0)


@pytest.mark.parametrize("size", [(31, 17), (17, 31), (20, 20), (12, 12), (12, 40), (41, 27), (5, 50)])
@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.485, 0.456, 0.406)])
def test_fits_are_timms_evaluation_transforms_but_for_rounding(size, mean):
    image = picture(*size, seed=3)
    for side in (8, 12, 33):
        for fit, crop_mode in CROP_MODES.items():
            theirs = create_transform(
                (3, side, side),
                crop_pct=1.0,
                crop_mode=crop_mode,
                interpolation="bicubic",
                mean=mean,
                std=(1,) * 3,
            )
            expected = 255 * (theirs(image) + torch.tensor(mean)[:, None, None]).numpy()
            off = np.abs(square(image, side, fit, fill=border(mean)).astype(int) - expected)
            assert off.max() <= 2.01 and off.mean() < 0.35, (fit, side)


@pytest.mark.parametrize("piece", [1, 1000, 5000])
def test_a_square_is_the_same_in_pieces(piece, monkeypatch):
    image = picture(31, 47, seed=4)
    whole = square(image, 20, "squash")
    monkeypatch.setattr("pipeline.data.squares.PIECE", piece)
    assert np.array_equal(square(image, 20, "squash"), whole)


@pytest.mark.parametrize("part", [(512, 384), (511.5, 383.25)])
def test_photographs_are_within_one_level_of_pillows(part):
    image = picture(512, 384, seed=1)
    found = square(image, 224, "squash", width=part[0], height=part[1]).astype(int)
    expected = image.resize((224, 224), Image.Resampling.BICUBIC, box=(0, 0, *part))
    off = np.abs(found - np.asarray(expected).transpose(2, 0, 1))
    assert off.max() <= 1 and (off > 0).mean() < 0.01


def test_squares_have_the_same_bits_whatever_the_instructions_of_the_cpu():
    code = """
from benchmarks.pictures import picture
from pipeline.data.squares import square
print(square(picture(227, 339, seed=2), 96, "pad").tobytes().hex())
"""
    plain = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    assert bytes.fromhex(ran.stdout) == square(picture(227, 339, seed=2), 96, "pad").tobytes()


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_large_jpegs_give_the_squares_of_the_whole_images(fit, tmp_path):
    for number, size in enumerate([(641, 477), (333, 500), (400, 400), (90, 60)] * 3):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed=number).save(path, quality=95)
    index = write(FolderSource(tmp_path / "images"), tmp_path / "shards")
    rows = np.arange(len(index.samples))
    found = ImageSet(index, rows, image_size=64, fit=fit).batch(rows).numpy().astype(int)
    whole = np.stack([square(index.decode(row), 64, fit) for row in rows]).astype(int)
    assert 0 < np.abs(found - whole).mean() < 0.6, "of 255"


def test_a_shard_that_is_gone_is_named_not_a_hang(index, tmp_path):
    lost = Index(tmp_path, index.meta, index.samples)
    with pytest.raises(InputError, match=r"shard .* cannot be read"):
        ImageSet(lost, index.rows("train"), image_size=16, cache="ram")
    with pytest.raises(InputError, match=r"shard .* cannot be read"):
        list(ImageSet(lost, index.rows("train"), image_size=16, cache="none").batches([[0, 1]]))


def feed(index, *, rank=0, world_size=1, streamed=True, accumulate=1):
    rows = index.rows("train")
    images = ImageSet(index, rows, image_size=16, cache="none")
    places = {"rank": rank, "world_size": world_size, "accumulate": accumulate, "seed": 3, "batch_size": 4}
    if streamed:
        return StreamedFeed(images, "train", shuffle_buffer=5, **places)
    return IndexedFeed(images, EpochSampler(len(rows), **places))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_feed_gives_each_image_with_the_counter_that_names_it(index, streamed):
    one = feed(index, streamed=streamed, accumulate=2)
    pixels = ImageSet(index, index.rows("train"), image_size=16)
    counters = []
    for batches in one.steps(0, 11):
        assert len(batches) == 2
        for batch in batches:
            assert torch.equal(batch.images, pixels.batch(batch.counters % one.n))
            counters.append(batch.counters)
    first_epochs = torch.cat(counters)[: 2 * one.n]
    assert torch.equal(first_epochs.sort().values, torch.arange(2 * one.n))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_feed_goes_on_from_any_step(index, streamed):
    through = list(feed(index, streamed=streamed).steps(0, 15))
    for first in (1, 9):
        resumed = list(feed(index, streamed=streamed).steps(first, 15))
        assert len(resumed) == 15 - first
        for one, other in zip(through[first:], resumed):
            assert torch.equal(one[0].counters, other[0].counters)
            assert torch.equal(one[0].images, other[0].images)


def test_three_shards_on_two_ranks_give_both_as_many_steps_and_see_every_image(index):
    assert index.samples[index.samples["split"] == "train"]["shard"].nunique() == 3
    ranks = [feed(index, rank=rank, world_size=2) for rank in (0, 1)]
    n = ranks[0].n
    steps = -(-n // 4)
    seen = [torch.cat([b.counters for step in one.steps(0, steps) for b in step]) for one in ranks]
    assert len(seen[0]) == len(seen[1]) == steps * 2
    assert set(range(n)) <= set(torch.cat(seen).tolist())
