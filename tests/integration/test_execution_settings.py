"""Settings that are execution change no bit of a result, and a checkpoint outlives their change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_finetune_stage as finetuning
import torch
from pretrain_cases import write_shards
from test_pretrain_stage import make_work

from pipeline.settings import EXECUTION, FINETUNE, TRAINING
from pipeline.stages import pretrain
from pipeline.stages.work import Interrupted, Work

torch.set_num_threads(1)
CHANGED: dict[str, Any] = {
    "cache": "none",
    "workers": 2,
    "checkpoint_steps": 1,
    "checkpoint_seconds": 0.01,
    "keep_checkpoints": 1,
    "probe_epochs": 0.7,
}
store = finetuning.store  # a fixture
forget = finetuning.forget


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


def files(folder: Path) -> dict[str, bytes]:
    """What a pretraining exports: weights and their description."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.*son*"))} | {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))
    }


def test_every_execution_setting_is_tried_here() -> None:
    assert set(CHANGED) == {name for name, least in TRAINING.items() if least == EXECUTION}
    assert {name for name, of in FINETUNE.items() if of == EXECUTION} == {"cache", "workers", "keep"}


@pytest.mark.parametrize(
    ("method", "archs"), [("cass_vc", ("cnn", "vit")), ("dino", ("vit",)), ("bn_refresh", ("cnn",))]
)
def test_execution_settings_change_no_bit_of_what_is_exported(
    method: str, archs: tuple[str, ...], shards: Path, tmp_path: Path
) -> None:
    for name, changed in (("plain", {}), ("changed", CHANGED)):
        pretrain.run(make_work(method, shards, tmp_path / name, archs=archs, **changed))
    plain, changed = files(tmp_path / "plain"), files(tmp_path / "changed")
    assert plain == changed and len(plain) == 2 * len(archs)


def test_a_checkpoint_goes_on_under_other_execution_settings(shards: Path, tmp_path: Path) -> None:
    pretrain.run(make_work("dino", shards, tmp_path / "whole", archs=("vit",)))
    work = make_work("dino", shards, tmp_path / "parts", archs=("vit",), checkpoint_steps=None)
    asked = iter([False] * 5 + [True] * 100)
    stopped = Work(**{**vars(work), "stop_requested": lambda: next(asked)})
    with pytest.raises(Interrupted):
        pretrain.run(stopped)
    assert list((tmp_path / "parts" / "checkpoints").iterdir())
    pretrain.run(make_work("dino", shards, tmp_path / "parts", archs=("vit",), **CHANGED))
    steps = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert files(tmp_path / "whole") == files(tmp_path / "parts") and steps


@pytest.mark.parametrize("protocol", ["finetune", "linear", "knn"])
def test_execution_settings_change_no_bit_of_a_prediction(protocol: str, store: Path, tmp_path: Path) -> None:
    found = []
    for name, changed in (("plain", {}), ("changed", {"cache": "none", "workers": 2, "keep": "none"})):
        metrics, folder = finetuning.run(store, tmp_path / name, protocol=protocol, settings=changed)
        with np.load(folder / "predictions.npz") as stored:
            found.append((stored["probabilities"].tobytes(), metrics["val"], metrics["test"]))
    assert found[0] == found[1]
