"""Where nothing is coloured, what is printed without rich is what rich would print."""

from __future__ import annotations

import pytest

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


@pytest.fixture(params=[printing.print_table, printing.print_long_table])
def print_one(request):
    return request.param


def both(capsys, monkeypatch, show) -> tuple[str, str]:
    """What is printed now, and what rich prints."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    show()
    now = capsys.readouterr().out
    monkeypatch.setattr(printing, "_may_colour", lambda stream: True)
    show()
    return now, capsys.readouterr().out


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_is_the_same_with_and_without_rich(capsys, monkeypatch, text):
    now, by_rich = both(capsys, monkeypatch, lambda: printing.say(text, style="red"))
    assert now == by_rich


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_a_table_is_the_same_with_and_without_rich(capsys, monkeypatch, print_one, rows):
    now, by_rich = both(capsys, monkeypatch, lambda: print_one(HEADER, rows))
    assert now == by_rich
    assert len(now.splitlines()) >= 1 + len(rows)


def test_colour_is_asked_for_where_the_environment_wants_it(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    printing.say("error", style="red")
    assert capsys.readouterr().out == "\x1b[31merror\x1b[0m\n"
