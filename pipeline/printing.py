"""Text and tables for people: by rich where it may colour them or must fold them.

Elsewhere the same characters are printed without it, since to import it takes longer than to plan.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from pipeline.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_COLUMNS = 160
STYLES = {"done": "green", "not chosen": "dim", "·": "dim"}  # of a table's cells, by what they say


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Beyond a terminal (a log file, a pipe) lines are not folded, and tables get the room they need.
    return Console(
        stderr=stderr,
        highlight=False,
        emoji=False,  # ":cat:" in a path is no cat
        soft_wrap=True,
        width=None if stream.isatty() else PIPE_COLUMNS,
    )


def say(text: str, *, style: str = "", stderr: bool = False, end: str = "\n") -> None:
    """Print a text as it is: brackets in it are no markup.

    Args:
        text: lines; control characters in them are printed as escapes, since they may come from a file.
        style: rich's, such as ``red``; on a terminal only.
        stderr: whether it goes to stderr.
        end: what is printed after it.
    """
    stream = sys.stderr if stderr else sys.stdout
    text = printable(text)
    if _may_colour(stream):
        console(stderr=stderr).print(text, style=style or None, markup=False, end=end)
    else:
        print(text, end=end, file=stream, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without lines. Rich, slow with ten thousand rows, lays it out only where some must fold.

    Args:
        header: names of the columns.
        rows: cells, a character wide each character; those that are a key of ``STYLES`` are coloured.
    """
    rows = [tuple(map(printable, row)) for row in rows]
    coloured = _may_colour(sys.stdout)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    if sum(widths) + 2 * len(widths) > (console().width if coloured else PIPE_COLUMNS):
        console().print(_rich_table(header, rows))
        return
    styled = _styled if coloured else str
    lines = [
        "".join(f" {style(cell)}{' ' * (width - len(cell))} " for cell, width in zip(row, widths))
        for row, style in ((header, str), *((row, styled) for row in rows))
    ]
    if coloured:
        console().print("\n".join([f"[bold]{lines[0]}[/]", *lines[1:]]))
    else:
        say("\n".join(lines))


def _rich_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(_styled, row))
    return table


def _styled(cell: str) -> str:
    return f"[{STYLES[cell]}]{cell}[/]" if cell in STYLES else cell


def _may_colour(stream: TextIO) -> bool:
    """Whether rich may colour what it prints there; only rich itself knows whether it will.

    While it draws live bars, it stands in the place of both streams and knows which is which.
    """
    asked = "FORCE_COLOR" in os.environ or "TTY_COMPATIBLE" in os.environ
    return asked or stream.isatty() or hasattr(stream, "rich_proxied_file")
