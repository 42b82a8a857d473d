"""Ranks, nodes and networks that go away in the middle of a pretraining on two nodes."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from slow import INTERVAL, until

pytestmark = pytest.mark.timeout(600)


def test_killed_rank_ends_the_other_and_the_same_command_goes_on(slow, undisturbed):
    slow.launch("pretrain")
    slow.wait_for_step(2 * INTERVAL + 5)
    began = time.monotonic()
    slow.kill_rank(1)
    assert slow.wait_for_end(60) in ("FAILED", "NODE_FAIL")
    assert time.monotonic() - began < 60
    until(lambda: not slow.ranks(), "the other rank's end", 30)
    assert slow.launch("status", check=1).stdout.count("failed") >= 1
    slow.launch("pretrain")
    assert slow.wait_for_end() == "COMPLETED"
    assert [pause.repeated <= INTERVAL + 2 for pause in slow.pauses] == [True], slow.pauses
    assert slow.bits() == undisturbed


def test_rank_that_stands_still_for_a_minute_goes_on_where_it_was(slow, undisturbed):
    slow.launch("pretrain")
    slow.wait_for_step(INTERVAL + 5)
    held = slow.ranks()[1][0]
    os.kill(held, signal.SIGSTOP)
    try:
        time.sleep(2)
        step = slow.step()
        time.sleep(63)
        assert slow.step() == step and slow.state() == "RUNNING"
        assert "running: pretrain/slow" in slow.launch("status").stdout
    finally:
        os.kill(held, signal.SIGCONT)
    assert slow.wait_for_end() == "COMPLETED"
    assert slow.resumed_at() == [] and slow.bits() == undisturbed


def test_rank_that_stands_still_for_good_is_named_and_ended(slow, undisturbed):
    silence = 15
    slow.settings = (f"resources.pretrain={{nodes: 2, minutes: 10, silence_seconds: {silence}}}",)
    slow.launch("pretrain")
    slow.wait_for_step(INTERVAL + 5)
    held, node = slow.ranks()[1]
    os.kill(held, signal.SIGSTOP)
    error = slow.pretraining / "error.json"
    until(error.exists, "an error", 4 * silence)
    assert json.loads(error.read_text())["message"] == f"rank 1 on {node} has not been heard for {silence} s"
    until(lambda: not slow.ranks(), "the end of both ranks", 60)
    assert slow.wait_for_end(60) == "FAILED"
    slow.launch("pretrain")
    assert slow.wait_for_end() == "COMPLETED"
    assert len(slow.resumed_at()) == 1 and slow.bits() == undisturbed


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


def test_node_cut_off_from_the_network_is_named_in_bounded_time(
    testbed_with_networks, slow_with_networks, undisturbed
):
    """It is not dead: no connection is closed, nobody is told anything."""
    slow, silence = slow_with_networks, 15
    slow.settings = (f"resources.pretrain={{nodes: 2, minutes: 10, silence_seconds: {silence}}}",)
    slow.write_profile(environment={"GLOO_SOCKET_IFNAME": "eth0"})
    slow.launch("pretrain")
    slow.wait_for_step(INTERVAL + 5)
    (here, there), began = (slow.ranks()[rank][1] for rank in (0, 1)), time.monotonic()
    testbed_with_networks.cut_off_node(there)
    try:
        error = slow.pretraining / "error.json"
        until(error.exists, "an error", 3 * silence)
        said = json.loads(error.read_text())
        assert said["message"] == f"rank 1 on {there} has not been heard for {silence} s"
        assert (said["rank"], said["host"]) == (0, here)
        until(lambda: 0 not in slow.ranks(), "the end of rank 0", 30)
        until(lambda: 1 not in slow.ranks(), "the end of rank 1, which hears nobody either", 60)
        assert time.monotonic() - began < 100
    finally:
        testbed_with_networks.reconnect_node(there)
    assert slow.wait_for_end(120) != "COMPLETED"
    slow.launch("pretrain")
    assert slow.wait_for_end() == "COMPLETED"
    assert len(slow.resumed_at()) == 1
    assert slow.bits() == undisturbed
