"""What ``--device`` means."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import UserError
from pipeline.inference.classifier import device_of


@pytest.fixture(params=[0, 2])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_auto_takes_what_the_model_was_trained_on_where_it_is_there(gpus: int) -> None:
    assert device_of("auto", "cpu") == torch.device("cpu")
    assert device_of("auto", "cuda") == (torch.device("cuda", 0) if gpus else torch.device("cpu"))
    assert device_of("cpu", "cuda") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(gpus: int) -> None:
    if not gpus:
        with pytest.raises(UserError, match=r"--device: cuda: PyTorch finds no GPU here"):
            device_of("cuda")
        return
    assert device_of("cuda") == torch.device("cuda", 0)
    assert device_of("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"--device: cuda:2: there are 2 GPUs, from cuda:0 on"):
        device_of("cuda:2")


@pytest.mark.parametrize("asked", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "CPU", "cpu:0"])
def test_what_is_no_device_is_refused(asked: str) -> None:
    with pytest.raises(UserError, match="is no device"):
        device_of(asked)
