"""One launcher at a time: who holds the lock, who may take it over, and who notices."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import lock as module
from pipeline.errors import UserError
from pipeline.lock import lock


def test_lock_says_who_holds_it_and_since_when(tmp_path):
    path = tmp_path / "manifest.lock"
    with lock(path), pytest.raises(UserError) as refused, lock(path):
        pass
    assert f"on {socket.gethostname()} (process {os.getpid()}) since 2" in str(refused.value)
    assert not path.exists()


def test_lock_of_a_killed_launcher_is_taken_over(tmp_path):
    path = tmp_path / "manifest.lock"
    code = (
        "from pathlib import Path; from pipeline.lock import lock; import time\n"
        f"with lock(Path({str(path)!r})): print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UserError, match=f"process {holder.pid}"), lock(path):
        pass
    holder.kill()
    holder.wait()
    with lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_of_many_launchers_at_once_one_gets_the_lock(tmp_path):
    path, winners = tmp_path / "manifest.lock", tmp_path / "winners"
    code = (
        "import sys, time; from pathlib import Path; from pipeline.lock import lock\n"
        f"with lock(Path({str(path)!r})):\n"
        f"    open({str(winners)!r}, 'a').write('x'); sys.stdin.read()"
    )
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    started = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    deadline = time.monotonic() + 30
    while sum(process.poll() is None for process in started) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)  # the holder waits for its stdin to close; the others end with an error
    for process in started:
        process.communicate()
    assert winners.read_text() == "x"
    assert sorted(process.returncode for process in started) == [0, 1, 1]


@pytest.fixture
def quick(monkeypatch):
    """Beats are counted and looked at a hundred times as fast."""
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "DEAD_S", 0.5)


@pytest.fixture
def elsewhere(tmp_path, quick):
    """A lock of another host."""
    path = tmp_path / "manifest.lock"
    said = {"host": "elsewhere", "pid": 1, "user": "ann", "since": "2026-01-01", "beat": "000000000000"}
    path.write_text(json.dumps(said))
    return path


@contextlib.contextmanager
def counting_up(path):
    end = threading.Event()

    def beat():
        number = 0
        while not end.wait(0.05):
            number += 1
            said = json.loads(path.read_text())
            path.write_text(json.dumps({**said, "beat": f"{number:012d}"}))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_lock_of_a_living_holder_on_another_host_is_respected(elsewhere):
    said = "held by ann on elsewhere .* since 2026-01-01"
    with counting_up(elsewhere), pytest.raises(UserError, match=said), lock(elsewhere):
        pass


def test_lock_of_a_dead_holder_on_another_host_is_taken_over(elsewhere, capsys):
    with lock(elsewhere):
        assert json.loads(elsewhere.read_text())["pid"] == os.getpid()
    assert "held by ann on elsewhere" in capsys.readouterr().err
    assert list(elsewhere.parent.iterdir()) == []


@pytest.mark.parametrize("differs", ["boot", "pid_namespace", "of an earlier version"])
def test_living_holder_of_this_host_name_elsewhere_is_respected(tmp_path, quick, differs):
    """Two containers, or two machines called localhost: its process is not found here, but it counts up."""
    path = tmp_path / "manifest.lock"
    with lock(path):
        said = json.loads(path.read_text())
    said |= {"pid": 2**22 + 1, "user": "ann"}
    if differs in said:
        said[differs] = "another"
    else:
        said = {name: said[name] for name in ("user", "host", "pid", "started", "since", "beat")}
    path.write_text(json.dumps(said))
    with counting_up(path), pytest.raises(UserError, match="held by ann"), lock(path):
        pass


def test_process_of_this_host_that_may_not_be_seen_is_looked_at(tmp_path, quick, monkeypatch, capsys):
    """Of other users' processes some hosts show nothing (hidepid), though they are there."""
    path = tmp_path / "manifest.lock"
    with lock(path):
        said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "pid": 1, "user": "ann"}))

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(Path, "read_text", _without(Path.read_text, Path("/proc/1/stat")))
    assert module.lock_holder(path)["user"] == "ann"
    with lock(path):
        pass
    assert "held by ann" in capsys.readouterr().err


def _without(read_text, hidden):
    def read(path, *arguments, **named):
        if path == hidden:
            raise FileNotFoundError
        return read_text(path, *arguments, **named)

    return read


def test_what_the_holder_says_is_on_the_disk_where_other_hosts_see_it(tmp_path, quick, monkeypatch):
    synced, fsync = [], os.fsync

    def remember(descriptor):
        fsync(descriptor)
        synced.append(os.pread(descriptor, 1000, 0))

    monkeypatch.setattr(os, "fsync", remember)
    with lock(tmp_path / "manifest.lock"):
        assert len(synced) == 1
        deadline = time.monotonic() + 10
        while len(synced) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    beats = [json.loads(said)["beat"] for said in synced[:3]]
    assert beats == [f"{number:012d}" for number in range(3)]


def test_disk_that_cannot_take_a_beat_does_not_stop_the_holder(tmp_path, quick, monkeypatch):
    with lock(tmp_path / "manifest.lock") as held:
        tried = threading.Event()

        def full(*_):
            tried.set()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        assert tried.wait(10)
        tried.clear()
        assert tried.wait(10)
        held.require()


def test_holder_counts_up_in_its_file(elsewhere):
    elsewhere.unlink()
    with lock(elsewhere):
        beats = set()
        deadline = time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < deadline:
            beats.add(json.loads(elsewhere.read_text())["beat"])
            time.sleep(0.01)
    assert len(beats) >= 3


def test_holder_whose_lock_was_taken_over_is_told_and_leaves_the_new_one(tmp_path):
    path = tmp_path / "manifest.lock"
    with lock(path) as held:
        held.require()
        path.unlink()
        path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "bob"}))
        with pytest.raises(UserError, match=r"no longer held .* bob on elsewhere"):
            held.require()
    assert json.loads(path.read_text())["user"] == "bob"


def test_of_several_who_take_over_a_dead_lock_one_gets_it(tmp_path):
    path = tmp_path / "manifest.lock"
    with lock(path):
        said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "pid": 2**22 + 1, "started": "1"}))
    got, ready = [], threading.Barrier(4)

    def take(name):
        ready.wait()
        try:
            with lock(path) as held:
                time.sleep(0.3)
                held.require()
                got.append(name)
                time.sleep(0.3)
        except UserError:
            pass

    threads = [threading.Thread(target=take, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
