"""The whole pipeline on a real Slurm, started as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

TINY = Path(__file__).parents[1] / "tiny.yaml"
REPOSITORY = Path(__file__).parents[2]
TWO_NODES = "resources.pretrain={nodes: 2, ranks_per_node: 1, minutes: 10}"
SHORT = [f"resources.{stage}.minutes=10" for stage in ("shard", "finetune", "aggregate")]


def states(tmp_path: Path) -> dict[str, str]:
    """Task → state, as ``status --json`` says; its exit code is 1 where tasks failed."""
    command = [sys.executable, "-m", "pipeline.launch", "status", "tiny", "--json"]
    told = subprocess.run([*command, "--runs", str(tmp_path / "runs")], capture_output=True, text=True)
    return {task["id"]: task["state"] for task in json.loads(told.stdout)["tasks"]}


def results(tmp_path: Path) -> bytes:
    return (tmp_path / "runs" / "tiny" / "tables" / "results.csv").read_bytes()


@pytest.mark.timeout(900)
def test_chain_on_slurm_gives_the_bits_of_the_chain_on_one_machine(
    testbed, launch, profile_file, tmp_path, tmp_path_factory, monkeypatch
):
    two_ranks_here = "resources.pretrain={nodes: 1, ranks_per_node: 2, minutes: 10}"
    launch("all", str(TINY), "--cluster", profile_file, "--wait", settings=[TWO_NODES, *SHORT])
    pretrain = tmp_path / "store" / "pretrain"
    receipts = [json.loads(path.read_text()) for path in pretrain.glob("*cass_vc*/receipt.json")]
    assert [receipt["world_size"] for receipt in receipts] == [2]
    assert re.fullmatch(r"n\[\d-\d\]|n\d,n\d", receipts[0]["hosts"][0]), "two nodes took part"
    on_slurm = results(tmp_path)

    again = launch("all", str(TINY), "--cluster", profile_file, settings=[TWO_NODES, *SHORT])
    assert "everything is done" in again.stdout

    elsewhere = tmp_path_factory.mktemp("local")
    places = ["--store", str(elsewhere / "store"), "--runs", str(elsewhere / "runs")]
    command = [sys.executable, "-m", "pipeline.launch", "all", str(TINY), "--cluster", "local", *places]
    subprocess.run([*command, "--set", two_ranks_here], check=True, timeout=560)
    assert results(elsewhere) == on_slurm


@pytest.mark.timeout(900)
def test_failing_method_stops_no_other_and_is_named_in_the_tables(testbed, launch, profile_file, tmp_path):
    diverging = "{lr: 1.0e+30, clip_grad: null, warmup_epochs: 0}"
    methods = f"methods={{supervised: {{}}, broken: {{method: simclr, train: {diverging}}}}}"
    broken = [methods, "finetune.protocols=[linear]"]
    launched = launch(
        "all", str(TINY), "--cluster", profile_file, "--wait", settings=[*broken, *SHORT], check=2
    )
    said = "the loss is not finite"
    assert said in launched.stderr
    found = states(tmp_path)
    assert {state for task, state in found.items() if "broken" not in task} == {"done"}
    assert {state for task, state in found.items() if task.startswith("pretrain/tiny-broken")} == {"failed"}
    assert {state for task, state in found.items() if task.startswith("finetune/tiny-broken")} == {
        "cancelled"
    }
    table = pd.read_csv(tmp_path / "runs" / "tiny" / "tables" / "results.csv")
    assert set(table.loc[table.method == "broken", "status"]) == {"missing"}
    assert set(table.loc[table.method != "broken", "status"]) == {"done"}
    assert said in (tmp_path / "runs" / "tiny" / "tables" / "report.md").read_text()


@pytest.mark.timeout(900)
def test_site_without_accounting(testbed_without_accounting, launch, profile_file, tmp_path):
    launch("pretrain", str(TINY), "--cluster", profile_file, "--wait", settings=SHORT)
    found = states(tmp_path)
    assert {state for task, state in found.items() if task.startswith(("shard", "pretrain"))} == {"done"}
    assert {state for task, state in found.items() if task.startswith("finetune")} == {"waiting"}


@pytest.mark.timeout(900)
def test_arrays_are_split_at_the_sites_limit(testbed_with_small_arrays, launch, profile_file, tmp_path):
    one_each = [
        "resources.finetune.tasks_per_job=1",
        "methods={supervised: {}}",
        "finetune.protocols=[linear]",
    ]
    settings = [*one_each, "finetune.fractions=[0.01, 0.02, 0.05]", *SHORT]
    launched = launch("all", str(TINY), "--cluster", profile_file, "--wait", settings=settings)
    jobs = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["jobs"]
    arrays = {job.split("_")[0] for task, job in jobs.items() if task.startswith("finetune")}
    assert len(arrays) > 2, "two backbones of six tasks each do not fit into arrays with indices up to 4"
    assert len(pd.read_csv(tmp_path / "runs" / "tiny" / "tables" / "results.csv")) == 12, launched.stdout


GPU_SITE = """
partition: gpu
device: cuda
stages:
  shard: {partition: cpu}
  aggregate: {partition: cpu}
"""


@pytest.mark.parametrize(
    "option", ["gpu_type: a100", "gpu_type: a100\ngpu_option: gres", "extra: {gres: 'gpu:a100:1'}"]
)
def test_only_stages_that_compute_on_a_gpu_are_given_one(testbed_with_gpus, launch, tmp_path, option):
    """Slurm itself refuses a job that asks for a GPU in a partition without any."""
    site = tmp_path / "site.yaml"
    site.write_text(f"{GPU_SITE}{option}\n")
    for partition in ("cpu", "gpu"):  # nothing is to start
        subprocess.run(["scontrol", "update", f"PartitionName={partition}", "State=DOWN"], check=True)
    launch("all", str(TINY), "--cluster", str(site), settings=["methods={supervised: {}}", *SHORT])
    fields = "Name:64|,Partition:16|,tres-per-node:32|,"
    queue = subprocess.run(["squeue", "--noheader", "-O", fields], capture_output=True, text=True, check=True)
    asked = {
        (name.split("-")[1], partition, gpus)
        for name, partition, gpus in (
            [cell.strip() for cell in line.split("|")[:3]] for line in queue.stdout.splitlines()
        )
    }
    launch("cancel", "tiny")
    assert {(stage, partition) for stage, partition, _ in asked} == {
        ("shard", "cpu"),
        ("pretrain", "gpu"),
        ("finetune", "gpu"),
        ("aggregate", "cpu"),
    }
    assert all(("a100:1" in gpus) == (partition == "gpu") for _, partition, gpus in asked), asked


@pytest.mark.timeout(900)
def test_submission_from_inside_a_job(testbed, tmp_path):
    script = REPOSITORY / "slurm" / "launch.sbatch"
    arguments = [str(TINY), "--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
    only_shards = ["--only", "shard", "--set", "resources.shard.minutes=10"]
    environment = {**os.environ, "PYTHON": sys.executable}
    sbatch = ["sbatch", "--parsable", "--chdir", str(tmp_path), str(script)]
    subprocess.run([*sbatch, *arguments, *only_shards], check=True, env=environment, capture_output=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("store/shard/*/receipt.json")):
        logs = "".join(path.read_text() for path in tmp_path.glob("launch-*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)
