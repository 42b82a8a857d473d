"""Mistakes are told before anything waits or trains, and all of them at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards
from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.plan import plan
from pipeline.preflight import preflight
from pipeline.stages import shard
from pipeline.stages.work import Work
from slurm import SlurmError, load_profile

EXPERIMENT = """name: early
dataset: {source: folder, root: ROOT}
backbones: {cnn: {name: resnet10t}}
methods: {supervised: {}}
seeds: [0]
pretrain: {epochs: 0.5, batch_size: 4, image_size: 32, probe_epochs: null}
finetune: {protocols: [knn], fractions: [1.0]}
"""


def folders(root: Path, *classes: str) -> None:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(100 * number + i).integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def experiment(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = EXPERIMENT.replace("ROOT", str(tmp_path / "data"))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "early.yaml"
    path.write_text(text)
    return path


def launch(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "pipeline.launch", *arguments, *places]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment, errors="replace"
    )


def test_one_class_is_refused_before_anything_trains_for_it(tmp_path: Path) -> None:
    folders(tmp_path / "data", "only")
    path = str(experiment(tmp_path))
    ran = launch(tmp_path, "all", path, "--cluster", "local")
    assert ran.returncode == 2 and "only one class, 'only': fine-tuning needs at least two" in ran.stderr
    assert not list((tmp_path / "store").glob("*/*"))
    assert launch(tmp_path, "shard", path, "--cluster", "local").returncode == 0  # for pretraining it is good
    ran = launch(tmp_path, "all", path, "--cluster", "local")
    assert ran.returncode == 2 and "only one class" in ran.stderr
    assert not list((tmp_path / "store" / "pretrain").glob("*"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("{features_only: true}", r"builds a FeatureListNet, which has no forward_"),
        ('{global_pool: ""}', r"gives features of the shape \(512, 1, 1\) where a vector of 512"),
        ("{in_chans: 1}", "cannot take images of 32 pixels"),
        ("{output_stride: 5}", "resnet10t"),
    ],
)
def test_args_with_which_no_net_can_work_are_refused(args: str, said: str, tmp_path: Path) -> None:
    folders(tmp_path / "data", "a", "b")
    path = experiment(tmp_path, ("{name: resnet10t}", f"{{name: resnet10t, args: {args}}}"))
    with pytest.raises(UserError, match=said):
        preflight(plan(load_experiment(str(path))))


def test_all_mistakes_of_an_experiment_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    path = experiment(
        tmp_path,
        ("seeds: [0]", "seeds: [-1]"),
        ("epochs: 0.5", "epoch: 0.5"),
        ("protocols: [knn]", "protocols: [nearest]"),
    )
    ran = launch(tmp_path, "plan", str(path))
    lines = ran.stderr.splitlines()
    assert ran.returncode == 2 and len(lines) == 3
    assert all(line.startswith(f"error: {path}:") for line in lines)
    assert {line.split(":")[2] for line in lines} == {"5", "6", "7"}
    assert any("did you mean 'epochs'" in line for line in lines)


def test_mistakes_of_several_methods_and_sections_are_told_together(tmp_path: Path) -> None:
    path = experiment(
        tmp_path,
        ("{supervised: {}}", "{dinoo: {}, dino: {options: {out_dim: -1}}, simclr: {train: {lr: fast}}}"),
        ("protocols: [knn]", "protocols: [knn], select_by: acuracy"),
    )
    with pytest.raises(UserError) as refused:
        load_experiment(str(path))
    said = [str(one) for one in refused.value.errors]  # type: ignore[attr-defined]
    for part in ("did you mean 'dino'", "out_dim", "simclr.train.lr", "unknown metric 'acuracy'"):
        assert sum(part in line for line in said) == 1, part


def test_mistakes_of_the_profile_are_told_with_those_of_the_experiment(tmp_path: Path) -> None:
    path = experiment(tmp_path, ("seeds: [0]", "seeds: [-1]"))
    (tmp_path / "cluster.yaml").write_text(
        "partition: main\ndevice: gpu\nstages:\n  shard: {minutes: 0}\nnods: 2\n"
    )
    ran = launch(tmp_path, "plan", str(path), "--cluster", str(tmp_path / "cluster.yaml"))
    lines = ran.stderr.splitlines()
    assert ran.returncode == 2 and len(lines) == 4
    assert [line.split(":")[2] for line in lines] == ["5", "2", "4", "5"]
    assert "unknown key 'nods'" in lines[-1] and "stages.shard.minutes" in lines[2]
    with pytest.raises(SlurmError, match=r"cluster\.yaml:2: device: 'gpu'"):
        load_profile(tmp_path / "cluster.yaml")


def test_names_are_utf8_in_any_locale(tmp_path: Path) -> None:
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "en_US.ISO-8859-1")],
        capture_output=True,
        check=False,
    )
    if not (tmp_path / "en_US.ISO-8859-1").exists():
        pytest.skip(f"no such locale can be made here: {made.stderr!r}")
    folders(tmp_path / "data", "chât", "chien")
    path = experiment(tmp_path)
    ran = launch(
        tmp_path, "shard", str(path), "--cluster", "local", LOCPATH=str(tmp_path), LC_ALL="en_US.ISO-8859-1"
    )
    assert ran.returncode == 0, ran.stderr
    (index,) = (tmp_path / "store" / "shard").glob("*/index.json")
    assert '"chât"' in index.read_text(encoding="utf-8")


def test_fractions_by_group_are_refused_before_anything_runs_where_there_are_no_groups(
    tmp_path: Path,
) -> None:
    folders(tmp_path / "data", "a", "b")
    path = experiment(
        tmp_path,
        ("fractions: [1.0]", "fractions: [0.5, 1.0], fractions_by: group"),
        ("resnet10t", "test_resnet"),
    )
    said = "fractions_by: group draws whole groups .patients., and early has none"
    tasks = plan(load_experiment(str(path)))
    with pytest.raises(UserError, match=said):
        preflight(tasks)
    ran = launch(tmp_path, "all", str(path), "--cluster", "local")
    assert ran.returncode == 2 and "finetune.fractions_by" in ran.stderr and ran.stderr.count("\n") == 1
    assert not list((tmp_path / "store").glob("*/*"))
    with pytest.raises(UserError, match="and digits has none"):  # images that are no files
        preflight(plan(load_experiment("quickstart", ["finetune.fractions_by=group"])))
    source = shards.FolderSource(tmp_path / "data")
    shards.write(source, tmp_path / "shards", shards.ShardOptions(processes=1))
    later = [task for task in tasks if task.stage != "shard"]
    with pytest.raises(UserError, match=said):  # of a data set that is there
        preflight(later, {"shard/early": tmp_path / "shards"})
    table = "".join(f"{c}/{i}.png,{c},{c}{i // 3}\n" for c in "ab" for i in range(12))
    (tmp_path / "data" / "labels.csv").write_text("path,label,patient\n" + table)
    text = path.read_text().replace("source: folder", "source: csv, group_column: patient")
    path.write_text(text)
    preflight(plan(load_experiment(str(path))))


def test_splits_that_are_given_are_not_repeated(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folders(tmp_path / "data" / split, "a", "b")
    path = experiment(tmp_path, ("folder,", "folder, splits: {repeats: 2},"))
    tasks = plan(load_experiment(str(path)))
    said = r"splits.repeats: the source of early gives splits \(test, train\)"
    with pytest.raises(UserError, match=said):
        preflight(tasks)
    table = experiment(tmp_path, ("folder,", "csv, split_column: fold, splits: {repeats: 2},"))
    with pytest.raises(UserError, match=r"early.yaml:2: dataset.splits.repeats: .* split_column \(fold\)"):
        load_experiment(str(table))


def test_the_shard_stage_refuses_to_repeat_given_splits_by_itself(tmp_path: Path) -> None:
    folders(tmp_path / "data" / "train", "a", "b")
    folders(tmp_path / "data" / "test", "a", "b")
    path = experiment(
        tmp_path, ("folder,", "folder, splits: {repeats: 2}, near_duplicates: warn, duplicates: keep,")
    )
    task = next(task for task in plan(load_experiment(str(path))) if task.id == "shard/early-r2")
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=r"splits.repeats: the source of early gives splits \(test\)"):
        shard.run(Work(task=task, folder=folder))
