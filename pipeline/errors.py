"""Errors that are the user's to mend: shown as one line, exit code 2, never as a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the input is wrong; the message names it and says what was expected."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``, did you mean 'dino'?`` for a mistyped word, or an empty string.

    Args:
        word: what the user wrote.
        known: the words that would have been right.
    """
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""
