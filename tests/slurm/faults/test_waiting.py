"""Jobs that something keeps from starting: `status` says why, and a launch submits nothing twice."""

from __future__ import annotations

import subprocess

import pytest
from slow import TASK, until

pytestmark = pytest.mark.timeout(120)


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["partition down", "held", "time limit changed", "nodes drained"])
def test_jobs_that_are_kept_from_starting_wait_with_a_reason_and_are_not_submitted_again(slow, testbed, kind):
    try:
        scontrol("update", "PartitionName=main", "State=DOWN")
        slow.launch("pretrain")
        shard = slow.manifest.jobs["shard/slow"]
        expected = "the partition is down"
        if kind == "nodes drained":
            scontrol("update", "NodeName=n[1-4]", "State=DRAIN", "Reason=bad disk")
            scontrol("update", "PartitionName=main", "State=UP")
            expected = "out of use: 4 of 4 nodes: n1, n2, n3, n4 (drained: bad disk)"
        if kind == "held":
            scontrol("hold", shard)
            scontrol("update", "PartitionName=main", "State=UP")
            expected = "held by an administrator"  # as root is
        elif kind == "time limit changed":
            scontrol("update", f"JobId={shard}", "TimeLimit=7")
        until(lambda: expected in slow.launch("status", check=None).stdout, expected, 30)
        jobs = dict(slow.manifest.jobs)
        again = slow.launch("pretrain")
        assert "were submitted before and are still on their way" in again.stdout
        assert slow.manifest.jobs == jobs and TASK in jobs
    finally:
        slow.launch("cancel", check=None)
        scontrol("update", "PartitionName=main", "State=UP")
        if kind == "nodes drained":
            scontrol("update", "NodeName=n[1-4]", "State=RESUME")
