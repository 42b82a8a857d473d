"""Files that outlive a loss of power: what is on disk, and when."""

from __future__ import annotations

import ast
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.files import write_atomically
from pipeline.manifest import Manifest, Task, describe_files

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "shards", "slurm", "benchmarks")
NO_TEXT = ("Image", "Index", "codec", "os", "shards.Index")  # whose ``open`` gives no text


def texts_of_any_encoding(source: str) -> Iterator[int]:
    """The lines in which a source text opens, reads or writes a text file in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        opens = ast.unparse(node.func) == "open" or (method == "open" and of not in NO_TEXT)
        modes = [ast.literal_eval(mode) for mode in node.args[not method : 2 - bool(method)]] if opens else []
        if method in ("read_text", "write_text") or (opens and not any("b" in mode for mode in modes)):
            yield node.lineno


def test_text_files_are_utf8_whatever_the_locale():
    assert [*texts_of_any_encoding("open(p)\np.open('a')\nopen(p, 'rb')\np.open('wb')\np.read_text()")] == [
        *(1, 2, 5)
    ]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in texts_of_any_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_a_locale_without_utf8_does_not_stop_what_is_printed(tmp_path):
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    task = Task("shard/tiny", "shard", {}, (), "0" * 64)
    Manifest({"name": "tiny"}, str(tmp_path), (task,)).write(tmp_path / "tiny" / "manifest.json")
    for words, expected in (["experiments"], b"quickstart"), (["status", "tiny"], b"\\xb7"):
        command = [sys.executable, "-m", "pipeline.launch", *words, "--runs", tmp_path]
        ran = subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, **locale})
        assert ran.returncode == 0 and expected in ran.stdout, ran.stderr


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
