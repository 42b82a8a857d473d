"""The one error that is the user's to mend, and the hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000  # characters of a message


class InputError(ValueError):
    """Something in the input is wrong; the message names it and says what was expected.

    Whatever it quotes, it is one printable line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(message: str) -> str:
    """A message on one line, without control characters, cut where it is longer than anyone reads."""
    line = " ".join(message.split())
    line = "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in line[:LONGEST])
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``, did you mean 'label'?`` for a mistyped word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def listed(words: Iterable[str], *, most: int = 10) -> str:
    """The first words in a row, quoted, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(f"'{word}'" for word in words[:most]) + more
