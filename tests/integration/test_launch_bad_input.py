"""What a mistake gets: one line on stderr that names it, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.launch import main
from pipeline.lock import lock
from pipeline.manifest import Manifest, Receipt
from pipeline.plan import plan
from pipeline.stages.runner import run_task
from pipeline.view import print_outcome

STAGE = [sys.executable, "-m", "pipeline.stages.pretrain"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of 14 images of noise."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for number in range(14):
            pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    rows = [f"{label}/{number}.png,{label}" for label in ("cat", "dog") for number in range(14)]
    (root / "labels.csv").write_text("\n".join(["path,label", *rows]))
    (root / "twice.csv").write_text("\n".join(["path,label", *rows, rows[0]]))
    return root


@pytest.fixture
def given(images) -> dict:
    return {
        "name": "mini",
        "dataset": {"source": "folder", "root": str(images)},
        "backbones": {"cnn": {"name": "test_resnet"}},
        "methods": {"supervised": {}},
        "seeds": [0],
        "pretrain": {"epochs": 1, "batch_size": 8, "image_size": 16, "probe_epochs": None},
        "finetune": {"protocols": ["knn"], "fractions": [1.0]},
    }


@pytest.fixture
def launch(tmp_path, given, capsys):
    """``launch(*arguments)`` is the command line in this test's folders: (exit code, stderr)."""
    file = tmp_path / "mini.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))

    def run(verb: str, *arguments: str, experiment: Path = file) -> tuple[int, str]:
        places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
        with pytest.raises(SystemExit) as ended:
            main([verb, str(experiment), "--cluster", "local", *places, *arguments])
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def refused(ended: tuple[int, str], *words: str) -> None:
    code, said = ended
    assert code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    for word in words:
        assert word in said


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("pretrain.epoch=3", ["pretrain.epoch", "did you mean 'epochs'"]),
        ("pretrain.epochs=-1", ["pretrain.epochs", "greater than 0", "-1"]),
        ("pretrain.epochs=.inf", ["pretrain.epochs", "finite"]),
        ("pretrain.epochs=[1", ["--set pretrain.epochs", "not valid YAML"]),
        ("pretrain={epochs: 1, epochs: 2}", ["epochs", "twice"]),
        ("pretrain", ["KEY=VALUE"]),
        ("seeds=[-1]", ["seeds", "-1"]),
        ("methods=[byol, byol]", ["methods", "byol", "twice"]),
        ("finetune.fractions=[]", ["finetune.fractions"]),
        ("finetune.fractions=[0.1, 0.10000000001]", ["10 %", "twice"]),
        ("backbones.cnn.args={a: .nan}", ["backbones.cnn.args", "plain values"]),
        ("name=../../evil", ["name", "letters, digits"]),
        ("dataset.name=..", ["dataset.name", "letters, digits"]),
        ("methods={../../evil: {method: byol}}", ["methods", "letters, digits"]),
        ('methods={"a\\nb": {method: byol}}', ["methods", "letters, digits"]),
    ],
)
def test_setting_that_is_wrong(launch, setting, words, tmp_path):
    refused(launch("all", *settings(setting)), *words)
    assert not (tmp_path / "store").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["found no mapping"]),
        (b"\xff\xfe\x00", ["not UTF-8"]),
        (b"seeds: [0]\nname: a\nseeds: [1]\n", [":3:", "seeds", "twice", "line 1"]),
        (b"a: \xc3\xa4\n\tb: 1\n", [":2:", "not valid YAML"]),
        (b"a: " + b"[" * 2000 + b"]" * 2000, ["levels deep"]),
        (b"a: &a\n  b: *a\n", ["in itself"]),
        (
            b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1) if c > 97 else b"x"] * 10))
                     for c in range(97, 108)),
            ["aliases"],
        ),
        (b"a: !!python/object/apply:os.getcwd []\n", [":1:", "not valid YAML"]),
    ],
    ids=["empty", "binary", "twice", "tab", "deep", "circle", "aliases", "tag"],
)  # fmt: skip
def test_file_that_is_no_experiment(launch, tmp_path, content, words):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    refused(launch("plan", experiment=file), str(file), *words)


