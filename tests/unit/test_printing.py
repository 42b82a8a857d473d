"""Where nothing is coloured, what is printed without rich is what rich would print."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.file_proxy import FileProxy

from pipeline import printing

TEXTS = {
    "brackets": "store: /data/[red]x[/]",
    "emoji code": "in :cat:",
    "backslash": "a\\[b]",
    "lines": "\n154 tasks\nstore: /s\n",
    "empty": "",
    "longer than a pipe's columns": "word " * 100,
    "wide": "表 ü …",
    "tab": "1\t2",
    "bell and carriage return": "a\x07b\rc",
    "escape": "a\x1b[31mb",
    "spaces of other kinds": "a\u00a0b\u2003c",
}
HEADER = ("task", "needs", "state")
TABLES = {
    "nothing": [],
    "fits": [
        ("shard/pbc", "-", "done"),
        ("pretrain/pbc-dino", "shard/pbc", "to run"),
        ("x", "·", "not chosen"),
    ],
    "folds": [("finetune/" + "long-" * 40, "a, b and 3 more", "done")],
}


@pytest.fixture(autouse=True)
def _nothing_of_colour_in_the_environment(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_is_the_same_with_and_without_rich(capsys, monkeypatch, text):
    printing.say(text, style="red")
    now = capsys.readouterr().out
    monkeypatch.setattr(printing, "_may_colour", lambda stream: True)
    printing.say(text, style="red")
    assert now == capsys.readouterr().out


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("coloured", [True, False])
def test_a_table_is_laid_out_as_rich_does_it(capsys, monkeypatch, coloured, rows):
    monkeypatch.setattr(printing, "_may_colour", lambda stream: coloured)
    printing.print_table(HEADER, rows)
    now = capsys.readouterr().out
    printing.console().print(printing._rich_table(HEADER, rows))
    assert now == capsys.readouterr().out
    assert len(now.splitlines()) >= 1 + len(rows)


def test_beside_live_bars_each_stream_gets_its_own(monkeypatch):
    """Of which rich takes the place."""
    bars, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", FileProxy(Console(file=bars), log))
    printing.say("warning: few images", stderr=True)
    assert (bars.getvalue(), log.getvalue()) == ("", "warning: few images\n")


def test_colour_is_asked_for_where_the_environment_wants_it(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    printing.say("error", style="red")
    assert capsys.readouterr().out == "\x1b[31merror\x1b[0m\n"
