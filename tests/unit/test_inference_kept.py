"""Which of an experiment's kept models are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.inference.kept import Kept, choose, fitting, winners
from pipeline.manifest import Receipt, Task
from pipeline.specs import FinetuneSpec


def kept(protocol: str, seed: int, score: float, *, keep: str = "best") -> Kept:
    spec = FinetuneSpec.model_validate(
        {
            "dataset": "d",
            "label": "byol",
            "arch": "cnn",
            "backbone": {"name": "resnet18"},
            "protocol": protocol,
            "fraction": 0.1,
            "seed": seed,
            "settings": {"keep": keep},
        }
    )
    task = Task(f"finetune/{protocol}-{seed}", "finetune", {}, (), "0" * 64, {})
    receipt: Receipt = None  # type: ignore[assignment]  # nobody asks for it
    return Kept(task, spec, Path(), receipt, score)


def names(models: list[Kept]) -> list[str]:
    return [model.task.name for model in models]


def test_of_a_cell_the_best_by_validation_wins_and_of_equals_the_first() -> None:
    models = [kept("knn", 0, 0.5), kept("knn", 1, 0.7), kept("linear", 0, 0.6), kept("linear", 1, 0.6)]
    assert names(winners(models)) == ["knn-1", "linear-0"]
    assert names(winners(models[:1])) == ["knn-0"]
    assert names(winners(fitting(models, "s1"))) == ["knn-1", "linear-1"]
    assert choose(models, "").task.name == "knn-1"


def test_with_keep_all_every_seed_is_tried() -> None:
    models = [kept("linear", seed, seed / 10, keep="all") for seed in range(3)]
    assert names(winners(models)) == ["linear-0", "linear-1", "linear-2"]


def test_what_keeps_no_model_is_told() -> None:
    with pytest.raises(UserError, match=r"or its protocols keep none \(finetune, linear, knn do\)"):
        fitting([], "")
