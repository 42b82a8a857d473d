"""How jobs ask for GPUs: only the stages that compute on one, by number or by type, and what cannot work."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from pipeline.campaign import request_of
from pipeline.jobs import Job, arrays, pack
from pipeline.manifest import Task
from pipeline.methods.registry import METHODS
from pipeline.specs import Resources
from pipeline.stages import STAGES
from slurm import LocalJob, LocalScheduler, Profile, Request, SlurmError, visible_gpus
from slurm.gpus import gpu_options
from slurm.profiles import _has_gpus
from slurm.submission import parameters

ONE = Request(gpus_per_rank=1)
FOUR = Request(ranks_per_node=4, gpus_per_rank=1)


def job(stage: str, device: str) -> Job:
    task = Task(f"{stage}/a", stage, {}, (), "0" * 64, Resources(device=device).model_dump(mode="json"))
    return Job(task.id, stage, (task,), ())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_only_stages_that_compute_on_a_gpu_ask_for_one(stage, device):
    expected = int(stage in ("search", "pretrain", "finetune"))
    assert request_of(job(stage, device), gpu_there=True).gpus_per_rank == expected


def pretraining(method: str, device: str, *, tasks_per_job: int = 1) -> Task:
    resources = Resources(device=device, tasks_per_job=tasks_per_job).model_dump(mode="json")
    return Task(f"pretrain/{method}", "pretrain", {"method": method}, ("shard/a",), "0" * 64, resources)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_pretrainings_without_steps_ask_for_no_gpu(method, device):
    (made,) = pack([pretraining(method, device)])
    expected = int(method != "supervised" or device == "cuda")  # which says so outright
    assert request_of(made, gpu_there=True).gpus_per_rank == expected


@pytest.mark.parametrize(("device", "expected"), [("auto", 1), ("cpu", 0)])
def test_a_profile_of_gpus_alone_asks_for_one_without_steps_too(device, expected):
    """Its partition may take no job without one."""
    (made,) = pack([pretraining("supervised", device)])
    assert request_of(made, gpu_there=False, everywhere=True).gpus_per_rank == expected


@pytest.mark.parametrize("tasks_per_job", [1, 16])
def test_tasks_with_and_without_a_gpu_share_no_job_and_no_array(tasks_per_job):
    tasks = [
        pretraining(name, "auto", tasks_per_job=tasks_per_job) for name in ("supervised", "simclr", "cass")
    ]
    asked = {
        task.id: request_of(array[0], gpu_there=True).gpus_per_rank
        for array in arrays(pack(tasks))
        for job in array
        for task in job.tasks
    }
    assert asked == {"pretrain/supervised": 0, "pretrain/simclr": 1, "pretrain/cass": 1}


@pytest.mark.parametrize(
    ("profile", "request_", "options"),
    [
        ({}, ONE, {"gpus-per-node": "1"}),
        ({"gpu_type": "a100"}, FOUR, {"gpus-per-node": "a100:4"}),
        ({"gpu_option": "gres"}, FOUR, {"gres": "gpu:4"}),
        ({"gpu_option": "gres", "gpu_type": "a100"}, FOUR, {"gres": "gpu:a100:4"}),
        (
            {"gpu_type": "a100", "extra": {"gres": "lustre:1"}},
            ONE,
            {"gpus-per-node": "a100:1", "gres": "lustre:1"},
        ),
        ({"gpu_option": "gres", "extra": {"gres": "lustre:1"}}, ONE, {"gres": "lustre:1,gpu:1"}),
        ({"extra": {"gpus-per-node": "a100:1"}}, ONE, {"gpus-per-node": "a100:1"}),
        ({"extra": {"gres": "gpu:a100:1"}}, ONE, {"gres": "gpu:a100:1"}),
        ({"extra": {"gres": "gres/gpu:a100:1"}}, ONE, {"gres": "gres/gpu:a100:1"}),
        ({"extra": {"gres": "gpumem:10G"}}, ONE, {"gpus-per-node": "1", "gres": "gpumem:10G"}),
        ({"gpu_type": "a100"}, dataclasses.replace(ONE, gpu_type="v100"), {"gpus-per-node": "v100:1"}),
        ({"gpu_type": "a100_1g.5gb"}, ONE, {"gpus-per-node": "a100_1g.5gb:1"}),
        ({"gpu_type": "a100", "extra": {"gres": "gpu:a100:1,lustre:1"}}, Request(), {"gres": "lustre:1"}),
        ({"gpu_type": "a100", "extra": {"gpus-per-node": "a100:1"}}, Request(), {}),
    ],
)
def test_exactly_one_option_asks_for_gpus_and_none_where_none_is_used(profile, request_, options):
    profile = Profile.model_validate(profile)
    assert gpu_options(request_, profile) == options
    made = parameters("n", request_, profile, Path("logs"), None, 1)
    given = made["additional_parameters"]
    assert "gpus_per_node" not in made
    assert {name: given[name] for name in ("gpus-per-node", "gres") if name in given} == options


@pytest.mark.parametrize(
    ("profile", "request_", "complaint"),
    [
        ({"gpu_type": "a100_1g.5gb"}, FOUR, r"slices of a GPU \(MIG\) serve one rank each"),
        ({"gpu_type": "1g.10gb"}, Request(nodes=2, gpus_per_rank=1), "MIG"),
        ({"extra": {"gres": "gpu:2g.10gb:4"}}, FOUR, "MIG"),
        ({"extra": {"gpus-per-node": "a100:1"}}, FOUR, "fewer GPUs a node than the 4 ranks"),
        ({"extra": {"gres": "gpu:a100"}}, FOUR, "fewer GPUs a node than the 4 ranks"),
    ],
)
def test_gpus_that_the_ranks_cannot_use_are_refused(profile, request_, complaint):
    with pytest.raises(SlurmError, match=complaint):
        Profile.model_validate(profile).request("pretrain", request_)


def test_a_stage_can_leave_out_what_the_profile_says():
    own = {
        "partition": "gpu",
        "constraint": "ib",
        "stages": {"shard": {"partition": "cpu", "constraint": None}},
    }
    profile = Profile.model_validate(own)
    made = parameters("n", profile.request("shard", Request()), profile, Path("logs"), None, 1)
    assert (made["partition"], made["constraint"]) == ("cpu", None)
    made = parameters("n", profile.request("pretrain", ONE), profile, Path("logs"), None, 1)
    assert (made["partition"], made["constraint"]) == ("gpu", "ib")


def test_whether_there_is_a_gpu_is_asked_of_the_stages_own_partition(tmp_path, monkeypatch):
    said = {
        "": "main*|(null)\ngpu|gpu:a100:2\n",
        "gpu": "gpu|craynetwork:4,gpu:a100:2\n",
        "cpu": "cpu|(null)\n",
    }
    monkeypatch.setattr(
        "slurm.profiles.ask",
        lambda command: said[next((w.split("=")[1] for w in command if w.startswith("--partition=")), "")],
    )
    _has_gpus.cache_clear()
    profile = Profile.model_validate({"partition": "gpu", "stages": {"finetune": {"partition": "cpu"}}})
    assert profile.has_gpus("pretrain") and not profile.has_gpus("finetune")
    assert not Profile().has_gpus("pretrain"), "the default partition has none"
    _has_gpus.cache_clear()


def test_slices_of_this_machines_gpus_go_to_one_rank_each(tmp_path, monkeypatch):
    listed = (
        "GPU 0: NVIDIA A100 (UUID: GPU-a)\n  MIG 1g.5gb Device  0: (UUID: MIG-b)\n"
        "  MIG 1g.5gb Device  1: (UUID: MIG-c)\nGPU 1: NVIDIA A100 (UUID: GPU-d)\n"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("slurm.local.shutil.which", lambda name: name)
    monkeypatch.setattr(
        "slurm.local.subprocess.run", lambda *a, **k: subprocess.CompletedProcess(a, 0, listed, "")
    )
    assert visible_gpus() == ("MIG-b", "MIG-c", "GPU-d")
    two = LocalJob("two", print, Request(ranks_per_node=2, gpus_per_rank=1))
    with pytest.raises(SlurmError, match="MIG"):
        LocalScheduler(tmp_path).run([two])
