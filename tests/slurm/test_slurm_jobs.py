"""Submission, states, dependencies and requeueing on a real Slurm."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import calls
import pytest

import slurm
from slurm import Profile, Request, SlurmError, job_states

REPOSITORY = Path(slurm.__file__).parents[1]
SHORT = Request(minutes=5)


@pytest.fixture
def submit(profile, tmp_path):
    """``submit_array`` with everything that most tests do not care about."""

    def submit(*work, name="test", request=SHORT, profile=profile, after_ok=(), after_any=()):
        folder = tmp_path / "logs"
        return slurm.submit_array(
            work,
            name=name,
            request=request,
            profile=profile,
            folder=folder,
            after_ok=after_ok,
            after_any=after_any,
        )

    return submit


def appears(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.1)


def test_chain_runs_in_order_and_a_failure_cancels_only_its_children(testbed, submit, wait, tmp_path):
    first = submit(calls.Write(tmp_path, "first", seconds=1))
    good, bad = submit(calls.Write(tmp_path, "good"), calls.fail, after_ok=first)
    child_of_good = submit(calls.Write(tmp_path, "child"), after_ok=[good])
    child_of_bad = submit(calls.Write(tmp_path, "never"), after_ok=[bad])
    last = submit(
        calls.Write(tmp_path, "last"), after_any=[good.split("_")[0], *child_of_good, *child_of_bad]
    )
    states = wait([*first, good, bad, *child_of_good, *child_of_bad, *last])
    assert [states[job].state for job in (*first, good, bad)] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert states[child_of_good[0]].state == states[last[0]].state == "COMPLETED"
    assert states[child_of_bad[0]].state == "CANCELLED"
    assert "a job that it needs failed" in states[child_of_bad[0]].reason
    assert calls.read(tmp_path, "first")["ended"] <= calls.read(tmp_path, "good")["started"]
    assert not (tmp_path / "never.0").exists()


def test_single_call_is_a_plain_job_and_several_are_an_array(testbed, submit, wait, tmp_path):
    (single,) = submit(calls.Write(tmp_path, "single"))
    array = submit(*(calls.Write(tmp_path, f"element{number}") for number in range(3)))
    assert single.isdigit()
    base = array[0].split("_")[0]
    assert array == [f"{base}_0", f"{base}_1", f"{base}_2"]
    assert {state.state for state in wait([single, *array]).values()} == {"COMPLETED"}
    assert calls.read(tmp_path, "element2")["environment"]["SLURM_ARRAY_TASK_ID"] == "2"


def test_job_gets_what_it_asks_for(testbed, submit, wait, tmp_path):
    request = Request(nodes=2, ranks_per_node=2, cpus_per_rank=3, memory_gb=0.5, minutes=7)
    (job,) = submit(calls.Write(tmp_path, "job"), request=request, name="with a blank")
    state = wait([job])[job]
    assert (state.state, state.exit_code) == ("COMPLETED", "0:0")
    environments = [calls.read(tmp_path, "job", rank)["environment"] for rank in range(4)]
    assert [environment["SLURM_LOCALID"] for environment in environments] == ["0", "1", "0", "1"]
    assert {environment["SLURM_CPUS_PER_TASK"] for environment in environments} == {"3"}
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"3"}
    assert environments[0]["SLURM_JOB_NAME"] == "with a blank"
    assert environments[0]["SLURM_MEM_PER_NODE"] == "512"


def test_failed_rank_takes_its_job_along(testbed, submit, wait):
    (job,) = submit(calls.last_rank_fails, request=Request(nodes=2, minutes=5))
    assert wait([job], seconds=30)[job].state == "FAILED"


def test_ranks_on_two_nodes_meet_at_the_first(testbed, submit, wait, tmp_path):
    (job,) = submit(functools.partial(calls.all_reduce, tmp_path), request=Request(nodes=2, minutes=5))
    assert wait([job])[job].state == "COMPLETED"
    said = [json.loads((tmp_path / f"sum.{rank}").read_text()) for rank in range(2)]
    assert [entry["sum"] for entry in said] == [3.0, 3.0]
    assert [entry["node"] for entry in said] == said[0]["nodes"]


@pytest.mark.parametrize("number", ["USR2", "TERM"])
def test_stopped_array_element_is_queued_again_alone_and_goes_on(testbed, submit, wait, tmp_path, number):
    request = Request(nodes=2, minutes=5)
    stopped, other = submit(
        calls.UntilStopped(tmp_path, "stopped"), calls.Write(tmp_path, "other", seconds=8), request=request
    )
    appears(tmp_path / "stopped.0.0")
    appears(tmp_path / "stopped.0.1")
    subprocess.run(["scancel", f"--signal={number}", stopped], check=True)
    reasons = set()
    deadline = time.monotonic() + 40
    while not (tmp_path / "stopped.1.0").exists() and time.monotonic() < deadline:
        reasons.add(job_states([stopped])[stopped].reason)
        time.sleep(0.3)
    states = wait([stopped, other])
    assert "requeued, waits about two minutes" in reasons
    assert {state.state for state in states.values()} == {"COMPLETED"}
    assert (tmp_path / "stopped.1.1").exists()
    assert "SLURM_RESTART_COUNT" not in calls.read(tmp_path, "other")["environment"]


def test_requeue_works_where_scontrol_is_not_to_be_had_as_in_a_container(
    testbed, submit, wait, tmp_path, profile
):
    container = f"env PATH={tmp_path}"
    in_container = profile.model_copy(update={"container": container, "python": sys.executable})
    (job,) = submit(
        calls.UntilStopped(tmp_path, "job"), request=Request(nodes=2, minutes=5), profile=in_container
    )
    appears(tmp_path / "job.0.0")
    appears(tmp_path / "job.0.1")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    assert wait([job])[job].state == "COMPLETED"
    assert (tmp_path / "job.1.0").exists()


def test_preempted_job_stops_by_itself_and_comes_back(testbed, submit, wait, tmp_path):
    whole_machine = {"nodes": 4, "cpus_per_rank": 8, "minutes": 5}
    (low,) = submit(calls.UntilStopped(tmp_path, "low"), request=Request(**whole_machine, partition="low"))
    appears(tmp_path / "low.0.3")
    (high,) = submit(calls.Write(tmp_path, "high"), request=Request(**whole_machine, partition="high"))
    states = wait([low, high])
    assert {state.state for state in states.values()} == {"COMPLETED"}
    assert (tmp_path / "low.1.0").exists()


def test_python_of_the_profile_runs_single_jobs_and_arrays(testbed, submit, wait, tmp_path, profile):
    python = tmp_path / "own python"
    python.write_text(f'#!/bin/sh\nexport STARTED_BY="$0"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    own = profile.model_copy(update={"python": str(python)})
    jobs = submit(calls.Write(tmp_path, "single"), profile=own)
    jobs += submit(calls.Write(tmp_path, "a"), calls.Write(tmp_path, "b"), profile=own)
    wait(jobs)
    for name in ("single", "a", "b"):
        assert calls.read(tmp_path, name)["environment"]["STARTED_BY"] == str(python)


def test_submission_from_inside_a_job_leaves_that_job_behind(testbed, submit, wait, tmp_path, profile):
    inner_folder = tmp_path / "inner"
    inner_folder.mkdir()
    outer_request = Request(ranks_per_node=1, cpus_per_rank=2, memory_gb=1, minutes=5)
    (outer,) = submit(
        calls.Submit(calls.Write(tmp_path, "inner"), profile, inner_folder),
        request=outer_request,
        name="outer",
    )
    assert wait([outer])[outer].state == "COMPLETED"
    inner = (inner_folder / "inner_id").read_text()
    assert wait([inner])[inner].state == "COMPLETED"
    environment = calls.read(tmp_path, "inner")["environment"]
    assert environment["SLURM_JOB_ID"] == inner
    assert environment["SLURM_JOB_NAME"] == "inner"
    assert "mask_cpu:0x1" not in environment.get("SLURM_CPU_BIND", "")
    assert environment["SLURM_CONF"] == os.environ["SLURM_CONF"]
    assert environment.get("SLURM_MEM_PER_NODE") != "1024"


def test_profile_setup_and_environment_reach_the_job(testbed, submit, wait, tmp_path, profile):
    value = "two words; 'quotes' $HOME"
    own = profile.model_copy(
        update={
            "setup": ("export FROM_SETUP=$(echo yes)",),
            "environment": {**profile.environment, "PLAIN": value},
            "extra": {"comment": "it's a test"},
        }
    )
    (job,) = submit(calls.Write(tmp_path, "job"), profile=own)
    wait([job])
    environment = calls.read(tmp_path, "job")["environment"]
    assert (environment["FROM_SETUP"], environment["PLAIN"]) == ("yes", value)


def test_failing_setup_line_fails_the_job(testbed, submit, wait, tmp_path, profile):
    own = profile.model_copy(update={"setup": ("false",)})
    (job,) = submit(calls.Write(tmp_path, "job"), profile=own)
    (child,) = submit(calls.Write(tmp_path, "child"), after_ok=[job])
    states = wait([job, child])
    assert [states[job].state, states[child].state] == ["FAILED", "CANCELLED"]


def test_refused_jobs_are_one_clear_line_and_none_stays(testbed, submit, tmp_path, profile):
    lost = profile.model_copy(update={"partition": "nowhere"})
    with pytest.raises(
        SlurmError, match=r"Slurm refuses the jobs 'test': invalid partition.*nowhere"
    ) as caught:
        submit(calls.fail, profile=lost)
    assert "\n" not in str(caught.value)


def test_cancelled_jobs_are_cancelled(testbed, submit, wait, tmp_path):
    jobs = submit(*[calls.Write(tmp_path, "job", seconds=60)] * 2)
    slurm.cancel(jobs)
    assert {state.state for state in wait(jobs).values()} == {"CANCELLED"}
    slurm.cancel(jobs)


def test_testbed_has_no_gpus(testbed):
    assert not Profile().has_gpus("pretrain")


def test_site_without_accounting(testbed_without_accounting, submit, wait, tmp_path):
    good, bad = submit(calls.Write(tmp_path, "good"), calls.fail)
    (child,) = submit(calls.Write(tmp_path, "child"), after_ok=[bad])
    states = wait([good, bad, child])
    assert [states[job].state for job in (good, bad, child)] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert states[good].exit_code == "0:0" and states[bad].exit_code != "0:0"
    assert job_states(["4000000"])["4000000"].state == "UNKNOWN"


def test_arrays_are_split_where_the_site_allows_less(
    testbed_with_small_arrays, submit, wait, tmp_path, profile
):
    limited = profile.model_copy(update={"array_limit": 3})
    work = [calls.Write(tmp_path, f"call{number}", seconds=0.5) for number in range(11)]
    jobs = submit(*work, profile=limited)
    assert [job.partition("_")[2] for job in jobs] == [*"01234", *"01234", ""]
    wait(jobs)
    ran = [calls.read(tmp_path, f"call{number}") for number in range(11)]
    most = max(sum(a["started"] <= b["started"] < a["ended"] for a in ran) for b in ran)
    assert most <= 3
    assert [entry["environment"].get("SLURM_ARRAY_JOB_ID") for entry in ran] == [
        job.split("_")[0] if "_" in job else None for job in jobs
    ]


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """A ``python`` that writes its arguments to ``arguments.RANK`` and ends."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$OMP_NUM_THREADS" "$@" > "'
        + str(tmp_path)
        + '/arguments.${SLURM_PROCID:-0}"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(path))
    return path


