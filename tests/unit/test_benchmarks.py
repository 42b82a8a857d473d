"""The benchmarks still run, on small sizes; nothing is timed here."""

from __future__ import annotations

from benchmarks import checkpoints, selfpatch


def test_checkpoints():
    figures = {figure.name: figure for figure in checkpoints.measure(checkpoints.SMALL, size=160)}
    assert figures["checkpoint: size"].value > 1 and figures["checkpoint: copy"].value > 0
    assert figures["checkpoint: share of the time"].unit == "%"


def test_selfpatch():
    first, *ratios = selfpatch.measure(selfpatch.SMALL, batch=2, rounds=2)
    assert first.unit == "s" and [ratio.unit for ratio in ratios] == ["x", "x"]
    assert all(figure.value > 0 for figure in (first, *ratios))
