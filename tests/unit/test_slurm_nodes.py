"""Jobs that wait for nodes which are down or drained: what stand-ins for Slurm's commands print of them."""

from __future__ import annotations

import pytest

from slurm import JobState, job_states

NODES = """n1|drained|main*|bad disk
n2|down*|main*|Not responding
n3|idle|main*|none
n4|allocated|main*|none
n5|draining|gpu|firmware | and more
n6|mixed|gpu|none
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """``cluster(queue, partitions, nodes)``: what squeue, asked for either, and sinfo print."""

    def made(queue: str, partitions: str, nodes: str | None = NODES):
        for name, text in (("queue", queue), ("partitions", partitions), ("nodes", nodes or "")):
            (tmp_path / name).write_text(text)
        programs = {
            "sacct": "exit 1",
            "squeue": f"cd {tmp_path}; case $* in *SubmitTime*) cat queue;; *) cat partitions;; esac",
            "sinfo": f"echo asked >> {tmp_path}/asked; "
            + ("exit 1" if nodes is None else f"cat {tmp_path}/nodes"),
        }
        for name, does in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "asked"

    return made


DOWN = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"
MAIN = "out of use: 2 of 4 nodes: n1 (drained: bad disk), n2 (down, does not answer: Not responding)"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (DOWN, f"nodes it needs are down, drained or reserved; {MAIN}"),
        (DOWN.replace(" ", "_"), f"nodes it needs are down, drained or reserved; {MAIN}"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", f"nodes it needs are down or reserved; {MAIN}"),
        ("Resources", f"waits for free nodes; {MAIN}"),
        ("None", f"waits; {MAIN}"),
        ("Dependency", "waits for other jobs"),
        ("JobHeldUser", "held by its user (scontrol release)"),
    ],
)
def test_jobs_that_may_wait_for_nodes_say_which_are_out_of_use(cluster, reason, expected):
    cluster(f"7_0|PENDING|0|0:00||{reason}|\n", "7_0|main|\n")
    assert job_states(["7_0"]) == {"7_0": JobState("PENDING", expected, "", "0:0", "0:00")}


def test_each_job_is_told_of_its_own_partitions_and_the_nodes_are_asked_for_once(cluster):
    asked = cluster(
        "7_[0-1]|PENDING|0|0:00||Resources|\n8|PENDING|0|0:00||Resources|\n9|RUNNING|0|0:05|n3|None|\n",
        "7_[0-1]|gpu|\n8|gpu,main|\n",
    )
    states = job_states(["7_0", "7_1", "8", "9"])
    gpu = "n5 (draining: firmware | and more)"
    assert states["7_0"].reason == states["7_1"].reason
    assert states["7_0"].reason == f"waits for free nodes; out of use: 1 of 2 nodes: {gpu}"
    assert states["8"].reason.startswith("waits for free nodes; out of use: 3 of 6 nodes: n5 (draining")
    assert states["9"].reason == ""
    assert asked.read_text().count("asked") == 1


@pytest.mark.parametrize(
    ("nodes", "reason"), [(None, "Resources"), ("n1|idle|main*|none\n", "Resources"), ("?\n", "Resources")]
)
def test_without_such_nodes_or_an_answer_the_reason_stands_alone(cluster, nodes, reason):
    cluster(f"7|PENDING|0|0:00||{reason}|\n", "7|main|\n", nodes)
    assert job_states(["7"])["7"].reason == "waits for free nodes"


def test_nobody_is_asked_for_nodes_while_no_job_waits_for_them(cluster):
    asked = cluster("7|PENDING|0|0:00||Dependency|\n8|RUNNING|0|0:05|n3|None|\n", "7|main|\n")
    assert [state.state for state in job_states(["7", "8"]).values()] == ["PENDING", "RUNNING"]
    assert not asked.exists()
