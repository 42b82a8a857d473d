"""Time limits and preemption: a checkpoint, back into the queue, and the same bits in the end."""

from __future__ import annotations

import subprocess

import pytest
from slow import until

pytestmark = pytest.mark.timeout(600)


def test_time_limit_reached_again_and_again(slow, undisturbed):
    slow.write_profile(signal_seconds=35)
    slow.settings = ("resources.pretrain.minutes=1", "pretrain.checkpoint_seconds=100000")
    slow.launch("pretrain")
    slow.wait_for_step(5)
    for _ in range(2):  # and by hand, as Slurm does it: a minute is its shortest limit
        before = len(slow.resumed_at())
        subprocess.run(["scancel", "--signal=USR2", slow.job], check=True)
        until(lambda n=before: len(slow.resumed_at()) > n, "the next start", 90)
        slow.wait_for_step(slow.resumed_at()[-1] + 5)
    assert slow.wait_for_end() == "COMPLETED"
    assert slow.bits() == undisturbed
    assert len(slow.resumed_at()) >= 2
