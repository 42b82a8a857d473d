"""What `status` says of each task: at work, about to be, or waiting for its turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import inspection, launch
from pipeline.errors import UserError
from pipeline.lock import lock
from pipeline.manifest import Manifest, Receipt, Task
from pipeline.running import LocalRun, LocalRuns
from pipeline.specs import Resources
from pipeline.states import task_states
from slurm import JobState, seconds


def task(stage: str, name: str, *needs: str) -> Task:
    return Task(f"{stage}/{name}", stage, {}, needs, "0" * 64, Resources().model_dump(mode="json"))


SHARD, FIRST, SECOND = (
    task("shard", "x"),
    task("finetune", "x-1", "shard/x"),
    task("finetune", "x-2", "shard/x"),
)


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    made = Manifest({"name": "x"}, str(tmp_path / "store"), (SHARD, FIRST, SECOND), cluster="local")
    made.write(tmp_path / "runs" / "x" / "manifest.json")
    for one in made.tasks:
        made.folder(one).mkdir(parents=True)
    return made


def leave(manifest: Manifest, one: Task, *, progress: bool = False, receipt: bool = False) -> None:
    folder = manifest.folder(one)
    if progress:
        (folder / "progress.json").write_text(json.dumps({"done": 1, "total": 4, "text": "step"}))
    if receipt:
        said = dict(metrics={}, files={}, started="", ended="", seconds=3.0, hosts=[], world_size=1)
        Receipt(key=one.key, task=one.id, stage=one.stage, **said).write(folder)


def states(manifest: Manifest, folder: Path) -> list[str]:
    return [state.state for state in inspection.current_states(manifest, folder)[0]]


def test_what_starts_here_is_starting_and_what_waits_is_queued(manifest, tmp_path, capsys):
    folder = tmp_path / "runs" / "x"
    runs = LocalRuns(
        cpus=2,
        jobs=[
            LocalRun(name="shard/x", tasks=["shard/x"], started=0.0),
            LocalRun(name="finetune/x-1 +1", tasks=["finetune/x-1", "finetune/x-2"], after=["shard/x"]),
        ],
    )
    with lock(folder / "manifest.lock"):
        runs.write(folder)
        assert states(manifest, folder) == ["starting", "queued", "queued"]
        leave(manifest, SHARD, progress=True)
        assert states(manifest, folder) == ["running", "queued", "queued"]
        leave(manifest, SHARD, receipt=True)
        runs.jobs[0].ended, runs.jobs[1].started = True, 1.0
        runs.write(folder)
        assert states(manifest, folder) == ["done", "starting", "queued"]
        inspection.status(folder)
        said = capsys.readouterr().out
        assert "starting: finetune/x-1\n" in said and said.splitlines()[1].split()[:4] == [
            "stage",
            "done",
            "running",
            "starting",
        ]
        leave(manifest, FIRST, progress=True)
        assert states(manifest, folder) == ["done", "running", "queued"]
        leave(manifest, FIRST, receipt=True)
        assert states(manifest, folder) == ["done", "done", "starting"]
        inspection.status(folder)
        said = capsys.readouterr().out
        assert "ETA 0:" in said and "ETA 0:00" not in said
        inspection.status(folder, as_json=True)
        assert json.loads(capsys.readouterr().out)["eta_seconds"] >= 1
    assert "starting" not in states(manifest, folder), "the launcher is gone"


@pytest.mark.parametrize(
    ("word", "progress", "expected"),
    [
        ("PENDING", False, ["queued", "queued"]),
        ("CONFIGURING", False, ["starting", "starting"]),
        ("RUNNING", False, ["starting", "queued"]),
        ("RUNNING", True, ["running", "queued"]),
        ("COMPLETING", True, ["running", "queued"]),
        ("PENDING", True, ["queued", "queued"]),
        ("CANCELLED", False, ["cancelled", "cancelled"]),
        ("NODE_FAIL", False, ["failed", "failed"]),
    ],
)
def test_on_slurm_a_job_that_runs_is_starting_until_its_task_says_so(manifest, word, progress, expected):
    """Two tasks share a job."""
    manifest.jobs.update({"finetune/x-1": "7_0", "finetune/x-2": "7_0"})
    leave(manifest, FIRST, progress=progress)
    found = task_states(manifest, {"shard/x"}, {"7_0": JobState(word)}, launcher_alive=False)
    assert [state.state for state in found] == ["done", *expected]


def test_running_times_of_slurm_are_seconds():
    assert [seconds(text) for text in ("0:05", "1:02:03", "2-03:00:00", "", "INVALID")] == [
        5,
        3723,
        183600,
        0,
        0,
    ]


def call(verb: str, runs: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        launch.main([verb, "--runs", str(runs), *words])
    return int(ended.value.code or 0)


def test_status_of_no_experiment_is_that_of_the_only_or_newest_run(manifest, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert call("status", runs) == 0
    assert capsys.readouterr().out.startswith("x on local")
    other = Manifest({"name": "other"}, str(tmp_path / "store"), (SHARD,), cluster="local")
    other.write(runs / "other" / "manifest.json")
    assert call("status", runs) == 0
    assert capsys.readouterr().out.startswith("other on local")
    manifest.write(runs / "x" / "manifest.json")
    assert call("status", runs) == 0
    assert capsys.readouterr().out.startswith("x on local")
    assert call("cancel", runs) == 2
    assert "cancel which experiment?" in capsys.readouterr().err
    assert call("status", tmp_path / "nowhere") == 2
    assert "nothing has been launched" in capsys.readouterr().err


def test_launcher_on_another_machine_is_named_and_not_ended(manifest, tmp_path):
    folder = tmp_path / "runs" / "x"
    (folder / "manifest.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "user": "eve"}))
    with pytest.raises(UserError, match=r"runs on elsewhere \(process 1\): cancel it there"):
        inspection.cancel(folder)


def test_running_file_of_somebody_else_is_no_traceback(manifest, tmp_path):
    folder = tmp_path / "runs" / "x"
    with lock(folder / "manifest.lock"):
        for text in (
            "[]",
            '{"jobs": 5}',
            '{"jobs": [{"name": "a", "tasks": ["finetune/none"], "started": 1.0}]}',
        ):
            (folder / "running.json").write_text(text)
            assert states(manifest, folder) == ["queued"] * 3
