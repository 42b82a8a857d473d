"""The one error that is the user's to mend, and the hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something in the input is wrong; the one-line message names it and says what was expected."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``, did you mean 'label'?`` for a mistyped word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def listed(words: Iterable[str], *, most: int = 10) -> str:
    """The first words in a row, quoted, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(f"'{word}'" for word in words[:most]) + more
