"""Files that a table names: below the root, in whichever spelling the file system has."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from shards.errors import InputError


class Lookup:
    """Finds files below a folder by their names in a table. It looks into each folder at most once.

    Args:
        root: the folder.
        suffixes: with a dot, lower case, that a name in the table may lack.
    """

    def __init__(self, root: Path, suffixes: Collection[str]) -> None:
        self.root = root
        self._suffixes = frozenset(suffixes)
        self._below = {os.path.abspath(root), os.path.realpath(root)}
        self._names: dict[str, dict[str, list[str]]] = {}  # folder → plain name, or stem → names

    def relative(self, cell: str, where: str) -> str:
        """A path in one spelling with forward slashes, relative to the root.

        Args:
            where: the line and column, for messages.

        Raises:
            InputError: it leads out of the root.
        """
        path = cell.replace("\\", "/")
        if posixpath.isabs(path):
            for top in self._below:
                if os.path.commonpath([top, posixpath.normpath(path)]) == top:
                    path = os.path.relpath(posixpath.normpath(path), top)
                    break
            else:
                raise InputError(f"{where} is '{cell}', which is not below the root {self.root}")
        path = posixpath.normpath(path)
        if path in (".", "..") or path.startswith("../"):
            raise InputError(f"{where} is '{cell}', expected a file below the root {self.root}")
        return path

    def file(self, name: str, where: str) -> Path:
        """The file of a relative path; where there is none, the path as it is.

        A name without a known suffix may lack it, in lower or upper case; accents may be composed or not.

        Raises:
            InputError: several files fit.
        """
        path = self.root / name
        known = path.suffix.lower() in self._suffixes
        if os.path.lexists(path) and (known or not os.path.isdir(path)):
            return path
        folder = self._folder(path.parent)
        if folder is None:
            return path
        fitting = self._in(folder).get(_plain(path.name), [])
        if len(fitting) > 1:
            raise InputError(f"{where} is '{name}', and several files fit: {', '.join(sorted(fitting))}")
        return Path(folder, fitting[0]) if fitting else path

    def _folder(self, folder: Path) -> str | None:
        """The folder as the file system spells it."""
        if os.path.isdir(folder):
            return str(folder)
        if folder in (self.root, folder.parent):
            return None
        above = self._folder(folder.parent)
        if above is None:
            return None
        for name in os.listdir(above):
            if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", folder.name):
                return os.path.join(above, name)
        return None

    def _in(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._names:
            found: dict[str, list[str]] = defaultdict(list)
            for name in os.listdir(folder):
                stem, suffix = os.path.splitext(name)
                found[_plain(name)].append(name)
                if suffix.lower() in self._suffixes:
                    found[_plain(stem)].append(name)
            self._names[folder] = dict(found)
        return self._names[folder]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)
