"""The benchmarks still run, on small sizes; nothing is timed here."""

from __future__ import annotations

from benchmarks.checkpoints import SMALL, measure


def test_checkpoints():
    figures = {figure.name: figure for figure in measure(SMALL, size=160)}
    assert figures["checkpoint: size"].value > 1 and figures["checkpoint: copy"].value > 0
    assert figures["checkpoint: share of the time"].unit == "%"
