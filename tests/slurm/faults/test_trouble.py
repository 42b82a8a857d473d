"""Losses that are not finite, a method that crashes, a worker that is killed, a port that is taken."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from slow import until

import slurm
from pipeline.ranks import rendezvous_port, rendezvous_ports

pytestmark = pytest.mark.timeout(600)


def test_loss_that_is_not_finite_stops_with_step_and_rank(slow):
    slow.settings = ("methods.cass_vc.train.lr=1e30", "methods.cass_vc.train.clip_grad=null")
    failed = slow.launch("pretrain", "--wait", check=2)
    assert "the loss is not finite at step" in failed.stderr and "on rank" in failed.stderr
    assert "the last checkpoint is from step" in failed.stderr


def test_one_of_six_methods_crashes_and_the_others_have_their_tables(slow):
    diverging = "{lr: 1.0e+30, clip_grad: null, warmup_epochs: 0}"
    methods = "supervised: {}, bn_refresh: {}, cass: {}, simclr: {}, byol: {options: {hidden: 64}}"
    slow.settings = (
        f"methods={{{methods}, broken: {{method: simclr, train: {diverging}}}}}",
        "pretrain={epochs: 0.2, batch_size: 64, image_size: 32, probe_epochs: null}",
        "resources.pretrain={nodes: 1, minutes: 10}",
        "report.baseline=supervised",
    )
    slow.launch("all", "--wait", check=2)
    tables = slow.folder / "runs" / "slow" / "tables"
    results = pd.read_csv(tables / "results.csv")
    assert set(results.loc[results.method == "broken", "status"]) == {"missing"}
    assert set(results.loc[results.method != "broken", "status"]) == {"done"}
    report = (tables / "report.md").read_text()
    assert "the loss is not finite" in report and "_log.err" in report
    status = json.loads(slow.launch("status", "--json", check=1).stdout)["tasks"]
    states = {task["id"]: task["state"] for task in status}
    children = {state for task, state in states.items() if task.startswith("finetune/slow-broken")}
    assert children == {"cancelled"}, "not stuck in the queue"


def test_killed_worker_of_the_shard_stage_is_said_and_the_same_command_goes_on(slow, tmp_path):
    """As the kernel kills it when memory runs out."""
    images = tmp_path / "images"
    for number in range(600):
        path = images / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (512, 512, 3), np.uint8)
        Image.fromarray(pixels).save(path, compress_level=0)
    slow.settings = (
        f"dataset={{name: slow, source: folder, root: {images}, resize: 64, shard_samples: 50}}",
        "resources.shard={cpus_per_rank: 2, minutes: 10}",
    )
    slow.launch("shard")
    job = slow.manifest.jobs["shard/slow"]

    def workers() -> list[int]:
        """The children of the stage's fork server."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                said = (folder / "environ").read_bytes()
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                above = Path(f"/proc/{parent}/cmdline").read_bytes() if folder.name.isdigit() else b""
            except OSError:
                continue
            mine = f"SLURM_JOB_ID={job}".encode() in said.split(b"\0")
            if mine and b"multiprocessing.forkserver" in above:
                found.append(int(folder.name))
        return found

    until(lambda: len(workers()) >= 2, "workers", 60)
    os.kill(workers()[-1], signal.SIGKILL)
    until(lambda: slurm.job_states([job])[job].state == "FAILED", "the end", 60)
    status = slow.launch("status", check=1).stdout
    assert "a process that reads images died" in " ".join(status.split()), status
    slow.launch("shard", "--wait")
    assert list((slow.folder / "store" / "shard").glob("*/receipt.json"))


def test_taken_port_is_passed_over(slow, undisturbed):
    """Somebody listens where rank 0 would: the job's number, and with it its port, is known beforehand."""
    slow.launch("shard", "--wait")
    last = int(slow.manifest.jobs["shard/slow"].split("_")[0])
    servers = []
    for job in range(last + 1, last + 4):
        port = rendezvous_ports(rendezvous_port(f"{job}-0-0"))[0]
        servers.append(socket.create_server(("", port)))
    try:
        slow.launch("pretrain")
        taken = rendezvous_port(f"{slow.job}-0-0")
        assert taken in {server.getsockname()[1] for server in servers}
        assert slow.wait_for_end() == "COMPLETED"
    finally:
        for server in servers:
            server.close()
    assert slow.bits() == undisturbed
