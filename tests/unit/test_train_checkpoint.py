"""Checkpoints are whole or not there, checked, and hold no code."""

import errno
import os
import subprocess
import sys
import threading

import pytest
import torch

from pipeline.train.checkpoint import (
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    remove_remains,
    save_checkpoint,
    sound_checkpoint,
)


def steps(folder):
    return [int(path.name[:9]) for path in list_checkpoints(folder)]


def test_what_was_saved_is_loaded_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        path = save_checkpoint(tmp_path, {"step": step, "w": torch.full((3,), step / 3)}, step=step, keep=2)
    assert steps(tmp_path) == [10, 2]
    assert len(list(tmp_path.iterdir())) == 2
    state = load_checkpoint(path)
    assert state["step"] == 10 and torch.equal(state["w"], torch.full((3,), 10 / 3))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damage_is_found_and_the_one_before_taken(tmp_path, damage):
    before = save_checkpoint(tmp_path, {"w": torch.zeros(100)}, step=1, keep=2)
    newest = save_checkpoint(tmp_path, {"w": torch.ones(100)}, step=2, keep=2)
    content = bytearray(newest.read_bytes())
    content[100] ^= 4
    newest.write_bytes({"flip": content, "truncate": content[:-10], "empty": b""}[damage])
    said = []
    assert sound_checkpoint(tmp_path, say=said.append) == before
    assert len(said) == 1 and str(newest) in said[0] and "damaged" in said[0]


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch):
    old = save_checkpoint(tmp_path, {"step": 1}, step=1, keep=1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, {"step": 2}, step=2, keep=1)
    assert list(tmp_path.iterdir()) == [old]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = save_checkpoint(tmp_path, {"evil": Evil()}, step=1, keep=1)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_no_folder_is_no_checkpoint(tmp_path):
    assert sound_checkpoint(tmp_path / "none", say=print) is None


def test_writer_returns_at_once_and_writes_what_was_true_then(tmp_path, monkeypatch):
    go, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (go.wait(30), real(handle)))
    writer = CheckpointWriter(tmp_path, keep=2)
    weights = torch.zeros(3)
    before = []
    state = {"w": weights, "parts": [weights, (weights,)]}
    writer.write(state, step=1, first=lambda: before.append(steps(tmp_path)))
    weights += 1
    assert writer.busy and steps(tmp_path) == []  # still being written: nothing can be found
    go.set()
    writer.settle()
    state = load_checkpoint(sound_checkpoint(tmp_path, say=print))
    assert not state["w"].any() and not state["parts"][1][0].any()
    assert before == [[]]


def test_writer_says_at_the_next_look_that_the_disk_was_full(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.write({"step": 1}, step=1)
    writer.settle()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.write({"step": 2}, step=2)
    with pytest.raises(OSError, match="No space left"):
        writer.write({"step": 3}, step=3)
    writer.settle()
    assert steps(tmp_path) == [1] and len(list(tmp_path.iterdir())) == 1


def test_killed_in_the_middle_of_writing(tmp_path):
    """A real kill -9 between the first byte and the rename."""
    code = (
        "import os, sys, time, torch; from pathlib import Path\n"
        "from pipeline.train.checkpoint import save_checkpoint\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "save_checkpoint(folder, {'w': torch.zeros(1000)}, step=1, keep=2)\n"
        "os.fsync = lambda handle: (print('writing', flush=True), time.sleep(60))\n"
        "save_checkpoint(folder, {'w': torch.ones(1000)}, step=2, keep=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 2, "the old checkpoint and half of the new one"
    remove_remains(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert not load_checkpoint(sound_checkpoint(tmp_path, say=pytest.fail))["w"].any()


@pytest.mark.parametrize(("keep", "then"), [(1, [19]), (2, [19, 10])])
def test_a_training_that_starts_over_leaves_nothing_of_the_history_it_gave_up(tmp_path, keep, then):
    for step in (20, 30):
        save_checkpoint(tmp_path, {"step": step}, step=step, keep=2).write_bytes(b"damaged")
    first = save_checkpoint(tmp_path, {"step": 10}, step=10, keep=keep)
    assert list_checkpoints(tmp_path) == [first]
    second = save_checkpoint(tmp_path, {"step": 19}, step=19, keep=keep)
    assert steps(tmp_path) == then and sound_checkpoint(tmp_path, say=pytest.fail) == second


def test_of_two_checkpoints_of_a_step_the_one_just_written_stays_whatever_the_clock_says(tmp_path):
    other = save_checkpoint(tmp_path, {"w": torch.zeros(1)}, step=5, keep=1)
    os.utime(other, (2e9, 2e9))
    written = save_checkpoint(tmp_path, {"w": torch.ones(1)}, step=5, keep=1)
    assert list_checkpoints(tmp_path) == [written]
