"""The pretrain stage under torchrun, as a user starts it by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "tiny.yaml"
PYTHON = [sys.executable, "-m"]


@pytest.mark.slow
def test_torchrun_runs_the_stage_on_two_ranks(tmp_path):
    places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
    launch = [*PYTHON, "pipeline.launch", "shard", str(TINY), "--cluster", "local", *places]
    subprocess.run(launch, check=True, cwd=tmp_path, capture_output=True)
    manifest = tmp_path / "runs" / "tiny" / "manifest.json"
    torchrun = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    task = ["--manifest", str(manifest), "--task", "tiny-cass_vc-cnn-vit-s0"]
    stage = ["-m", "pipeline.stages.pretrain", *task]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *stage], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (receipt,) = (tmp_path / "store" / "pretrain").glob("tiny-cass_vc-*/receipt.json")
    said = json.loads(receipt.read_text())
    assert said["world_size"] == 2
    assert {"cnn/model.safetensors", "vit/model.safetensors", "log.jsonl"} <= set(said["files"])
    assert "rank 1 of 2" in done.stdout
