"""Keys mean results: each setting changes the keys of exactly the tasks whose result it decides."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate.protocols import PROTOCOL_NAMES
from pipeline.experiment import FinetuneSection, MethodEntry, PretrainSection
from pipeline.experiment_file import load_experiment
from pipeline.manifest import Task
from pipeline.methods.registry import METHODS
from pipeline.plan import FORMATS, plan
from pipeline.settings import (
    DRAW,
    EXECUTION,
    FINETUNE,
    ONLY_WITH,
    TRAINING,
    decides_finetuning,
    decides_training,
    defaults,
    identity,
)
from pipeline.specs import (
    Backbone,
    Dataset,
    FinetuneSettings,
    PretrainSpec,
    ReportSettings,
    Resources,
    Splits,
    Training,
)

GOLDEN = Path(__file__).parent / "golden" / "defaults.json"
EXPERIMENT = """
name: keys
datasets:
  cells: {source: csv, root: ROOT}
  pages: {source: digit_pages}
backbones:
  cnn: {name: test_resnet, weights: ROOT/weights.pth}
  vit: {name: vit_tiny_patch16_224}
methods:
  supervised: {}
  bn_refresh: {}
  dino: {}
  cass_plus: {}
  hssl: {options: {head: search}}
seeds: [0, 1]
pretrain: {seeds: first, batch_size: 32}
finetune: {fractions: [0.1, 1.0]}
"""
# Another valid value of every key. What has a companion needs it to count: it is set before and after.
OTHER: dict[str, Any] = {
    "pretrain": {
        "epochs": 50,
        "batch_size": 16,
        "accumulate": 2,
        "image_size": 64,
        "fit": "crop",
        "augment": "light",
        "optimizer": "sgd",
        "lr": 0.1,
        "lr_min": 1e-5,
        "warmup_epochs": 3,
        "schedule": "constant",
        "weight_decay": 0.2,
        "weight_decay_end": 0.3,
        "clip_grad": 1.5,
        "averaging": "ema",
        "ema_decay": 0.9,
        "swa_start": 0.5,
        "precision": "bf16",
        "sync_bn": False,
        "channels_last": False,
        "compile": True,
        "recompute": True,
        "reading": "streamed",
        "cache": "none",
        "workers": 3,
        "checkpoint_steps": 7,
        "checkpoint_seconds": 5,
        "keep_checkpoints": 4,
        "on_nan": "skip",
        "probe_epochs": 1,
    },
    "finetune": {
        "head": "random",
        "epochs": 7,
        "max_steps": 9,
        "batch_size": 8,
        "image_size": 48,
        "fit": "pad",
        "augment": "gentle",
        "optimizer": "sgd",
        "lr": 0.1,
        "lr_min": 1e-5,
        "weight_decay": 0.2,
        "patience": 3,
        "loss": "focal",
        "focal_gamma": 1,
        "class_weights": "none",
        "fractions_by": "group",
        "validation": "full",
        "select_by": "accuracy",
        "knn_k": 5,
        "head_width": 64,
        "precision": "bf16",
        "cache": "none",
        "workers": 3,
        "keep": "all",
    },
    "report": {
        "baseline": "dino",
        "metric": "accuracy",
        "bootstrap": 77,
        "confidence": 0.9,
        "compare": ["dino"],
        "compare_protocols": ["linear"],
    },
    "resources": {
        "nodes": 2,
        "ranks_per_node": 2,
        "device": "cpu",
        "cpus_per_rank": 3,
        "memory_gb": 9,
        "minutes": 11,
        "tasks_per_job": 5,
        "profile_steps": 3,
        "silence_seconds": 60,
    },
}
COMPANIONS = {
    "pretrain.ema_decay": ["pretrain.averaging=ema"],
    "pretrain.swa_start": ["pretrain.averaging=swa"],
    "pretrain.lr_min": ["pretrain.schedule=cosine"],
    "finetune.focal_gamma": ["finetune.loss=focal"],
}
# Keys of a data set, with what they need beside them.
DATASET: dict[str, tuple[Any, list[str]]] = {
    "csv": ("other.csv", []),
    "path_column": ("file", []),
    "label_columns": (["a", "b"], []),
    "label_separator": (";", []),
    "split_column": ("split", []),
    "group_column": ("patient", []),
    "classes": (["x", "y"], []),
    "unlabelled": (["more"], []),
    "splits": ({"train": 0.5, "val": 0.25, "test": 0.25}, []),
    "seed": (3, []),
    "resize": (64, []),
    "duplicates": ("drop", []),
    "near_duplicates": ("warn", []),
    "exclude": (["*_mask.png"], []),
    "intensity": ({"black": 0, "white": 4095}, []),
    "max_rejected": (0.5, []),
    "shard_samples": (10, []),
    "version": (2, []),
    "root": ("/elsewhere", []),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys")
    (root / "keys.yaml").write_text(EXPERIMENT.replace("ROOT", str(root)))
    return root


def tasks_of(folder: Path, *settings: str) -> dict[str, Task]:
    return {task.id: task for task in plan(load_experiment(str(folder / "keys.yaml"), settings))}


def changed(before: dict[str, Task], after: dict[str, Task]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name].key != after[name].key}


def with_dependants(tasks: dict[str, Task], direct: set[str]) -> set[str]:
    reached = set(direct)
    for task in tasks.values():  # in plan order
        if reached & set(task.needs):
            reached.add(task.id)
    return reached


def settings_with(key: str, value: Any) -> tuple[list[str], list[str]]:
    before = COMPANIONS.get(key, [])
    return before, [*before, f"{key}={json.dumps(value)}"]


@pytest.mark.parametrize(
    ("model", "table"), [(Training, TRAINING), (FinetuneSettings, FINETUNE)], ids=["pretrain", "finetune"]
)
def test_every_setting_says_whether_it_decides_results(model: Any, table: dict[str, Any]) -> None:
    assert set(table) == set(model.model_fields)


def test_every_key_of_the_experiment_file_is_tried_here() -> None:
    assert set(OTHER["pretrain"]) == set(Training.model_fields)
    assert set(PretrainSection.model_fields) - set(Training.model_fields) == {"seeds"}
    assert set(OTHER["finetune"]) == set(FinetuneSettings.model_fields)
    assert set(FinetuneSection.model_fields) - set(FinetuneSettings.model_fields) == {
        "protocols",
        "fractions",
    }
    assert set(OTHER["report"]) == set(ReportSettings.model_fields)
    assert set(OTHER["resources"]) == set(Resources.model_fields)
    assert set(Backbone.model_fields) == {"name", "weights", "args"}
    assert set(MethodEntry.model_fields) == {"method", "options", "train", "backbones", "weights", "seeds"}
    of_other_sources = {"name", "source", "mask_column", "images", "masks", "mask_suffix", "mask_classes"}
    of_other_sources |= {"mask_ignore", "annotations"}
    assert set(DATASET) == set(Dataset.model_fields) - of_other_sources


@pytest.mark.parametrize("name", OTHER["pretrain"])
def test_a_training_setting_reaches_the_pretrainings_that_it_decides(name: str, folder: Path) -> None:
    before, after = settings_with(f"pretrain.{name}", OTHER["pretrain"][name])
    tasks, others = tasks_of(folder, *before), tasks_of(folder, *after)
    direct = set()
    for task in tasks.values():
        if task.stage in ("search", "pretrain"):
            spec = task.spec
            own = METHODS[spec["method"]].recipe.get(name, Training.model_fields[name].default)
            assert spec["train"][name] != OTHER["pretrain"][name] or own == OTHER["pretrain"][name]
            condition, value = ONLY_WITH.get(name, ("", None))
            counts = not condition or spec["train"][condition] == value
            if decides_training(name, METHODS[spec["method"]].steps) and counts:
                direct.add(task.id)
        elif task.stage == "finetune" and name == "fit":  # unless fine-tuning says otherwise
            direct.add(task.id)
    if name == "epochs":  # a search has a length of its own, but its warm-ups are shares of it
        direct |= {task.id for task in tasks.values() if task.stage == "search"}
    assert changed(tasks, others) == with_dependants(tasks, direct)
    if TRAINING[name] == EXECUTION:
        assert not direct
        assert any(
            others[task].spec["train"][name] == OTHER["pretrain"][name]
            for task in tasks
            if task.startswith("pretrain/")
        )  # and reaches the stage all the same


@pytest.mark.parametrize("name", OTHER["finetune"])
def test_a_fine_tuning_setting_reaches_the_protocols_that_it_decides(name: str, folder: Path) -> None:
    before, after = settings_with(f"finetune.{name}", OTHER["finetune"][name])
    tasks, others = tasks_of(folder, *before), tasks_of(folder, *after)
    direct = {
        task.id
        for task in tasks.values()
        if task.stage == "finetune" and decides_finetuning(name, task.spec["protocol"], task.spec["fraction"])
    }
    if name in DRAW:  # all labels are all labels
        assert {task.spec["fraction"] for task in tasks.values() if task.id in direct} == {0.1}
    assert changed(tasks, others) == with_dependants(tasks, direct)
    assert direct or FINETUNE[name] == EXECUTION or name == "head_width"


def test_protocols_of_the_table_exist() -> None:
    for protocols in FINETUNE.values():
        assert protocols == EXECUTION or protocols <= set(PROTOCOL_NAMES)


@pytest.mark.parametrize("name", DATASET)
def test_a_key_of_a_data_set_reaches_all_that_is_made_of_it(name: str, folder: Path) -> None:
    value, needed = DATASET[name]
    tasks = tasks_of(folder, *needed)
    others = tasks_of(folder, *needed, f"datasets.cells.{name}={json.dumps(value)}")
    if name == "label_columns":  # several: another kind of labels, the same tasks
        assert others["shard/cells"].key != tasks["shard/cells"].key
        return
    assert changed(tasks, others) == with_dependants(tasks, {"shard/cells"})


@pytest.mark.parametrize("name", OTHER["report"])
def test_a_setting_of_the_report_reaches_the_tables_alone(name: str, folder: Path) -> None:
    value = OTHER["report"][name]
    others = tasks_of(folder, f"report.{name}={json.dumps(value)}")
    assert changed(tasks_of(folder), others) == {"aggregate/keys"}


@pytest.mark.parametrize("name", OTHER["resources"])
def test_resources_reach_no_key(name: str, folder: Path) -> None:
    stage = "finetune" if name == "tasks_per_job" else "pretrain"
    others = tasks_of(folder, f"resources.{stage}.{name}={OTHER['resources'][name]}")
    assert changed(tasks_of(folder), others) == set()
    assert any(task.resources[name] == OTHER["resources"][name] for task in others.values())


@pytest.mark.parametrize(
    ("setting", "reached"),
    [
        ("methods.dino.options.out_dim=100", "dino"),
        ("methods.dino.train.lr=0.5", "dino"),
        ("methods.dino.weights=imagenet", "dino"),
        ("methods.dino.backbones={cnn: {name: resnet18}, vit: {name: test_vit}}", "dino"),
        ("methods.cass_plus.options.temperature=0.5", "cass_plus"),
    ],
)
def test_a_methods_own_settings_reach_its_own_tasks(setting: str, reached: str, folder: Path) -> None:
    tasks = tasks_of(folder)
    direct = {t.id for t in tasks.values() if t.stage == "pretrain" and t.spec["label"] == reached}
    direct |= {
        t.id
        for t in tasks.values()
        if t.stage == "finetune" and "backbones=" in setting and t.spec["label"] == reached
    }
    assert changed(tasks, tasks_of(folder, setting)) == with_dependants(tasks, direct)


def test_what_equals_a_default_is_as_if_it_were_not_said(folder: Path) -> None:
    said = [
        f"pretrain.{name}={json.dumps(Training.model_fields[name].default)}"
        for name in TRAINING
        if name not in ("batch_size", "augment") and all(name not in m.recipe for m in METHODS.values())
    ]
    said += ["datasets.cells.seed=0", "methods.dino.options={momentum: 0.996}", "finetune.lr=3e-4"]
    assert changed(tasks_of(folder), tasks_of(folder, *said)) == set()


def test_a_new_option_with_a_default_changes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(Training):
        brand_new: int = 3

    spec = PretrainSpec.model_validate(
        next(t.spec for t in plan(load_experiment("quickstart")) if "train" in t.spec)
    )
    newer = PretrainSpec.model_construct(**dict(spec) | {"train": Newer(**spec.train.model_dump())})
    other = PretrainSpec.model_construct(
        **dict(spec) | {"train": Newer(**spec.train.model_dump(), brand_new=4)}
    )
    monkeypatch.setitem(TRAINING, "brand_new", "none")
    assert newer.train.model_dump() != spec.train.model_dump()
    monkeypatch.setattr("pipeline.settings.Training", Newer)
    assert identity(newer) == identity(spec) != identity(other)


def test_defaults_change_only_with_their_format() -> None:
    """`python tests/unit/test_settings.py` writes the golden file; it refuses what needs a new format."""
    golden = json.loads(GOLDEN.read_text())
    now = current()
    for stage, entry in golden.items():
        if entry["format"] != FORMATS[stage]:
            continue
        assert not differing(entry["defaults"], now[stage]["defaults"]), (
            f"raise pipeline.plan.FORMATS[{stage!r}]: keys of the present format leave these defaults out"
        )
    assert golden == now, "add what is new: python tests/unit/test_settings.py"


def current() -> dict[str, Any]:
    return {
        stage: {"format": FORMATS[stage], "defaults": json.loads(json.dumps(of_stage))}
        for stage, of_stage in defaults().items()
    }


def differing(before: Any, now: Any, place: str = "") -> list[str]:
    """The defaults that are gone or have another value; new ones are none of them."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for name in before
            for found in (
                differing(before[name], now[name], f"{place}.{name}") if name in now else [f"{place}.{name}"]
            )
        ]
    return [] if before == now else [f"{place}: {before} → {now}"]


def test_the_golden_check_sees_a_changed_default() -> None:
    assert differing({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}}) == [".a.b: 1 → 2"]
    assert differing({"a": 1}, {"b": 1}) == [".a"] and not differing({"a": 1}, {"a": 1, "b": 2})
    assert Splits.model_fields  # its defaults are among those of shards
    assert current()["shard"]["defaults"]["splits"]["train"] == 0.7


if __name__ == "__main__":
    before, after = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}, current()
    for stage, entry in before.items():
        if entry["format"] == FORMATS[stage] and (
            wrong := differing(entry["defaults"], after[stage]["defaults"])
        ):
            sys.exit(f"raise pipeline.plan.FORMATS[{stage!r}] first: {', '.join(wrong)}")
    GOLDEN.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
