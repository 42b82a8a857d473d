"""Names that are one to a person and two to a program: they differ in case, spaces, leading zeros, ``.0``."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

_JOINT = re.compile(r"(?<=\w)[\s_-]+(?=\w)")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")  # zero width, marks of direction, soft hyphen
_NUMBER = re.compile(r"(?<![\d.])0*(\d+)(?:\.0+)?(?!\.?\d)")


def canonical(name: str) -> str:
    """What is left of a name without case, composed accents, spaces, ``_``, ``-``, leading zeros, ``.0``."""
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", name)).casefold()
    return _NUMBER.sub(r"\1", _JOINT.sub(" ", plain.strip()))


def nearly_equal(names: Iterable[str]) -> list[list[str]]:
    """Groups of two or more names that differ in spelling only, each sorted, in sorted order."""
    spelled: dict[str, set[str]] = defaultdict(set)
    for name in names:
        spelled[canonical(name)].add(name)
    return sorted(sorted(several) for several in spelled.values() if len(several) > 1)
