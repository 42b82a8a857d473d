"""A number alone does not say whose a job is: Slurm begins them again, and each cluster has its own."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "tiny.yaml"
LESS = ["methods={supervised: {}}", "backbones={cnn: {name: test_resnet}}", "finetune.protocols=[knn]"]


def sbatch(*words: str) -> str:
    command = ["sbatch", "--parsable", "--output=/dev/null", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def alive(name: str) -> int:
    command = ["squeue", "--noheader", f"--name={name}", "--states=PENDING,RUNNING"]
    return len(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def strangers_jobs_live(launch, tmp_path) -> None:
    """Give the experiment's jobs the numbers of a stranger's, as if Slurm had begun its numbers again."""
    hold = ["scontrol", "update", "PartitionName=main", "State=DOWN"]
    subprocess.run(hold, check=True)
    site = tmp_path / "site.yaml"
    site.write_text("device: cpu\n")
    try:
        launch("all", str(TINY), "--cluster", str(site), settings=LESS)
        path = tmp_path / "runs" / "tiny" / "manifest.json"
        said = json.loads(path.read_text())
        ours = {job.split("_")[0] for job in said["jobs"].values()}
        assert set(said["submissions"]) == ours
        for one in said["submissions"].values():
            assert one["cluster"] == "testbed" and one["submitted"].startswith("20"), one
        launch("cancel", "tiny")
        strangers = [sbatch("--job-name=precious", "--partition=high", "--wrap", "sleep 300") for _ in ours]
        new = dict(zip(sorted(ours), strangers, strict=True))
        said["jobs"] = {task: new[job.split("_")[0]] for task, job in said["jobs"].items()}
        said["submissions"] = {new[number]: one for number, one in said["submissions"].items()}
        path.write_text(json.dumps(said))
        again = launch("all", str(TINY), "--cluster", str(site), settings=LESS)
        assert "were submitted before" not in again.stdout, again.stdout
        mine = {job.split("_")[0] for job in json.loads(path.read_text())["jobs"].values()}
        assert mine.isdisjoint(strangers), "every task has a job of its own"
        said = json.loads(path.read_text())
        said["jobs"]["shard/tiny"] = strangers[0]
        said["submissions"][strangers[0]] = said["submissions"][min(mine)]
        path.write_text(json.dumps(said))
        launch("cancel", "tiny")
        assert alive("precious") == len(strangers)
    finally:
        subprocess.run(["scancel", "--name=precious"], check=True)
        subprocess.run([*hold[:-1], "State=UP"], check=True)


def test_strangers_jobs_are_neither_taken_for_ours_nor_cancelled(testbed, launch, tmp_path):
    strangers_jobs_live(launch, tmp_path)


def test_strangers_jobs_are_safe_without_accounting(testbed_without_accounting, launch, tmp_path):
    strangers_jobs_live(launch, tmp_path)


@pytest.mark.timeout(120)
def test_a_job_that_was_queued_again_is_still_ours(testbed, tmp_path):
    """Slurm gives it a later submit time."""
    import slurm

    number = sbatch("--job-name=again", "--requeue", "--wrap", "sleep 60")
    known = {number: slurm.Submission("again")}
    times = slurm.submit_times([number], known)
    known = {number: slurm.Submission("again", 0, "testbed", times[number])}
    deadline = time.monotonic() + 30
    while slurm.job_states([number], known)[number].state != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1.5)  # its times are whole seconds
    subprocess.run(["scontrol", "requeue", number], check=True)
    deadline = time.monotonic() + 30
    while slurm.submit_times([number], known)[number] == times[number]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert slurm.submit_times([number], known)[number] > times[number]
    assert slurm.job_states([number], known)[number].state in ("PENDING", "RUNNING")
    slurm.cancel([number], known)
    deadline = time.monotonic() + 30
    while slurm.job_states([number], known)[number].state != "CANCELLED":
        assert time.monotonic() < deadline
        time.sleep(0.2)
