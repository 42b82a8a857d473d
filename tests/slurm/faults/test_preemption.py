"""Time limits and preemption: a checkpoint, back into the queue, and the same bits in the end."""

from __future__ import annotations

import signal
import subprocess

import calls
import pytest
from slow import INTERVAL, holds_signals, until

import slurm
from slurm import Request

pytestmark = pytest.mark.timeout(600)


def test_time_limit_reached_again_and_again(slow, undisturbed):
    slow.settings = ("resources.pretrain.minutes=1",)  # Slurm's shortest; it warns a quarter ahead
    slow.launch("pretrain")
    for times in (1, 2):
        slow.wait_for_step(times * INTERVAL)
        slow.hold_until_signalled(signal.SIGUSR2)
        until(lambda times=times: len(slow.resumed_at()) == times, f"start {times + 1}", 120)
    assert slow.wait_for_end() == "COMPLETED"
    assert slow.bits() == undisturbed


@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_sigterm_alone_as_some_sites_preempt(slow, undisturbed, when):
    slow.launch("pretrain")
    if when == "at once":  # while Python is importing
        until(lambda: sum(holds_signals(pid) for pid, _ in slow.ranks().values()) == 2, "both ranks", 60)
    else:
        slow.wait_for_step(INTERVAL + 5)
    subprocess.run(["scancel", "--signal=TERM", slow.job], check=True)
    assert slow.wait_for_end() == "COMPLETED"
    (went_on,) = slow.resumed_at()
    assert went_on == 1 if when == "at once" else went_on > INTERVAL
    assert slow.bits() == undisturbed


def test_preempted_by_a_higher_partition(slow, undisturbed, profile, tmp_path):
    slow.write_profile(partition="low")
    slow.launch("pretrain")
    slow.wait_for_step(INTERVAL + 5)
    whole = Request(nodes=4, cpus_per_rank=8, minutes=5, partition="high")
    (high,) = slurm.submit_array(
        [calls.Write(tmp_path, "high")], name="high", request=whole, profile=profile, folder=tmp_path / "high"
    )
    assert slow.wait_for_end() == "COMPLETED"
    assert slurm.job_states([high])[high].state == "COMPLETED"
    (went_on,) = slow.resumed_at()
    assert went_on > INTERVAL
    assert slow.bits() == undisturbed
