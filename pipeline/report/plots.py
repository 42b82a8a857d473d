"""Plots: a metric against the label fraction, and what pretraining did epoch by epoch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pipeline.report.load import Pretraining

# Okabe and Ito's colours, told apart by colour-blind readers too; the yellow is left out, too light on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"  # as many as there are colours
WIDEST = 1.4  # the factor by which the outermost of many lines are moved aside
COLUMNS = 5  # of the plot of pretrainings, before it goes on below
ARCHITECTURES = {"cnn": "CNN", "vit": "ViT"}
STYLE: Any = {
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}


def plot_fractions(summary: pd.DataFrame, path: Path, *, metric: str, methods: Sequence[str]) -> bool:
    """Draw a metric against the label fraction, one panel an architecture × protocol.

    Hollow markers: the pretraining collapsed.

    Args:
        summary: the rows of one data set.
        path: PNG to write.
        metric: a column with ``_low`` and ``_high`` beside it.
        methods: in the order of their colours.

    Returns:
        True: there is something to draw.
    """
    rows = summary[summary["n"] > 0]
    archs = [arch for arch in ARCHITECTURES if arch in set(rows["arch"])]
    protocols = list(dict.fromkeys(rows["protocol"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(archs),
            len(protocols),
            figsize=(1.2 + 3.6 * len(protocols), 0.9 + 2.9 * len(archs)),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for row, arch in zip(axes, archs):
            for axis, protocol in zip(row, protocols):
                panel = rows[(rows["arch"] == arch) & (rows["protocol"] == protocol)]
                _fraction_panel(axis, panel, metric, methods)
                axis.set_title(f"{ARCHITECTURES[arch]}, {protocol}")
            row[0].set_ylabel(metric)
        for axis in axes[-1]:
            axis.set_xlabel("labels used")
        _legend(figure, axes.ravel())
        figure.savefig(path)
        plt.close(figure)
    return True


def _fraction_panel(axis: Axes, panel: pd.DataFrame, metric: str, methods: Sequence[str]) -> None:
    """One line a method; one whose backbone is not the panel's usual one is dashed, and names it."""
    fractions = sorted(set(panel["fraction"]))
    backbones = [name for name, _ in Counter(panel["backbone"]).most_common()]
    lines = [
        (method, backbone, rows)
        for method in methods
        for backbone in backbones
        if len(rows := panel[(panel["method"] == method) & (panel["backbone"] == backbone)])
    ]
    spread = min(1.035 ** (len(lines) - 1), WIDEST)  # side by side, so that intervals do not hide each other
    for number, (method, backbone, rows) in enumerate(lines):
        rows = rows.sort_values("fraction")
        shift = spread ** (2 * number / max(1, len(lines) - 1) - 1)
        colour, marker = look(methods.index(method))
        axis.errorbar(
            rows["fraction"] * shift,
            rows[metric],
            yerr=[
                (rows[metric] - rows[f"{metric}_low"]).clip(lower=0).fillna(0),
                (rows[f"{metric}_high"] - rows[metric]).clip(lower=0).fillna(0),
            ],
            label=method if backbone == backbones[0] else f"{method} ({backbone})",
            markerfacecolor="white" if rows["collapsed"].any() else None,
            color=colour,
            marker=marker,
            linestyle=("-", "--", ":")[backbones.index(backbone) % 3],
            linewidth=1.6,
            markersize=5,
            elinewidth=1.1,
            capsize=2.5,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(fractions))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    if fractions:
        axis.set_xlim(min(fractions) / (1.25 * spread), max(fractions) * 1.25 * spread)


def look(place: int) -> tuple[str, str]:
    """Colour and marker of a method by its place among all: the first 64 differ."""
    rounds, colour = divmod(place, len(COLOURS))
    return COLOURS[colour], MARKERS[(colour + rounds) % len(MARKERS)]


def plot_pretraining(pretrainings: Sequence[Pretraining], path: Path) -> bool:
    """Draw loss and effective rank against the epoch, one column a method; solid CNN, dashed ViT.

    Args:
        pretrainings: of one data set.
        path: PNG to write.

    Returns:
        False, and no file, where no pretraining has logged anything to draw.
    """
    curves = [(run, _read_log(run.folder)) for run in pretrainings]
    curves = [(run, lines) for run, lines in curves if _points(lines, "step", "loss")]
    methods = list(dict.fromkeys(run.spec.label for run, _ in curves))
    if not methods:
        return False
    across, blocks = min(len(methods), COLUMNS), -(-len(methods) // COLUMNS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * blocks,
            across,
            figsize=(1.2 + 3.0 * across, 5.6 * blocks),
            squeeze=False,
            layout="constrained",
        )
        tops, bottoms = axes[0::2].ravel(), axes[1::2].ravel()
        for axis in [*tops[len(methods) :], *bottoms[len(methods) :]]:
            axis.set_visible(False)
        for top, bottom, method in zip(tops, bottoms, methods):
            top.sharex(bottom)
            top.tick_params(labelbottom=False)
            mine = [(run, lines) for run, lines in curves if run.spec.label == method]
            for run, lines in mine:
                archs = list(run.spec.backbones)
                joint = len(archs) > 1
                _curve(top, _points(lines, "step", "loss"), "joint" if joint else archs[0])
                for arch in archs:
                    _curve(bottom, _points(lines, "health", arch, "effective_rank"), arch)
            collapsed = any(any(run.metrics.get("collapsed", {}).values()) for run, _ in mine)
            top.set_title(f"{method} (collapsed)" if collapsed else method)
            bottom.set_xlabel("epoch")
        ranks = [line.get_ydata() for axis in bottoms for line in axis.get_lines()]
        for axis in bottoms:  # one scale: ranks of several methods are to be compared, losses are not
            axis.set_ylim(0, 1.05 * max((max(rank) for rank in ranks), default=1))
        for top, bottom in zip(axes[0::2, 0], axes[1::2, 0]):
            top.set_ylabel("loss")
            bottom.set_ylabel("effective rank of the features")
        _legend(figure, axes.ravel())
        figure.savefig(path)
        plt.close(figure)
    return True


def _curve(axis: Axes, points: list[tuple[float, float]], kind: str) -> None:
    name, colour, style = {
        "cnn": ("CNN", COLOURS[0], "-"),
        "vit": ("ViT", COLOURS[1], "--"),
        "joint": ("CNN and ViT together", COLOURS[6], "-"),
    }[kind]
    if points:
        marker = "o" if len(points) < 30 else ""
        axis.plot(
            *zip(*points),
            color=colour,
            linestyle=style,
            linewidth=1.5,
            marker=marker,
            markersize=3,
            label=name,
        )


def _legend(figure: Any, axes: Iterable[Axes]) -> None:
    """One legend below all panels, each name once."""
    named: dict[str, Any] = {}
    for axis in axes:
        named |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    if named:
        entry = 0.8 + 0.085 * max(map(len, named))  # inches: the line, the gaps, the longest name
        columns = max(1, min(len(named), 6, int(figure.get_figwidth() / entry)))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _read_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _points(lines: list[dict[str, Any]], kind: str, *keys: str) -> list[tuple[float, float]]:
    """(epoch, value) of the lines of a kind that have the value."""
    points = []
    for line in lines:
        if line.get("kind") != kind:
            continue
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((float(line["epoch"]), float(value)))
    return points
