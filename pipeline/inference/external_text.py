"""The table of an external validation for people: external.md. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pipeline.report.plots import ARCHITECTURES


def render(title: str, table: pd.DataFrame, *, metric: str, confidence: float, notes: Sequence[str]) -> str:
    """One row a model: the metric on the other data set with its interval, and on the model's own test split.

    Args:
        title: first line.
        table: external.csv.
        metric: that is shown.
        notes: what else to know, one line each.
    """
    shown = table[(table["metric"] == metric) & (table["class"] == "")]
    several = shown["dataset"].nunique() > 1
    header = [*(["trained on"] if several else []), "net", "protocol", "method", "labels", "seed"]
    header += [f"{metric} [{100 * confidence:g} %]", "own test split", "groups", "images"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in shown.to_dict("records"):
        cells = [row["dataset"]] if several else []
        cells += [ARCHITECTURES[row["arch"]], row["protocol"], row["method"], f"{100 * row['fraction']:g} %"]
        cells += [row["seed"], _with_interval(row["value"], row["low"], row["high"]), _number(row["test"])]
        lines.append(_line([*cells, row["groups"], row["images"]]))
    said = "\n".join(f"- {note}" for note in notes)
    return f"# {title}\n\n{said}\n\n" + "\n".join(lines) + "\n"


def _with_interval(value: float, low: float, high: float) -> str:
    interval = f" [{_number(low)}, {_number(high)}]" if low == low else ""
    return f"{_number(value)}{interval}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "–"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
