"""Full disks, results that are damaged, gone, or seen late, clocks that are wrong."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slow import INTERVAL, TASK, until

import slurm

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """``store/`` on a disk of its own, of 64 MB; ``fill(folder)`` leaves some KB free."""
    store = tmp_path / "store"
    store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(store)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk to be had here: {mounted.stderr.strip()}")
    yield store
    subprocess.run(["umount", "--lazy", str(store)], check=True)


def fill(store: Path, *, leave: int) -> Path:
    """Take all but ``leave`` bytes of a disk; removing the file that is returned gives them back."""
    blocker = store / "blocker"
    with blocker.open("wb") as file:
        file.write(bytes(shutil.disk_usage(store).free - leave))
    return blocker


def test_disk_full_in_every_stage(small_disk, slow, undisturbed):
    """One line that names the file; what was there stays; with space made, the same command goes on."""
    for stage, room in (
        ("shard", 200_000),
        ("pretrain", 400_000),
        ("finetune", 12_000),
        ("aggregate", 12_000),
    ):
        kept = {path: path.read_bytes() for path in small_disk.glob("*/*/receipt.json")}
        # room to begin with, but not for a shard, a checkpoint, predictions, a table
        blocker = fill(small_disk, leave=room)
        failed = slow.launch(stage, "--wait", check=2)
        assert "No space left on device" in failed.stderr and str(small_disk) in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr
        assert {path: path.read_bytes() for path in kept} == kept
        assert not list(small_disk.glob(f"{stage}/*/receipt.json"))
        blocker.unlink()
        slow.launch(stage, "--wait")
    assert slow.bits() == undisturbed
    assert not [path for path in small_disk.rglob("*.part")]


def test_damaged_checkpoint_falls_back_to_the_one_before(slow, undisturbed):
    slow.launch("pretrain")
    slow.wait_for_step(2 * INTERVAL + 8)
    slow.kill_rank(0)
    slow.wait_for_end(60)
    newest, before = sorted((slow.pretraining / "checkpoints").glob("0*.pt"), reverse=True)[:2]
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 1
    newest.write_bytes(content)
    slow.launch("pretrain")
    assert slow.wait_for_end() == "COMPLETED"
    assert slow.resumed_at() == [int(before.name[:9])]
    logs = "".join(path.read_text() for path in (slow.folder / "runs/slow/logs").glob("*_0_log.err"))
    assert f"{newest} is damaged" in logs
    assert slow.bits() == undisturbed


def test_store_deleted_in_part_runs_exactly_that_and_what_depends_on_it(slow, undisturbed):
    slow.launch("all", "--wait")
    tables = slow.folder / "runs" / "slow" / "tables" / "results.csv"
    results = tables.read_bytes()
    shards = next((slow.folder / "store" / "shard").iterdir()).stat().st_mtime_ns
    shutil.rmtree(slow.pretraining)
    again = slow.launch("all", "--wait")
    assert "4 tasks submitted" in again.stdout  # pretraining, two fine-tunings, tables; the shards are there
    assert next((slow.folder / "store" / "shard").iterdir()).stat().st_mtime_ns == shards
    assert slow.bits() == undisturbed and tables.read_bytes() == results


def test_results_that_a_shared_file_system_shows_late(slow, undisturbed):
    """Slurm starts a job as soon as the one before has ended; its receipt may be visible only later."""
    hidden: list[Path] = []

    def hide() -> None:
        """Every receipt of the shards disappears at once and comes back 12 seconds later."""
        shards = slow.folder / "store" / "shard"
        until(lambda: list(shards.glob("*/receipt.json")), "the shards", 120)
        (receipt,) = shards.glob("*/receipt.json")
        aside = receipt.with_name(".receipt.json")
        receipt.rename(aside)
        hidden.append(aside)
        threading.Event().wait(12)
        aside.rename(receipt)

    thread = threading.Thread(target=hide)
    thread.start()
    slow.launch("pretrain")
    thread.join()
    assert hidden
    assert slow.wait_for_end() == "COMPLETED"
    assert slow.bits() == undisturbed


WRONG_CLOCK = """
import os, time

offset = 3600 * float(os.environ.get("HOURS") or {"n1": 5}.get(os.environ.get("SLURMD_NODENAME"), -7))
right = time.time
time.time = lambda: right() + offset
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.fixture
def wrong_clock(slow, tmp_path) -> str:
    """Lets jobs see clocks that are hours wrong, each node's another way.

    Returns:
        What PYTHONPATH has to be for a launcher to see time as HOURS in its environment says.
    """
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WRONG_CLOCK)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    slow.write_profile(environment={"PYTHONPATH": path})
    return path


def test_clocks_of_nodes_and_launchers_hours_apart(slow, undisturbed, wrong_clock):
    """Nothing is taken for done, lost, stale or due because of what some clock says."""
    slow.launch("all")
    slow.wait_for_step(INTERVAL + 5)
    subprocess.run(["scancel", "--signal=TERM", slow.job], check=True)
    assert slow.wait_for_end() == "COMPLETED"
    assert len(slow.resumed_at()) == 1
    assert slow.bits() == undisturbed
    receipt = slow.manifest.receipt(slow.manifest.task(TASK))
    hours = (time.time() - datetime.datetime.fromisoformat(receipt.ended).timestamp()) / 3600
    assert abs(hours) > 4, "its clock was right"
    last = slow.manifest.jobs["aggregate/slow"]
    until(lambda: slurm.job_states([last])[last].state == "COMPLETED", "the tables", 120)
    for offset in ("-20", "20"):
        environment = os.environ | {"PYTHONPATH": wrong_clock, "HOURS": offset}
        again = subprocess.run(
            slow.command("all"), cwd=slow.folder, env=environment, capture_output=True, text=True
        )
        assert again.returncode == 0 and "everything is done" in again.stdout, again.stdout + again.stderr


def test_store_that_becomes_read_only_is_one_line_and_goes_on_once_it_is_not(small_disk, slow):
    slow.launch("shard", cluster="local")
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    try:
        refused = slow.launch("pretrain", cluster="local", check=2)
        assert refused.stderr.splitlines()[-1].endswith("is not writable: Read-only file system")
        assert "Traceback" not in refused.stderr
        assert slow.launch("status", check=None).returncode == 0
    finally:
        subprocess.run([*remount[:2], "remount,rw", remount[-1]], check=True)
    assert "waiting" in slow.launch("status").stdout