def test_two_tasks_of_one_name(launch):
    data = "datasets={a: {source: digits}, a-b: {source: digits}}"
    methods = "methods={b-c: {method: byol}, c: {method: byol}}"
    refused(launch("plan", *settings("dataset=null", data, methods)), "two tasks", "a-b-c")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "shrd"], ["--only", "did you mean 'shard'"]),
        (["--only", "finetune"], ["nothing can be run", "shard/mini", "not done"]),
        (["--stor", "x"], ["--stor"]),
        (["--cluster", "lokal"], ["--cluster lokal", "local, slurm"]),
        (["--cluster", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ],
)
def test_argument_that_is_wrong(launch, arguments, words):
    refused(launch("all", *arguments), *words)


@pytest.mark.parametrize("verb", ["alll", "statsu"])
def test_verb_that_is_misspelt(launch, verb):
    refused(launch(verb), "unknown verb", "did you mean")


def test_status_of_what_was_never_launched(launch):
    refused(launch("status", experiment=Path("nothing")), "nothing has been launched as 'nothing'")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["dataset.root=/nowhere"], ["/nowhere", "does not exist"]),
        (["dataset.classes=[cat, bird]"], ["'dog'", "not in the list"]),
        (["dataset.classes=[cat, dog, bird]"], ["class 'bird' has no folder in", "'cat', 'dog'"]),
        (["dataset.classes=[cat, dog, dog]"], ["'dog'", "twice"]),
        (["dataset.source=csv", "dataset.csv=none.csv"], ["none.csv", "does not exist"]),
        (["dataset.source=csv", "dataset.path_column=pth"], ["'pth'", "did you mean 'path'"]),
        (["dataset.source=csv", "dataset.csv=twice.csv"], ["cat/0.png", "twice"]),
        (["dataset.unlabelled=[/nowhere]"], ["/nowhere"]),
    ],
)
def test_data_that_is_wrong_is_found_before_any_job(launch, pairs, words, tmp_path):
    refused(launch("shard", *settings(*pairs)), *words)
    assert not list((tmp_path / "store").iterdir())


def test_empty_class(launch, images, tmp_path):
    root = tmp_path / "root"
    (root / "empty").mkdir(parents=True)
    refused(launch("shard", *settings(f"dataset.root={root}")), str(root / "empty"), "no image")


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["backbones.cnn.name=resnet5000"], ["resnet5000", "did you mean 'resnet50"]),
        (["backbones.cnn.name=test_vit"], ["test_vit", "CNN"]),
        (["backbones.cnn.weights=/nowhere/w.pth"], ["/nowhere/w.pth", "not found"]),
    ],
)
def test_names_only_timm_and_torch_know_are_checked_before_any_job(launch, pairs, words, tmp_path):
    refused(launch("all", *settings(*pairs)), *words)
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize("key", ["pretrain.augment", "finetune.augment", "methods.dino.train.augment"])
def test_a_recipe_that_is_not_there_is_named_with_its_key(launch, key):
    refused(launch("plan", *settings(f"{key}=lihgt")), key, "'lihgt'", "did you mean 'light'")


