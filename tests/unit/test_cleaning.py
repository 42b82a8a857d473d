"""``launch clean``: what no present experiment refers to, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cleaning import clean
from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.lock import lock
from pipeline.manifest import Manifest, Receipt
from pipeline.plan import plan


def make(store: Path, runs: Path, name: str, *settings: str) -> Manifest:
    experiment = load_experiment(
        "quickstart", [f"name={name}", "methods={supervised: {}, dino: {}}", *settings]
    )
    manifest = Manifest(experiment.resolved(), str(store), plan(experiment))
    manifest.write(runs / name / "manifest.json")
    for task in manifest.tasks:
        Receipt(task.key, task.id, task.stage, {}, {}, "", "", 0.0, [], 1).write(manifest.folder(task))
    return manifest


def folders(store: Path) -> set[str]:
    return {str(path.relative_to(store)) for path in store.glob("*/*") if path.is_dir()}


def test_only_what_no_manifest_refers_to_goes_and_only_with_yes(tmp_path, capsys):
    store, runs = tmp_path / "store", tmp_path / "runs"
    old = make(store, runs, "one", "pretrain.epochs=7")
    new = make(store, runs, "one")
    other = make(store, runs, "two", "pretrain.epochs=9")
    used = {task.folder for manifest in (new, other) for task in manifest.tasks}
    stale = {task.folder for task in old.tasks} - used
    assert stale
    assert clean(store, runs, yes=False) == 0
    said = capsys.readouterr().out
    assert f"{len(stale)} folders" in said and "--yes" in said and folders(store) == used | stale
    assert clean(store, runs, yes=True) == 0
    assert folders(store) == used
    assert clean(store, runs, yes=True) == 0 and "nothing to clean" in capsys.readouterr().out


def test_what_runs_stays_and_links_are_not_followed(tmp_path, capsys):
    store, runs = tmp_path / "store", tmp_path / "runs"
    make(store, runs, "one")
    precious = tmp_path / "precious"
    (precious / "inner").mkdir(parents=True)
    (precious / "inner" / "file").write_text("x")
    (store / "pretrain" / "link").symlink_to(precious)
    (store / "search").symlink_to(precious)
    running = store / "pretrain" / "other-dino-cnn-s0-12345678"
    stale = store / "pretrain" / "stale-dino-cnn-s0-12345678"
    for folder in (running, stale):
        folder.mkdir()
        (folder / "inside").symlink_to(precious)
    (store / "README").write_text("mine")
    with lock(running / ".lock"):
        clean(store, runs, yes=True)
    assert running.is_dir() and not stale.exists()
    assert (precious / "inner" / "file").read_text() == "x"
    assert (store / "pretrain" / "link").is_symlink() and (store / "README").is_file()


def test_without_a_manifest_or_with_one_that_cannot_be_read_nothing_goes(tmp_path):
    store, runs = tmp_path / "store", tmp_path / "runs"
    manifest = make(store, runs, "one")
    before = folders(store)
    (runs / "one" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        clean(store, runs, yes=True)
    (runs / "one" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no manifest in"):
        clean(store, runs, yes=True)
    assert folders(store) == before == {task.folder for task in manifest.tasks}
    with pytest.raises(UserError, match="no store"):
        clean(tmp_path / "nowhere", runs, yes=False)


def test_a_manifest_of_another_store_protects_nothing_here(tmp_path):
    store, runs = tmp_path / "store", tmp_path / "runs"
    make(store, runs, "one")
    make(tmp_path / "elsewhere", runs, "one")
    clean(store, runs, yes=True)
    assert folders(store) == set() and folders(tmp_path / "elsewhere")
