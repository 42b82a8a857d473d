"""The summary as a table for the terminal. Reads summary.csv; imports nothing heavy."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.errors import printable

BEFORE = "macro_f1"  # what tables of the first version were shown by, which did not name their metric


def terminal(path: Path) -> Table:
    """A row a method × net × protocol, a column a label fraction, the report's metric with its interval.

    With three fractions it fits into 80 columns.

    Args:
        path: summary.csv.
    """
    text = printable(path.read_text(encoding="utf-8"))
    rows = [{"metric": BEFORE, **row} for row in csv.DictReader(text.splitlines())]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    fractions = sorted({float(row["fraction"]) for row in rows})
    several = len({row["dataset"] for row in rows}) > 1
    collapsed = {
        (row["dataset"], row["arch"], row["method"]) for row in rows if row["collapsed"] not in ("", "0")
    }
    table = Table(
        title=f"{', '.join(metrics)} on the test split: mean over seeds \\[interval]",
        caption="† collapsed in pretraining" if collapsed else None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    of_dataset, of_metric = (["dataset"] if several else []), (["metric"] if len(metrics) > 1 else [])
    for name in [*of_dataset, "net", "protocol", *of_metric, "method"]:
        table.add_column(name, no_wrap=True)
    for fraction in fractions:
        table.add_column(f"{100 * fraction:g} % labels", justify="right", no_wrap=True)
    cells: dict[tuple[str, ...], dict[float, dict[str, str]]] = {}
    for row in rows:
        identity = (row["dataset"], row["arch"], row["protocol"], row["method"])
        cells.setdefault(identity, {})[float(row["fraction"])] = row
    section: tuple[str, ...] | None = None
    for place in sorted(cells, key=lambda place: place[:3]):
        if section not in (None, place[:3]):
            table.add_section()
        section = place[:3]
        values = [_cell(cells[place].get(fraction)) for fraction in fractions]
        mark = " [red]†[/]" if (place[0], place[1], place[3]) in collapsed else ""
        first = next(iter(cells[place].values()))
        named = [*(first[name] for name in of_dataset), *place[1:3], *(first[name] for name in of_metric)]
        table.add_row(*named, f"{place[3]}{mark}", *values)
    return table


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    if row["n"] == "0":
        return "[red]failed[/]" if row["failed"] != "0" else "[yellow]missing[/]"
    metric = row["metric"]
    if not row[metric]:
        return "-"
    text = f"{float(row[metric]):.3f}"
    if row[f"{metric}_low"]:
        low, high = (f"{float(row[f'{metric}_{end}']):.2f}".removeprefix("0") for end in ("low", "high"))
        text += f" \\[{low} {high}]"
    if row["n"] != row["planned"]:
        text += f" [yellow]{row['n']}/{row['planned']} seeds[/]"
    return text
