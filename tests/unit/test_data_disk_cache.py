"""Decoded images on disk: decoded once whoever asks, whole or not there, nobody else's."""

import errno
import multiprocessing
import os
import re
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.disk_cache import DiskCache, cache_folder
from pipeline.data.images import ImageSet
from pipeline.errors import UserError
from shards import FolderSource, Index, ShardOptions, write

SHAPE = (3, 4, 4)
ROWS = 1000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def squares(rows):
    """Each row's pixels are its number."""
    return torch.from_numpy(rows % 251 + 1).to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, *SHAPE)


def cached(**name):
    return DiskCache(name, rows=ROWS, shape=SHAPE)


def fail(rows):
    raise AssertionError(f"decoded again: {rows}")


def decode_and_note(path, pause, rows):
    with open(path, "a") as file:
        file.writelines(f"{row}\n" for row in rows.tolist())
    time.sleep(pause)
    return squares(rows)


def fill_in_a_process(path, rows, pause, begin):
    cache = cached()
    begin.wait()
    cache.fill(rows, lambda missing: decode_and_note(path, pause, missing))


def test_a_row_is_decoded_once_and_found_by_later_ones():
    cached().fill(np.array([7, 3, 999, 3]), squares)
    later = cached()
    later.fill(np.array([3, 7, 999]), fail)
    assert later.pixels[[3, 7, 999], 0, 0, 0].tolist() == [4, 8, 999 % 251 + 1]
    asked = []
    later.fill(np.arange(10), lambda rows: (asked.extend(rows.tolist()), squares(rows))[1])
    assert asked == [0, 1, 2, 4, 5, 6, 8, 9]


def test_rows_that_lie_far_apart_are_decoded_together():
    asked = []
    cached().fill(np.arange(0, ROWS, 5), lambda rows: (asked.append(len(rows)), squares(rows))[1])
    assert asked == [ROWS // 5]


def test_a_file_that_was_deleted_is_made_anew():
    cached().fill(np.arange(9), squares)
    cached().path.unlink()
    cache = cached()
    cache.fill(np.arange(9), squares)
    assert np.array_equal(cache.pixels[:9], squares(np.arange(9)).numpy())


def test_what_the_pixels_depend_on_names_the_file():
    assert cached(fit="pad").path != cached(fit="crop").path
    assert cached(fit="pad").path == cached(fit="pad").path


@pytest.mark.parametrize("version", ["torch.__version__", "PIL.__version__", "pipeline.__version__"])
def test_another_version_of_what_makes_pixels_has_a_file_of_its_own(version, monkeypatch):
    now = cached().path
    monkeypatch.setattr(version, "9.9")
    assert cached().path != now


def test_processes_share_the_rows_among_them(tmp_path):
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(2)
    notes = [tmp_path / f"{number}.txt" for number in range(2)]
    started = [
        context.Process(target=fill_in_a_process, args=(path, np.arange(ROWS), 0.5, begin)) for path in notes
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    decoded = [path.read_text().split() for path in notes]
    assert all(decoded), "each did a part"
    assert sorted(map(int, decoded[0] + decoded[1])) == list(range(ROWS)), "and none what the other did"
    assert np.array_equal(cached().pixels, squares(np.arange(ROWS)).numpy())


def test_a_process_that_dies_leaves_its_rows_to_the_next(tmp_path):
    def die(rows):
        os._exit(3)

    process = multiprocessing.get_context("fork").Process(target=cached().fill, args=(np.arange(9), die))
    process.start()
    process.join()
    assert process.exitcode == 3
    cache = cached()
    cache.fill(np.arange(9), squares)
    assert np.array_equal(cache.pixels[:9], squares(np.arange(9)).numpy())


def test_rows_are_on_disk_before_they_are_said_to_be_there(monkeypatch):
    def lost(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    cache = cached()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", lost)
        with pytest.raises(UserError, match="Input/output error"):
            cache.fill(np.arange(5), squares)
    decoded = []
    cache.fill(np.arange(5), lambda rows: (decoded.append(len(rows)), squares(rows))[1])
    assert decoded == [5]


def test_a_full_disk_is_said_with_what_to_do(monkeypatch, folder):
    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = cached()
    monkeypatch.setattr(os, "pwrite", full)
    expected = f"{re.escape(str(folder))}.*No space left on device. Set CASS_CACHE"
    with pytest.raises(UserError, match=expected):
        cache.fill(np.arange(5), squares)


def test_a_folder_without_locks_is_said(monkeypatch):
    def none(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    cache = cached()
    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.raises(UserError, match=r"No locks available. Set CASS_CACHE"):
        cache.fill(np.arange(5), squares)


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CASS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"file/cache.*Not a directory"):
        cached()


@pytest.mark.parametrize("chosen", [True, False])
def test_the_folder_is_ours_alone(chosen, monkeypatch, tmp_path):
    monkeypatch.delenv("CASS_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    tmp_path = tmp_path / ("chosen" if chosen else "tmp")
    tmp_path.mkdir()
    if chosen:
        monkeypatch.setenv("CASS_CACHE", str(tmp_path))
    made = cache_folder()
    assert made.parent == tmp_path and made.stat().st_mode & 0o777 == 0o700
    made.rmdir()
    (tmp_path / "elsewhere").mkdir()
    made.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no folder of yours"):
        cache_folder()
    made.unlink()
    made.mkdir()
    monkeypatch.setattr(Path, "lstat", lambda path: SimpleNamespace(st_mode=stat.S_IFDIR, st_uid=12345))
    with pytest.raises(UserError, match="no folder of yours"):
        cache_folder()


def test_sets_of_one_folder_share_what_was_decoded(tmp_path, monkeypatch):
    for number in range(20):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), (number, 2 * number, 3)).save(path)
    write(FolderSource(tmp_path / "images"), tmp_path / "shards", ShardOptions(processes=1))
    index = Index.open(tmp_path / "shards")
    rows = np.arange(20)
    fresh = ImageSet(index, rows, image_size=16, cache="none").batch(rows)
    ImageSet(index, rows[::2], image_size=16, cache="disk")
    seen = []
    decode = Index.decode_small
    monkeypatch.setattr(
        Index, "decode_small", lambda self, row, **kwargs: (seen.append(row), decode(self, row, **kwargs))[1]
    )
    every = ImageSet(index, rows, image_size=16, cache="disk")
    assert sorted(seen) == rows[1::2].tolist()
    assert torch.equal(torch.cat(list(every.batches([rows[:7], rows[7:]]))), fresh)
    ImageSet(index, rows, image_size=12, cache="disk")
    assert len(seen) == 30, "another size is another file"
