"""What a launch gives to Slurm, seen at the one call that submits an array."""

from __future__ import annotations

from pathlib import Path

import pytest

import slurm
from pipeline.campaign import Campaign
from pipeline.experiment import load_experiment
from slurm import JobState

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


class FakeSlurm:
    """Numbers the arrays that it is given; every job is in the state that ``states`` says."""

    def __init__(self) -> None:
        self.arrays: list[dict] = []
        self.states: dict[str, JobState] = {}

    def submit_array(self, calls, **options) -> list[str]:
        self.arrays.append(options)
        return [f"{100 + len(self.arrays)}_{number}" for number in range(len(calls))]


@pytest.fixture
def fake(monkeypatch) -> FakeSlurm:
    fake = FakeSlurm()
    monkeypatch.setattr(slurm, "require_controller", lambda: None)
    monkeypatch.setattr(slurm, "submit_array", fake.submit_array)
    monkeypatch.setattr(slurm, "job_states", lambda ids: fake.states)
    return fake


def campaign(folder: Path) -> Campaign:
    profile = folder / "site.yaml"
    profile.write_text("device: cpu\n")
    return Campaign(
        load_experiment(TINY, ["methods={supervised: {}}"]),
        store=folder / "store",
        runs=folder / "runs",
        cluster=str(profile),
    )


def test_each_array_waits_for_the_jobs_of_what_it_needs(tmp_path, fake):
    launched = campaign(tmp_path)
    launched.launch(["shard", "pretrain", "finetune", "aggregate"])
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


def test_jobs_of_a_launcher_that_died_while_submitting_are_found_by_their_name(tmp_path, fake, monkeypatch):
    cancelled = []
    monkeypatch.setattr(slurm, "cancel_named", cancelled.append)

    def die(calls, **options):
        fake.arrays.append(options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slurm, "submit_array", die)
        campaign(tmp_path).launch(["shard"])
    orphans = fake.arrays.pop()["name"]
    campaign(tmp_path).launch(["shard"])
    assert cancelled == [orphans] and fake.arrays[0]["name"] != orphans
    campaign(tmp_path).launch(["shard"])
    assert cancelled == [orphans], "once"
