"""A launch on this machine, from command line to tables: what runs, what is left alone, what is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from pipeline.launch import main

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
LESS = [
    "methods={supervised: {}}",
    "backbones={cnn: {name: test_resnet}}",
    "seeds=[0]",
    "finetune.protocols=[linear]",
    "finetune.fractions=[0.1]",
    "report.bootstrap=10",
]

pytestmark = pytest.mark.xdist_group("launch")  # they share one finished experiment


class Launcher:
    """The command line in one folder; what it did is read from what it printed."""

    def __init__(self, folder: Path, capsys) -> None:
        self.folder, self.capsys = folder, capsys
        self.out = self.err = ""

    def __call__(self, verb: str, *arguments: str, settings=(), code: int = 0) -> set[str]:
        """Run a command; returns the tasks (``stage/name``) whose jobs it started."""
        places = ["--store", str(self.folder / "store"), "--runs", str(self.folder / "runs")]
        sets = [word for setting in (*LESS, *settings) for word in ("--set", setting)]
        with pytest.raises(SystemExit) as ended:
            main([verb, TINY, "--cluster", "local", *places, *sets, *arguments])
        self.out, self.err = self.capsys.readouterr()
        assert (ended.value.code or 0) == code, self.out + self.err
        started = [line.split() for line in self.out.splitlines() if " started " in line]
        return {words[words.index("started") + 1] for words in started}

    def receipts(self, stage: str) -> list[Path]:
        return sorted((self.folder / "store" / stage).glob("*/receipt.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An experiment that has run to its tables."""
    folder = tmp_path_factory.mktemp("finished")
    places = ["--store", str(folder / "store"), "--runs", str(folder / "runs")]
    sets = [word for setting in LESS for word in ("--set", setting)]
    with pytest.raises(SystemExit) as ended:
        main(["all", TINY, "--cluster", "local", *places, *sets])
    assert not ended.value.code
    return folder


@pytest.fixture
def launch(finished, tmp_path, capsys) -> Launcher:
    """A launcher in a copy of the finished experiment."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Launcher(tmp_path, capsys)


@pytest.mark.slow
def test_everything_is_done_and_the_tables_exist(launch):
    for stage in ("shard", "pretrain", "finetune", "aggregate"):
        assert launch.receipts(stage), stage
    tables = launch.folder / "runs" / "tiny" / "tables"
    results = pd.read_csv(tables / "results.csv")
    assert list(results["status"]) == ["done"] and results["macro_f1"].notna().all()
    for name in ("summary.csv", "gains.csv", "cost.csv", "report.md"):
        assert (tables / name).stat().st_size


@pytest.mark.slow
def test_second_launch_starts_nothing(launch):
    assert launch("all") == set()
    assert "everything is done" in launch.out
    assert launch("status", "--json") == set()
    assert {task["state"] for task in json.loads(launch.out)["tasks"]} == {"done"}


@pytest.mark.slow
def test_another_fraction_runs_only_finetune_and_aggregate(launch):
    started = launch("all", settings=["finetune.fractions=[0.2]"])
    assert started == {"finetune/tiny-supervised-cnn-linear-20pc-s0", "aggregate/tiny"}


@pytest.mark.slow
def test_deleted_receipt_runs_that_task_and_the_tables(launch):
    launch.receipts("finetune")[0].unlink()
    assert launch("all") == {"finetune/tiny-supervised-cnn-linear-10pc-s0", "aggregate/tiny"}


@pytest.mark.slow
def test_tables_that_are_no_longer_made_do_not_stay(launch):
    tables = launch.folder / "runs" / "tiny" / "tables"
    (tables / "mine.csv").write_text("a note")
    before = {path.name for path in tables.iterdir()}
    assert launch("all", settings=["report.metric=accuracy"]) == {"aggregate/tiny"}
    after = {path.name for path in tables.iterdir()}
    assert before - after == {"macro_f1_tiny.png"} and after - before == {"accuracy_tiny.png"}


def test_tables_come_out_for_whoever_launches_a_finished_store_with_other_runs(launch):
    shutil.rmtree(launch.folder / "runs")
    assert launch("all") == set()
    tables = launch.folder / "runs" / "tiny" / "tables"
    assert f"tables: {tables}/ (" in launch.out and (tables / "summary.csv").is_file()
    (tables / "results.csv").write_text("somebody's notes\n")
    assert launch("all") == set()
    assert len(pd.read_csv(tables / "results.csv")) == 1


def test_tables_that_could_not_be_published_are_no_success_and_come_with_the_next_launch(launch, monkeypatch):
    """A full disk at that moment, or a kill; the receipt of the tables is written before."""
    tables = launch.folder / "runs" / "tiny" / "tables"
    shutil.rmtree(tables)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.publication.write_atomically", _disk_full)
        launch("all", code=2)
        assert "cannot be put into" in launch.err and "everything is done" not in launch.out
    shutil.rmtree(tables)
    launch("status")
    assert f"waiting: aggregate/tiny: its tables are made, but not in {tables}" in launch.out
    tables.write_text("in the way")
    launch("all", code=2)
    assert f"{tables} is a file" in launch.err
    tables.unlink()
    assert launch("all") == set()
    assert (tables / "results.csv").is_file()
    launch("status")
    assert "waiting: " not in launch.out


@pytest.mark.slow
def test_links_planted_in_a_shared_store_are_not_written_through(launch, tmp_path_factory):
    """In the place of every file that the tasks write, and of their folders."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    store, victims = launch.folder / "store", {}
    results = (launch.folder / "runs" / "tiny" / "tables" / "results.csv").read_bytes()
    for number, path in enumerate(sorted(store.rglob("*"))):
        if path.is_file():
            victim = elsewhere / str(number)
            victim.write_text("precious")
            victims[path.relative_to(store)] = victim
            path.unlink()
            path.symlink_to(victim)
    for folder in store.glob("*/*"):
        (folder / "checkpoints").mkdir(exist_ok=True)
        os.mkfifo(folder / "checkpoints" / "pipe")
    assert len(victims) > 15
    assert len(launch("all")) == 4
    assert {victim.read_text() for victim in victims.values()} == {"precious"}
    assert not [path for path in store.rglob("*") if path.is_symlink() or path.is_fifo()]
    assert (launch.folder / "runs" / "tiny" / "tables" / "results.csv").read_bytes() == results
    target = elsewhere / "folder"
    target.mkdir()
    shutil.rmtree(store / "finetune")
    (store / "finetune").symlink_to(target)
    launch("all", code=2)
    assert f"{store / 'finetune'} is a link" in launch.err and not list(target.iterdir())


