"""What the launcher prints: warnings reach the user, and paths are printed as they are."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline import view
from pipeline.jobs import Job
from pipeline.live import LocalWatcher
from pipeline.manifest import Manifest, Receipt, Task
from pipeline.specs import Resources
from pipeline.states import TaskState, task_states
from slurm import JobEvent, Profile

LOST = "6 images beside the split folders are not read, e.g. images/[b]1.png"


def task(stage: str, name: str, *needs: str) -> Task:
    return Task(f"{stage}/{name}", stage, {}, needs, "0" * 64, Resources().model_dump(mode="json"))


def manifest(folder: Path, *tasks: Task) -> Manifest:
    return Manifest({"name": "tiny"}, str(folder / "store"), tasks)


def finish(made: Manifest, one: Task, warnings: list[str]) -> None:
    Receipt(
        key=one.key,
        task=one.id,
        stage=one.stage,
        metrics={"warnings": warnings},
        files={},
        started="",
        ended="",
        seconds=1.0,
        hosts=["h"],
        world_size=1,
    ).write(made.folder(one))


def test_what_a_data_set_warns_of_is_said_when_all_is_run_done_before_or_asked_for(tmp_path, capsys):
    shard, knn = task("shard", "tiny"), task("finetune", "tiny-knn", "shard/tiny")
    made = manifest(tmp_path, shard, knn)
    finish(made, shard, [LOST])
    expected = f"warning: shard/tiny: {LOST}\n"
    view.print_outcome(made, tmp_path / "runs" / "tiny", [knn])
    assert expected in capsys.readouterr().err
    view.print_nothing_to_do(made, tmp_path / "runs" / "tiny")
    assert expected in capsys.readouterr().err
    view.print_submitted(made, tmp_path / "runs" / "tiny", 1, 0, waiting=False)
    assert expected in capsys.readouterr().err
    view.print_states(made, task_states(made, {"shard/tiny"}, {}, launcher_alive=False))
    assert expected in capsys.readouterr().out


def test_many_warnings_are_counted_and_one_of_many_tasks_is_said_once(tmp_path, capsys):
    shard = task("shard", "tiny")
    trained = [task("pretrain", f"tiny-s{seed}", "shard/tiny") for seed in range(4)]
    made = manifest(tmp_path, shard, *trained)
    finish(made, shard, [f"class 'c{number}'\nhas no sample" for number in range(9)])
    for one in trained:
        finish(made, one, ["a batch holds images twice"])
    view.print_outcome(made, tmp_path / "runs" / "tiny", [shard])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert lines[:5] == [f"warning: shard/tiny: class 'c{number}' has no sample" for number in range(5)]
    assert lines[5] == "warning: shard/tiny: 4 more, in shard/tiny-00000000/receipt.json of the store"
    assert lines[6:] == ["warning: pretrain/tiny-s0, pretrain/tiny-s1 and 2 more: a batch holds images twice"]


def test_a_warning_is_said_as_soon_as_its_job_ends_if_others_still_run(tmp_path, capsys):
    shard, knn = task("shard", "tiny"), task("finetune", "tiny-knn", "shard/tiny")
    made = manifest(tmp_path, shard, knn)
    jobs = [Job(one.id, one.stage, (one,), ()) for one in (shard, knn)]
    watcher = LocalWatcher(made, jobs)
    watcher(JobEvent("started", "shard/tiny"))
    finish(made, shard, [LOST])
    capsys.readouterr()
    watcher(JobEvent("finished", "shard/tiny"))
    assert f"warning: shard/tiny: {LOST}\n" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["r[b]uns", "a[/b]", "ru ns", "it's", ":cat:", "\\[red]", "[link=x]"])
def test_paths_are_printed_as_they_are_and_commands_can_be_pasted(tmp_path, capsys, name):
    folder = tmp_path / name
    shard = task("shard", "tiny")
    made = manifest(folder, shard)
    (folder / "tiny" / "tables").mkdir(parents=True)
    (folder / "tiny" / "logs").mkdir()
    (folder / "tiny" / "tables" / "summary.csv").write_text("metric,fraction,dataset,collapsed\n")
    log = folder / "job.err"
    log.write_text("the end\n")
    view.print_plan(made, set(), jobs=0)
    view.print_nothing_to_do(made, folder / "tiny")
    view.print_outcome(made, folder / "tiny", [shard], {"shard/tiny": [log]})
    view.print_states(made, [TaskState(shard, "failed", f"in {name}", log=str(log))])
    view.print_states(made, [TaskState(shard, "queued", f"because of {name}")])
    view.print_cluster("slurm", Profile(), f"{folder}.yaml")
    said = "".join(capsys.readouterr())
    for path, times in (
        (made.store, 3),
        (folder / "tiny" / "logs", 2),
        (folder / "tiny" / "tables/ (", 1),
        (f"{folder}.yaml", 1),
        (f"log: {log}\n", 2),
        (f"in {name}\n", 1),
        (f"because of {name}\n", 1),
    ):
        assert said.count(str(path)) == times, (path, said)
    lines = [line for line in said.splitlines() if line.startswith("next:")]
    commands = [line.removeprefix("next:").split("   (logs")[0] for line in lines]
    assert [shlex.split(command)[-2:] for command in commands] == [["--runs", str(folder)]] * 2
    column = next(line for line in said.splitlines() if "column -s" in line)
    assert shlex.split(column)[4] == str(folder / "tiny" / "tables" / "summary.csv")
