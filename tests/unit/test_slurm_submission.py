"""What is handed to sbatch, seen by a stand-in for it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from slurm import Profile, Request, SlurmError, submit_array
from slurm.job import Call
from slurm.submission import _share, private_folder

GOLDEN = Path(__file__).parent / "golden"


def nothing() -> None:
    pass


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """``sbatch`` counts ids up from 1, keeps script and environment, refuses after ``REFUSE_AFTER`` jobs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    kept = tmp_path / "kept"
    kept.mkdir()
    commands = {
        "sbatch": f"""
n=$(($(ls {kept} | grep -c script) + 1))
if [ "$n" -gt "${{REFUSE_AFTER:-99}}" ]; then
  echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2
  echo 'sbatch: error: Batch job submission failed' >&2
  exit 1
fi
cp "$1" {kept}/script.$n
env > {kept}/environment.$n
echo "Submitted batch job $n"
""",
        "scontrol": "echo 'MaxArraySize            = 4'\n",
        "scancel": f'echo "$@" > {kept}/cancelled\n',
        "srun": "exit 1\n",
    }
    for name, text in commands.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)
    return kept


def submit(tmp_path, number=1, **changes):
    options = {"name": "test", "request": Request(), "profile": Profile(), "folder": tmp_path / "logs"}
    return submit_array([nothing] * number, **{**options, **changes})


def script(fake_slurm: Path, tmp_path: Path, number: int = 1) -> str:
    text = (fake_slurm / f"script.{number}").read_text()
    return text.replace(str(tmp_path / "logs"), "/FOLDER").replace(sys.executable, "/PYTHON")


RICH = Profile.model_validate(
    {
        "partition": "gpu",
        "account": "it's mine",
        "qos": "normal",
        "constraint": "a100&ib",
        "exclude": "node1",
        "setup": ["module load cuda"],
        "environment": {"NOTE": "two words $HOME"},
        "container": "apptainer exec --nv 'my image.sif'",
        "requeue": False,
        "array_limit": 2,
        "extra": {"reservation": "course", "exclusive": True, "hint": "nomultithread", "spread-job": False},
    }
)


@pytest.mark.parametrize("name", ["single", "array"])
def test_batch_script_is_the_golden_one(fake_slurm, tmp_path, name):
    if name == "single":
        submit(tmp_path, request=Request(minutes=600), after_ok=["1", "2_3"], after_any=["4"])
    else:
        request = Request(
            nodes=2,
            ranks_per_node=4,
            cpus_per_rank=8,
            memory_gb=1.5,
            minutes=90,
            gpus_per_rank=1,
            partition="big",
        )
        submit(tmp_path, 3, name="pbc-pretrain", request=request, profile=RICH)
    made, golden = script(fake_slurm, tmp_path), GOLDEN / f"sbatch_{name}.sh"
    assert made == golden.read_text(), f"to accept the new text: write it to {golden}"


def test_single_call_is_a_plain_job(fake_slurm, tmp_path):
    assert submit(tmp_path) == ["1"]
    assert "--array" not in script(fake_slurm, tmp_path)


def test_calls_beyond_the_greatest_array_are_split_and_share_the_limit(fake_slurm, tmp_path):
    ids = submit(tmp_path, 9, profile=Profile(array_limit=5))
    assert ids == ["1_0", "1_1", "1_2", "1_3", "2_0", "2_1", "2_2", "2_3", "3"]
    assert "--array=0-3%2" in script(fake_slurm, tmp_path, 1)
    assert "--array=0-3%2" in script(fake_slurm, tmp_path, 2)
    assert [sum(_share(limit, 3, number) for number in range(3)) for limit in (3, 4, 5, 100)] == [
        3,
        4,
        5,
        100,
    ]


def test_refusal_is_one_line_and_cancels_what_was_accepted(fake_slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSE_AFTER", "1")
    with pytest.raises(SlurmError) as caught:
        submit(tmp_path, 6)
    assert str(caught.value) == (
        "Slurm refuses the jobs 'test': QOSMaxSubmitJobPerUserLimit; Batch job submission failed"
    )
    assert (fake_slurm / "cancelled").read_text().split() == ["1"]


def test_folder_of_pickles_is_private(fake_slurm, tmp_path):
    (tmp_path / "logs").mkdir(mode=0o777)
    submit(tmp_path)
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700


def test_folder_that_slurm_would_misread_is_refused(tmp_path):
    with pytest.raises(SlurmError, match="Slurm replaces '%'"):
        private_folder(tmp_path / "100%")


def test_submission_from_inside_a_job_hides_it_but_keeps_the_site(fake_slurm, tmp_path, monkeypatch):
    inside = {"SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "mask", "SLURM_MEM_PER_NODE": "9", "MASTER_ADDR": "n1"}
    kept = {"SLURM_CONF": "/etc/own.conf", "SBATCH_ACCOUNT": "mine"}
    for name, value in {**inside, **kept}.items():
        monkeypatch.setenv(name, value)
    submit(tmp_path)
    environment = (fake_slurm / "environment.1").read_text().splitlines()
    assert not [line for line in environment if line.split("=")[0] in inside]
    assert {f"{name}={value}" for name, value in kept.items()} <= set(environment)
    assert os.environ["SLURM_CPU_BIND"] == "mask"


def test_signal_comes_late_in_a_short_job(fake_slurm, tmp_path):
    submit(tmp_path, request=Request(minutes=2))
    assert "--signal=USR2@30" in script(fake_slurm, tmp_path)


def test_no_slurm_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="no Slurm here: 'sbatch' is not on the PATH; use --cluster local"):
        submit(tmp_path)


def test_leftover_of_a_killed_start_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    monkeypatch.setenv("SUBMITIT_LOCAL_GLOBALID", "0")
    for name in ("5_submitted.pkl.save_tmp", "5_0_result.pkl.save_tmp", "5_1_result.pkl.save_tmp"):
        (tmp_path / name).touch()
    assert Call(lambda: "ran")() == "ran"
    assert [path.name for path in tmp_path.iterdir()] == ["5_1_result.pkl.save_tmp"]