@pytest.mark.slow
def test_cancel_ends_a_launcher_in_another_terminal_and_the_same_command_goes_on(launch):
    settings = ["pretrain.epochs=400", "pretrain.checkpoint_steps=20", "methods={bn_refresh: {}}"]
    command = [sys.executable, "-m", "pipeline.launch", "pretrain", TINY, "--cluster", "local"]
    places = ["--store", str(launch.folder / "store"), "--runs", str(launch.folder / "runs")]
    sets = [word for setting in (*LESS, *settings) for word in ("--set", setting)]
    running = subprocess.Popen(
        [*command, *places, *sets], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = set()
    deadline = time.monotonic() + 60
    while not list(launch.folder.glob("store/pretrain/*bn_refresh*/checkpoints/*.pt")):
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()[0]
        launch("status", "--json")
        seen |= {
            task["state"] for task in json.loads(launch.out)["tasks"] if task["id"].startswith("pretrain/")
        }
        time.sleep(0.1)
    assert {"starting", "running"} <= seen
    launch("cancel")
    assert f"cancelled: the launcher (process {running.pid}) has ended its jobs" in launch.out
    assert running.wait(5) == 130 and "the same command goes on from here" in running.communicate()[0]
    launch("cancel")
    assert launch.out == "nothing to cancel\n"
    launch("status")
    assert (
        "running" not in launch.out.split("pretrain")[1]
        and not (launch.folder / "runs/tiny/running.json").exists()
    )
    assert launch("pretrain", settings=settings) == {"pretrain/tiny-bn_refresh-cnn-s0"}
    logs = "".join(path.read_text() for path in (launch.folder / "runs/tiny/logs").glob("*_log.err"))
    assert "going on after step" in logs


def test_what_is_not_there_is_not_pointed_to(tmp_path, capsys):
    launch = Launcher(tmp_path, capsys)
    launch("shard")
    assert "summary.csv" not in launch.out


def _disk_full(path: Path, *_, **__) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_dry_run_touches_nothing(tmp_path, capsys):
    launch = Launcher(tmp_path, capsys)
    assert launch("all", "--dry-run") == set()
    assert "4 to run" in launch.out and not list(tmp_path.iterdir())
    assert "every check passed" in launch.out and "memory a node" in launch.out


def test_dry_run_tells_of_all_that_a_launch_would_refuse(tmp_path, capsys):
    launch = Launcher(tmp_path, capsys)
    wrong = [
        "dataset.source=folder",
        "dataset.root=/nowhere/at/all",
        "backbones.cnn.name=resnet_that_is_none",
    ]
    launch("all", "--dry-run", settings=wrong, code=2)
    assert "/nowhere/at/all" in launch.err and "resnet_that_is_none" in launch.err
    assert launch.err.count("error: ") == 2 and not list(tmp_path.iterdir())
    launch("plan", settings=wrong[:2], code=2)  # which imports no torch: the net's name is not looked at
    assert "/nowhere/at/all" in launch.err and "to run" in launch.out


@pytest.mark.slow
def test_failed_task_is_named_and_the_others_run(launch):
    """What can fail in the job only is one line, with exit code 2, and the tables name the method."""
    diverging = "{lr: 1.0e+30, clip_grad: null, warmup_epochs: 0}"
    methods = f"methods={{supervised: {{}}, broken: {{method: simclr, train: {diverging}}}}}"
    started = launch("all", settings=[methods], code=2)
    assert started == {"pretrain/tiny-broken-cnn-s0", "aggregate/tiny"}
    assert launch.err.startswith("error: pretrain/tiny-broken-cnn-s0: ") and launch.err.count("\n") == 1
    assert "the loss is not finite" in launch.err
    results = pd.read_csv(launch.folder / "runs" / "tiny" / "tables" / "results.csv")
    assert dict(zip(results["method"], results["status"])) == {"supervised": "done", "broken": "missing"}


@pytest.mark.slow
def test_damaged_shard_is_named_and_exits_2(launch):
    launch("all")  # its manifest is now this folder's
    tar = next((launch.folder / "store" / "shard").glob("*/train-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    assert launch("verify", code=1) == set()
    assert str(tar) in launch.out
    launch("all", settings=["seeds=[1]"], code=2)
    assert str(tar) in launch.err


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damaged", ["shard/*/train-000000.tar", "shard/*/samples.csv", "pretrain/*/cnn/model.safetensors"]
)
def test_flipped_bit_is_found_before_use_and_repaired(launch, damaged):
    launch("all")
    before = (launch.folder / "runs" / "tiny" / "tables" / "results.csv").read_bytes()
    (path,) = (launch.folder / "store").glob(damaged)
    sound = path.read_bytes()
    flip(path)
    launch("all", settings=["finetune.fractions=[0.2]"], code=2)
    assert str(path) in launch.err and "verify tiny --repair" in launch.err
    launch("all")  # nothing reads it: everything is done
    launch("verify", "--repair", code=1)
    assert str(path) in launch.out
    stage = damaged.split("/")[0]
    started = launch("all")
    assert {task.split("/")[0] for task in started} == {"shard", "pretrain", "finetune", "aggregate"} - (
        {"shard"} if stage == "pretrain" else set()
    )
    assert path.read_bytes() == sound
    assert (launch.folder / "runs" / "tiny" / "tables" / "results.csv").read_bytes() == before
    launch("verify")


@pytest.mark.slow
def test_damaged_receipt_is_named_and_its_task_runs_again(launch):
    launch("all")  # its manifest is now this folder's
    (path,) = launch.receipts("pretrain")
    sound = json.loads(path.read_bytes())
    path.write_bytes(path.read_bytes().replace(b'"world_size": 1', b'"world_size": 3'))
    assert json.loads(path.read_bytes()) != sound
    launch("verify", code=1)
    assert f"{path}: is not as it was written" in launch.out
    started = launch("all")
    assert f"{path} is not as it was written: pretrain/" in launch.err
    assert {task.split("/")[0] for task in started} == {"pretrain", "finetune", "aggregate"}
    assert json.loads(path.read_bytes())["metrics"]["health"] == sound["metrics"]["health"]
    launch("verify")


@pytest.mark.slow
def test_damaged_predictions_are_named_in_the_tables_not_counted(launch):
    (path,) = (launch.folder / "store" / "finetune").glob("*/predictions.npz")
    flip(path)
    launch("all", settings=["report.bootstrap=11"])  # other tables of the same tasks
    tables = launch.folder / "runs" / "tiny" / "tables"
    assert list(pd.read_csv(tables / "results.csv")["status"]) == ["failed"]
    assert str(path) in (tables / "report.md").read_text()
