"""One launcher at a time: who holds the lock, who may take it over, and who notices."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

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
def elsewhere(tmp_path, monkeypatch):
    """A lock of another host; beats are counted and looked at a hundred times as fast."""
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "DEAD_S", 0.5)
    path = tmp_path / "manifest.lock"
    said = {"host": "elsewhere", "pid": 1, "user": "ann", "since": "2026-01-01", "beat": "000000000000"}
    path.write_text(json.dumps(said))
    return path


def test_lock_of_a_living_holder_on_another_host_is_respected(elsewhere):
    end = threading.Event()

    def beat():
        number = 0
        while not end.wait(0.05):
            number += 1
            said = json.loads(elsewhere.read_text())
            elsewhere.write_text(json.dumps({**said, "beat": f"{number:012d}"}))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"held by ann on elsewhere .* since 2026-01-01"), lock(elsewhere):
            pass
    finally:
        end.set()
        thread.join()


def test_lock_of_a_dead_holder_on_another_host_is_taken_over(elsewhere, capsys):
    with lock(elsewhere):
        assert json.loads(elsewhere.read_text())["pid"] == os.getpid()
    assert "held by ann on elsewhere" in capsys.readouterr().err
    assert list(elsewhere.parent.iterdir()) == []


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
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started": "1"}))
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
