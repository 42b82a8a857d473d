"""Ranks, nodes and networks that go away in the middle of a pretraining on two nodes."""

from __future__ import annotations

import time

import pytest
from slow import INTERVAL, until

pytestmark = pytest.mark.timeout(600)


def test_killed_rank_ends_the_other_and_the_same_command_goes_on(slow, undisturbed):
    slow.launch("pretrain")
    slow.wait_for_step(2 * INTERVAL + 5)
    reached = slow.step()
    began = time.monotonic()
    slow.kill_rank(1)
    assert slow.wait_for_end(60) in ("FAILED", "NODE_FAIL")
    assert time.monotonic() - began < 60
    until(lambda: not slow.ranks(), "the other rank's end", 30)
    assert slow.launch("status", check=1).stdout.count("failed") >= 1
    slow.launch("pretrain")
    assert slow.wait_for_end() == "COMPLETED"
    (went_on,) = slow.resumed_at()
    assert reached - went_on <= INTERVAL + 10, "at most one interval is repeated (the last steps are unseen)"
    assert slow.bits() == undisturbed


def test_lost_node_is_replaced_by_slurm_itself(slow, undisturbed, testbed):
    slow.launch("pretrain")
    slow.wait_for_step(2 * INTERVAL + 5)
    nodes = {node for _, node in slow.ranks().values()}
    assert len(nodes) == 2
    lost = slow.ranks()[1][1]
    try:
        testbed.lose_node(lost)
        assert slow.wait_for_end() == "COMPLETED"
        assert len(slow.resumed_at()) == 1
        assert slow.bits() == undisturbed
    finally:
        testbed.bring_back_node(lost)
