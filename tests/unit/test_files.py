"""Files that outlive a loss of power: what is on disk, and when."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from pipeline.files import write_atomically
from pipeline.manifest import describe_files


@pytest.fixture
def synced(monkeypatch):
    """The inodes of files and folders that were put on disk, and "renamed" where a file got its name."""
    happened, fsync, rename = [], os.fsync, os.replace

    def remember_sync(descriptor):
        fsync(descriptor)
        happened.append(os.fstat(descriptor).st_ino)

    def remember_rename(old, new):
        rename(old, new)
        happened.append("renamed")

    monkeypatch.setattr(os, "fsync", remember_sync)
    monkeypatch.setattr(os, "replace", remember_rename)
    return happened


def test_new_name_is_on_disk_when_the_writer_returns(tmp_path, synced):
    write_atomically(tmp_path / "receipt.json", b"{}")
    assert synced == [(tmp_path / "receipt.json").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_writer_that_need_not_wait_for_the_disk_does_not(tmp_path, synced):
    write_atomically(tmp_path / "progress.json", b"{}", sync=False)
    assert synced == ["renamed"]


@pytest.fixture
def results(tmp_path):
    """A task's folder, as a stage leaves it."""
    for name in (
        "log.jsonl",
        "cnn/model.safetensors",
        "a/b/deep",
        "checkpoints/1.pt",
        ".hidden",
        "error.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_described_files_and_the_folders_that_hold_them_are_on_disk(results, synced):
    described = describe_files(results, without=["checkpoints"])
    assert set(described) == {"log.jsonl", "cnn/model.safetensors", "a/b/deep"}
    expected = {*described, "", "cnn", "a", "a/b"}
    assert sorted(synced) == sorted((results / name).stat().st_ino for name in expected)


def test_files_can_be_described_without_waiting_for_the_disk(results, synced):
    assert describe_files(results, sync=False) == describe_files(results)
    synced.clear()
    describe_files(results, sync=False)
    assert synced == []


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_file_system_that_cannot_sync_folders_is_borne_and_a_broken_one_is_not(
    tmp_path, monkeypatch, number, passes
):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if passes:
        write_atomically(tmp_path / "file", b"new")
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
