"""Plots: every method can be told from every other."""

from __future__ import annotations

import pandas as pd

from pipeline.report import plots
from pipeline.report.plots import look


def test_no_two_methods_look_alike():
    looks = [look(place) for place in range(64)]
    assert len(set(looks)) == 64
    assert len({colour for colour, _ in looks[:8]}) == len({marker for _, marker in looks[:8]}) == 8


def test_of_many_methods_every_point_and_every_name_is_within_the_picture(tmp_path, monkeypatch):
    methods = [f"a_method_of_a_long_name_{number}" for number in range(16)]
    summary = pd.DataFrame(
        [
            {"arch": arch, "protocol": "linear", "method": method, "backbone": "resnet", "fraction": fraction}
            | {"n": 3, "collapsed": 0, "macro_f1": 0.5, "macro_f1_low": 0.4, "macro_f1_high": 0.6}
            for arch in ("cnn", "vit")
            for method in methods
            for fraction in (0.01, 0.1, 1.0)
        ]
    )
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    assert plots.plot_fractions(summary, tmp_path / "plot.png", metric="macro_f1", methods=methods)
    (figure,) = figures
    for axis in figure.axes:
        low, high = axis.get_xlim()
        drawn = [x for line in axis.get_lines() for x in line.get_xdata()]
        assert low < min(drawn) and max(drawn) < high
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0
    assert {text.get_text() for text in legend.get_texts()} == set(methods)
