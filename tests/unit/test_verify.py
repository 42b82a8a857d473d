"""verify --repair withdraws what is damaged when it holds the lock, not what was so hours before."""

from __future__ import annotations

import contextlib

import pytest

from pipeline import inspection
from pipeline.experiment_file import load_experiment
from pipeline.manifest import Manifest, Receipt, describe_files
from pipeline.plan import plan


@pytest.fixture
def folder(tmp_path):
    """An experiment with three finished tasks, two of which are damaged: a file, a receipt."""
    experiment = load_experiment("quickstart")
    manifest = Manifest(experiment.resolved(), str(tmp_path / "store"), plan(experiment))
    manifest.write(tmp_path / "manifest.json")
    for task in manifest.tasks[:3]:
        finish(manifest, task)
    (manifest.folder(manifest.tasks[0]) / "log.jsonl").write_text("other")
    damaged = manifest.folder(manifest.tasks[1]) / "receipt.json"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    return tmp_path


def finish(manifest, task):
    place = manifest.folder(task)
    place.mkdir(parents=True, exist_ok=True)
    (place / "log.jsonl").write_text("sound")
    said = dict(key=task.key, task=task.id, stage=task.stage, metrics={}, files=describe_files(place))
    Receipt(**said, started="", ended="", seconds=1.0, hosts=["h"], world_size=1).write(place)


def receipts(folder):
    manifest = Manifest.read(folder / "manifest.json")
    return [(manifest.folder(task) / "receipt.json").exists() for task in manifest.tasks[:3]]


def test_damaged_tasks_are_withdrawn(folder, capsys):
    first, second = (task.id for task in Manifest.read(folder / "manifest.json").tasks[:2])
    assert inspection.verify(folder) == 1
    looked = capsys.readouterr().out
    assert receipts(folder) == [True, True, True]
    assert inspection.verify(folder, repair=True) == 1
    assert receipts(folder) == [False, False, True]
    said = [f"the next launch runs again: {name}, and what depends on it\n" for name in (first, second)]
    assert capsys.readouterr().out == looked + "".join(said)


@pytest.mark.parametrize("again", [0, 1])
def test_task_that_ran_again_while_verify_was_hashing_keeps_its_receipt(folder, monkeypatch, capsys, again):
    manifest = Manifest.read(folder / "manifest.json")
    lock = inspection.lock

    @contextlib.contextmanager
    def lock_after_a_launch(path):
        finish(manifest, manifest.tasks[again])
        with lock(path) as held:
            yield held

    monkeypatch.setattr(inspection, "lock", lock_after_a_launch)
    assert inspection.verify(folder, repair=True) == 1
    assert receipts(folder) == [again == 0, again == 1, True]
    assert f"again: {manifest.tasks[again].id}," not in capsys.readouterr().out
