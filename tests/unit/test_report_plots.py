"""Plots: every method can be told from every other."""

from __future__ import annotations

from pipeline.report.plots import look


def test_no_two_methods_look_alike():
    looks = [look(place) for place in range(64)]
    assert len(set(looks)) == 64
    assert len({colour for colour, _ in looks[:8]}) == len({marker for _, marker in looks[:8]}) == 8