def test_gpu_that_is_not_there(launch, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused(launch("all", *settings("resources.pretrain.device=cuda")), "GPU", "pretrain/mini")


def test_store_that_is_a_file_or_below_one(launch, tmp_path):
    (tmp_path / "store").write_text("")
    refused(launch("all"), str(tmp_path / "store"), "is a file")
    refused(launch("all", "--store", str(tmp_path / "store" / "below")), "not writable")


def test_no_slurm_and_no_controller(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    refused(launch("all", "--cluster", "slurm"), "no Slurm here", "--cluster local")
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "scontrol"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 'slurm error: unable to contact' >&2\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    refused(launch("all", "--cluster", "auto"), "unable to contact", "--cluster local")
    assert not (tmp_path / "runs").exists()


def test_manifest_held_by_another_launcher(launch, tmp_path):
    with lock(tmp_path / "runs" / "mini" / "manifest.lock"):
        refused(launch("all"), "held by", f"process {os.getpid()}", "since 20")


def test_store_and_manifest_of_another_format(launch, tmp_path, given):
    task = plan(load_experiment(str(tmp_path / "mini.yaml")))[0]
    folder = tmp_path / "store" / task.folder
    folder.mkdir(parents=True)
    (folder / "receipt.json").write_text('{"format": 99}')
    refused(launch("all"), str(folder), "format version 99")
    (folder / "receipt.json").unlink()
    (tmp_path / "runs" / "mini").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "mini" / "manifest.json").write_text('{"format": 99}')
    refused(launch("all"), "manifest.json", "format 99")


def test_job_that_fails_by_the_users_fault_is_told_in_one_line(launch, tmp_path):
    root = tmp_path / "root"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        (root / label / "1.jpg").write_text("no image")
    refused(
        launch("shard", *settings(f"dataset.root={root}")), "shard/mini", "no readable image", "cat/1.jpg"
    )
    assert not list((tmp_path / "store").rglob("*.tar"))


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_the_manifest_is_written(launch, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.manifest.write_atomically", full_disk)
    refused(launch("shard"), str(tmp_path), "No space left on device")


@pytest.mark.parametrize("where", ["pipeline.stages.shard.run", "pipeline.stages.runner.Receipt.write"])
def test_full_disk_in_a_stage_or_at_its_receipt(manifest, tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(UserError, match=r"shard/mini-.*No space left on device"):
        run_task(manifest, "shard/mini")
    left = json.loads(next((tmp_path / "store").rglob("error.json")).read_text())
    assert left["user_error"] and "No space left on device" in left["message"]
    assert not list((tmp_path / "store").rglob("receipt.json"))


def test_error_of_a_job_that_could_leave_no_file_is_read_from_its_log(manifest, tmp_path, capsys):
    log = tmp_path / "job.err"
    log.write_text("warning: …\nerror: shard/mini: /disk cannot be written\nTraceback …\n")
    made = Manifest.read(manifest)
    code = print_outcome(made, tmp_path / "runs" / "mini", made.tasks[:1], {"shard/mini": (log,)})
    refused((code, capsys.readouterr().err), "shard/mini", "/disk cannot be written")


@pytest.fixture
def broken_torchvision(tmp_path) -> str:
    """A PYTHONPATH on which torchvision fails as one of another PyTorch does."""
    package = tmp_path / "path" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    return str(package.parent)


@pytest.fixture
def manifest(tmp_path, launch) -> Path:
    """The experiment's manifest, with nothing done."""
    experiment = load_experiment(str(tmp_path / "mini.yaml"))
    made = Manifest(experiment.resolved(), str(tmp_path / "store"), plan(experiment))
    made.write(tmp_path / "manifest.json")
    return tmp_path / "manifest.json"


def by_hand(manifest: Path, task: str, **environment: str) -> tuple[int, str]:
    command = [*STAGE, "--manifest", str(manifest), "--task", task]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stderr


def test_stage_by_hand(manifest, tmp_path):
    """Wrong task, wrong stage, need not done, half a torchrun environment."""
    task = "pretrain/mini-supervised-cnn-s0"
    refused(by_hand(manifest, "pretrain/mini-supervisd-cnn-s0"), "did you mean", task)
    refused(by_hand(manifest, "finetune/mini"), "not a pretrain task")
    refused(by_hand(manifest, task), "needs shard/mini", "not done")
    refused(by_hand(manifest, task, RANK="0"), "torchrun", "WORLD_SIZE")
    refused(by_hand(tmp_path / "none.json", task), "none.json")


def test_torchvision_that_does_not_fit_torch(manifest, broken_torchvision, tmp_path):
    """The launcher's preflight and a stage by hand say how to install a pair that fits."""
    advice = ["operator torchvision::nms does not exist", "pip install --force-reinstall torch torchvision"]
    places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "pipeline.launch", "all", str(tmp_path / "mini.yaml"), *places]
    environment = {**os.environ, "PYTHONPATH": broken_torchvision}
    done = subprocess.run([*command, "--cluster", "local"], capture_output=True, text=True, env=environment)
    refused((done.returncode, done.stderr), *advice)

    made = Manifest.read(manifest)
    shard = made.tasks[0]
    made.folder(shard).mkdir(parents=True)
    Receipt(shard.key, shard.id, "shard", {}, {}, "", "", 0.0, [], 1).write(made.folder(shard))
    task = "pretrain/mini-supervised-cnn-s0"
    refused(by_hand(manifest, task, PYTHONPATH=broken_torchvision), *advice)
    left = json.loads(next((tmp_path / "store" / "pretrain").glob("*/error.json")).read_text())
    assert left["user_error"] and advice[1] in left["message"]
