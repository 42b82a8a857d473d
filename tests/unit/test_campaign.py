"""What a launch gives to Slurm, seen at the one call that submits an array."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

import slurm
from pipeline import inspection
from pipeline.campaign import Campaign
from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.files import read_regular
from pipeline.manifest import Manifest, Receipt, Task
from slurm import JobState

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


class FakeSlurm:
    """Numbers the arrays that it is given; every job is in the state that ``states`` says."""

    def __init__(self) -> None:
        self.arrays: list[dict] = []
        self.states: dict[str, JobState] = {}
        self.cancelled: list[str] = []
        self.submitted = 100
        self.cluster, self.now = "here", "2026-01-01T00:00:00"

    def submit_array(self, calls, **options) -> list[str]:
        self.submitted += 1
        ids = [f"{self.submitted}_{number}" for number in range(len(calls))]
        tasks = {task for call in calls for task in call.tasks}
        self.arrays.append({**options, "ids": ids, "tasks": tasks})
        return ids

    def all_are(self, state: str, **but: str) -> None:
        """From now on every job so far is in that state, but for those named by their id."""
        ids = [job for array in self.arrays for job in array["ids"]]
        self.states = {job: JobState(but.get(f"job{job}", state)) for job in ids}


@pytest.fixture
def fake(monkeypatch) -> FakeSlurm:
    fake = FakeSlurm()
    monkeypatch.setattr(slurm, "require_controller", lambda: None)
    monkeypatch.setattr(slurm, "submit_array", fake.submit_array)
    monkeypatch.setattr(slurm, "job_states", lambda ids, submissions=None: fake.states)
    monkeypatch.setattr(slurm, "cancel", lambda ids, submissions=None: fake.cancelled.extend(ids))
    monkeypatch.setattr(slurm, "site_config", lambda: {"ClusterName": fake.cluster})
    monkeypatch.setattr(slurm, "submit_times", lambda numbers, submissions: dict.fromkeys(numbers, fake.now))
    return fake


STAGES = ("shard", "pretrain", "finetune", "aggregate")


def campaign(folder: Path, *settings: str, cluster: str | None = None) -> Campaign:
    profile = folder / "site.yaml"
    profile.write_text("device: cpu\n")
    return Campaign(
        load_experiment(TINY, ["methods={supervised: {}}", *settings]),
        store=folder / "store",
        runs=folder / "runs",
        cluster=cluster or str(profile),
    )


def leave_receipt(launched: Campaign, task: Task, **changes) -> None:
    said = dict(metrics={}, files={}, started="", ended="", seconds=1.0, hosts=["h"], world_size=1)
    receipt = Receipt(key=task.key, task=task.id, stage=task.stage, **{**said, **changes})
    receipt.write(launched.manifest.folder(task))


def test_each_array_waits_for_the_jobs_of_what_it_needs(tmp_path, fake):
    launched = campaign(tmp_path)
    launched.launch(STAGES)
    jobs = launched.manifest.jobs
    assert fake.arrays[0]["name"].startswith("tiny-shard-")
    for array in fake.arrays[1:]:
        assert array["after_ok"] or array["after_any"], array["name"]
    assert fake.arrays[1]["after_ok"] == [jobs["shard/tiny"]]


def test_no_array_waits_for_a_job_that_ended_without_its_task(tmp_path, fake):
    campaign(tmp_path).launch(["shard", "pretrain"])  # all of these fail: no receipt, and Slurm forgets them
    assert len(fake.arrays) == 2
    fake.arrays.clear()
    campaign(tmp_path).launch(["aggregate"])
    (aggregation,) = fake.arrays
    assert list(aggregation["after_any"]) == []


def test_an_array_waits_for_a_job_that_an_earlier_launch_submitted(tmp_path, fake):
    first = campaign(tmp_path)
    first.launch(["shard"])
    job = first.manifest.jobs["shard/tiny"]
    fake.states = {job: JobState("RUNNING")}
    fake.arrays.clear()
    campaign(tmp_path).launch(["shard", "pretrain"])
    assert [array["after_ok"] for array in fake.arrays] == [[job]]


@pytest.fixture
def orphans(tmp_path, fake, monkeypatch) -> tuple[str, list[str]]:
    """The name of jobs whose launcher died while it submitted them; a list of names that are cancelled."""
    cancelled: list[str] = []
    monkeypatch.setattr(slurm, "cancel_named", cancelled.append)

    def die(calls, **options):
        fake.arrays.append(options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slurm, "submit_array", die)
        campaign(tmp_path).launch(["shard"])
    return fake.arrays.pop()["name"], cancelled


def test_jobs_of_a_launcher_that_died_while_submitting_are_found_by_their_name(tmp_path, fake, orphans):
    name, cancelled = orphans
    campaign(tmp_path).launch(["shard"])
    assert cancelled == [name] and fake.arrays[0]["name"] != name
    campaign(tmp_path).launch(["shard"])
    assert cancelled == [name], "once"


def test_launcher_that_was_taken_over_while_it_submitted_cancels_what_it_has_just_submitted(
    tmp_path, fake, monkeypatch
):
    lock = tmp_path / "runs" / "tiny" / "manifest.lock"

    def stand_still(calls, **options):
        said = lock.read_text()
        lock.unlink()
        lock.write_text(said)
        return fake.submit_array(calls, **options)

    monkeypatch.setattr(slurm, "submit_array", stand_still)
    with pytest.raises(UserError, match="no longer held"):
        campaign(tmp_path).launch(["shard"])
    assert fake.cancelled == fake.arrays[0]["ids"]


def test_cancel_finds_the_jobs_of_a_launcher_that_died_while_submitting(tmp_path, orphans):
    name, cancelled = orphans
    inspection.cancel(tmp_path / "runs" / "tiny")
    assert cancelled == [name]


def test_each_array_waits_for_its_own_of_the_pretrainings_that_an_earlier_launch_submitted(tmp_path, fake):
    first = campaign(tmp_path)
    first.launch(["shard", "pretrain"])
    pretrainings = {task: job for task, job in first.manifest.jobs.items() if task.startswith("pretrain/")}
    assert len(set(pretrainings.values())) == 2
    fake.all_are("RUNNING")
    fake.arrays.clear()
    campaign(tmp_path).launch(STAGES)
    finetunings = [array for array in fake.arrays if "-finetune-" in array["name"]]
    assert len(finetunings) == 2
    for array in finetunings:
        needed = {need for task in array["tasks"] for need in first.manifest.task(task).needs}
        assert set(array["after_ok"]) == {first.manifest.jobs[need] for need in needed}


def test_jobs_of_tasks_that_the_experiment_has_no_more_are_not_forgotten(tmp_path, fake):
    campaign(tmp_path).launch(STAGES)
    fake.all_are("PENDING")
    submitted = len(fake.arrays)
    with pytest.raises(UserError, match=r"4 jobs .* `python -m pipeline.launch cancel tiny`"):
        campaign(tmp_path, "pretrain.image_size=48").launch(STAGES)
    assert len(fake.arrays) == submitted and not fake.cancelled
    fake.all_are("CANCELLED")
    campaign(tmp_path, "pretrain.image_size=48").launch(STAGES)


def test_tables_that_get_more_rows_wait_for_these_too(tmp_path, fake):
    first = campaign(tmp_path)
    first.launch(STAGES)
    tables = first.manifest.jobs["aggregate/tiny"]
    fake.all_are("PENDING")
    fake.arrays.clear()
    campaign(tmp_path, "finetune.fractions=[0.01, 0.1, 0.5]").launch(STAGES)
    assert fake.cancelled == [tables]
    assert [array["name"].split("-")[1] for array in fake.arrays] == ["finetune", "finetune", "aggregate"]


def test_what_waits_for_a_job_that_failed_waits_for_the_new_one(tmp_path, fake):
    """Else Slurm cancels it, or it makes tables without these results."""
    first = campaign(tmp_path)
    first.launch(STAGES)
    jobs = first.manifest.jobs
    failed = jobs["pretrain/tiny-supervised-vit-s0"]
    behind = {job for task, job in jobs.items() if task.startswith("finetune/tiny-supervised-vit")}
    fake.all_are("PENDING", **{f"job{failed}": "FAILED"})
    fake.arrays.clear()
    campaign(tmp_path).launch(STAGES)
    assert set(fake.cancelled) == behind | {jobs["aggregate/tiny"]}
    assert [array["name"].split("-")[1] for array in fake.arrays] == ["pretrain", "finetune", "aggregate"]


def test_receipt_that_cannot_be_read_now_is_not_thrown_away(tmp_path, fake, monkeypatch):
    launched = campaign(tmp_path)
    task = launched.manifest.tasks[0]
    leave_receipt(launched, task)
    path = launched.manifest.folder(task) / "receipt.json"

    def stale(name, **options):
        if str(name) == str(path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(name))
        return read_regular(name, **options)

    monkeypatch.setattr("pipeline.manifest.read_regular", stale)
    with pytest.raises(OSError, match="Stale"):
        campaign(tmp_path).launch(STAGES)
    assert path.exists() and not fake.arrays


def test_what_ended_while_a_launch_was_being_checked_is_left_alone(tmp_path, fake, monkeypatch):
    """Another experiment may share the store."""
    launched = campaign(tmp_path)
    task = launched.manifest.tasks[0]
    monkeypatch.setattr("pipeline.campaign.preflight", lambda pending, sharded: leave_receipt(launched, task))
    launched.launch(["shard"])
    assert launched.manifest.receipt(task) is not None and not fake.arrays


@pytest.mark.parametrize("state", ["RUNNING", "STOPPED", "REQUEUE_HOLD"])
def test_nothing_runs_here_while_slurm_has_jobs_of_it(tmp_path, fake, monkeypatch, state):
    campaign(tmp_path).launch(STAGES)
    fake.all_are(state)
    monkeypatch.setattr(slurm, "available", lambda: True)
    with pytest.raises(UserError, match="on Slurm"):
        campaign(tmp_path, cluster="local").launch(STAGES)
    monkeypatch.setattr(slurm, "available", lambda: False)
    with pytest.raises(UserError, match="cannot be asked from here"):
        campaign(tmp_path, cluster="local").launch(STAGES)


def test_a_launch_writes_down_what_its_jobs_are(tmp_path, fake):
    launched = campaign(tmp_path)
    launched.launch(STAGES)
    assert len(launched.manifest.submissions) == len(fake.arrays)
    for array in fake.arrays:
        said = launched.manifest.submissions[array["ids"][0].split("_")[0]]
        assert said == slurm.Submission(array["name"], os.getuid(), "here", fake.now)
    assert Manifest.read(launched.path) == launched.manifest


@pytest.mark.parametrize("verb", ["launch", "launch here", "cancel"])
def test_jobs_on_another_cluster_are_neither_forgotten_nor_looked_for_here(tmp_path, fake, verb, monkeypatch):
    campaign(tmp_path).launch(["shard"])
    fake.arrays.clear()
    fake.cluster = "jura"
    monkeypatch.setattr(slurm, "available", lambda: True)
    with pytest.raises(
        UserError, match=r"the Slurm cluster 'here', and this is 'jura': launch or cancel it from"
    ):
        if verb == "cancel":
            inspection.cancel(tmp_path / "runs" / "tiny")
        else:
            campaign(tmp_path, cluster="local" if verb == "launch here" else None).launch(["shard"])
    assert not fake.arrays and not fake.cancelled


def test_jobs_of_another_user_are_not_submitted_a_second_time(tmp_path, fake, monkeypatch):
    campaign(tmp_path).launch(["shard"])
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(UserError, match="by the user with the id"):
        campaign(tmp_path).launch(["shard"])


def test_a_number_that_comes_again_is_no_more_that_of_the_earlier_job(tmp_path, fake):
    first = campaign(tmp_path)
    first.launch(["shard", "pretrain"])
    (pretraining, *_) = (job for task, job in first.manifest.jobs.items() if task.startswith("pretrain/"))
    new = slurm.Submission("new")
    later = first.manifest.with_jobs({"shard/tiny": pretraining}, new)
    assert later.submissions[slurm.number_of(pretraining)] == new
    assert [task for task, job in later.jobs.items() if job == pretraining] == ["shard/tiny"]


def test_jobs_of_a_manifest_without_their_names_are_known_by_how_these_began(tmp_path, fake):
    """Of an earlier version, whose jobs may still be in the queue."""
    launched = campaign(tmp_path)
    launched.launch(["shard"])
    older = replace(launched.manifest, submissions={})
    (number,) = {slurm.number_of(job) for job in older.jobs.values()}
    assert older.job_identities == {number: slurm.Submission("tiny-shard-*")}