def sbatch(*arguments: str) -> str:
    ran = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def test_launch_script_hands_its_arguments_to_the_launcher(testbed, fake_python, wait, tmp_path):
    job = sbatch(
        f"--chdir={tmp_path}", str(REPOSITORY / "slurm/launch.sbatch"), "pbc", "--set", "dataset.root=/a b"
    )
    assert wait([job])[job].state == "COMPLETED"
    said = (tmp_path / "arguments.0").read_text().splitlines()
    assert said[1:] == ["-m", "pipeline.launch", "all", "pbc", "--set", "dataset.root=/a b"]


def test_torchrun_script_starts_one_torchrun_a_node(testbed, fake_python, wait, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_PER_NODE", "2")
    script = str(REPOSITORY / "slurm/torchrun.sbatch")
    job = sbatch(
        f"--chdir={tmp_path}", "--gpus-per-node=0", script, "--manifest", "m.json", "--task", "pretrain/a"
    )
    assert wait([job])[job].state == "COMPLETED"
    for rank in range(2):
        threads, *arguments = (tmp_path / f"arguments.{rank}").read_text().splitlines()
        assert threads == "4"
        assert arguments[:2] == ["-m", "torch.distributed.run"]
        assert {"--nnodes=2", "--nproc-per-node=2", f"--rdzv-endpoint=n1:{20000 + int(job) % 12000}"} <= {
            *arguments
        }
        assert arguments[-6:] == [
            "-m",
            "pipeline.stages.pretrain",
            "--manifest",
            "m.json",
            "--task",
            "pretrain/a",
        ]


def test_testbed_up_again_changes_nothing_and_other_settings_are_refused(testbed):
    before = testbed.daemons()
    testbed.up(testbed.settings())
    assert testbed.daemons() == before
    with pytest.raises(SlurmError, match="other settings"):
        testbed.up(type(testbed.settings())(nodes=2))
