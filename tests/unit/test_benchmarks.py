"""The benchmarks still run, on small sizes; nothing is timed here."""

from __future__ import annotations

import pytest
import torch

from benchmarks import checkpoints, selfpatch
from benchmarks.compute import compute


def test_checkpoints():
    figures = {figure.name: figure for figure in checkpoints.measure(checkpoints.SMALL, size=160)}
    assert figures["checkpoint: size"].value > 1 and figures["checkpoint: copy"].value > 0
    assert figures["checkpoint: share of the time"].unit == "%"


def test_scattering():
    pytest.importorskip("kymatio")
    from benchmarks.scattering import measure

    figures = measure(32, 1, 4, device=torch.device("cpu"), images=2, pairs=1)
    assert [figure.value > 0 for figure in figures] == [True] * 4 and figures[-1].value < 1


@pytest.mark.parametrize(
    ("name", "gmac"), [("scatnet8", 0.95), ("scatnet12", 2.8), ("scatnet16", 3.5), ("resnet18", 0.33)]
)
def test_multiply_adds_of_an_image_of_96_pixels(name, gmac):
    figures = {figure.name: figure.value for figure in compute(name, size=96)}
    assert float(f"{figures[f'{name}: 96 px']:.2g}") == gmac
    assert (f"{name}: 96 px, scattering" in figures) == name.startswith("scat")


def test_selfpatch():
    first, *ratios = selfpatch.measure(selfpatch.SMALL, batch=2, rounds=2)
    assert first.unit == "s" and [ratio.unit for ratio in ratios] == ["x", "x"]
    assert all(figure.value > 0 for figure in (first, *ratios))
