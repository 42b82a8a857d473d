"""Errors that are the user's to mend: shown as one line, exit code 2, never as a traceback.

What an error says is shown and written without the values of secret environment variables.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from slurm.secret_names import is_secret

EXIT_USER_ERROR = 2
LEAST_SECRET = 6  # characters; a shorter value ("true") would be cut out of words that mean nothing


class UserError(ValueError):
    """Something in the input is wrong; the message names it and says what was expected."""


class UserErrors(UserError):
    """Several mistakes that were found at once; ``errors`` has one line each."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = list(errors)


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise what was found: one mistake as it is, several together, nothing where there is none."""
    flat = [one for error in errors for one in (error.errors if isinstance(error, UserErrors) else [error])]
    distinct = list({str(error): error for error in flat}.values())
    if len(distinct) == 1:
        raise distinct[0]
    if distinct:
        raise UserErrors(distinct)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``, did you mean 'dino'?`` for a mistyped word, or an empty string.

    Args:
        word: what the user wrote.
        known: the words that would have been right.
    """
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def redact(text: str) -> str:
    """A text with the name in place of the value of every environment variable that holds a secret."""
    secrets = {
        part: name
        for name, value in os.environ.items()
        if is_secret(name)
        for part in (value, *value.splitlines())
        if len(part) >= LEAST_SECRET
    }
    for secret in sorted(secrets, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(secret, f"<{secrets[secret]}>")
    return text


# Of text from files: what moves a terminal's cursor, changes its title or colours, breaks a line, or turns
# the direction of what follows.
_CONTROLS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text for a terminal: control characters but line breaks as escapes, such as ``\\x1b``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException) -> str:
    """An error's message on one line, whatever it quotes, without secrets and control characters."""
    return printable(" ".join(redact(str(error)).split())) or type(error).__name__


def redacted_traceback(error: BaseException) -> str:
    """An error's whole traceback without secrets."""
    return printable(redact("".join(traceback.format_exception(error))))


def redact_uncaught() -> None:
    """Have Python print the error that ends this process without secrets; logs keep it."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redacted_traceback(error), end="", file=sys.stderr, flush=True)

    sys.excepthook = show


def print_whatever_the_locale() -> None:
    """Have this process print what its encoding lacks (in a C locale, of odd file names) as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# What the disk or its owner refuses. Any other OSError would be a mistake of this program.
_REFUSALS = frozenset(
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
        *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ESTALE, errno.EMFILE, errno.ENFILE),
    ]
)


def storage_error(error: BaseException, folder: Path) -> UserError | None:
    """A full disk or a folder that refuses, as one line; None if the error is something else.

    Args:
        error: an OSError, or what a library makes of one (safetensors' own error carries its text).
        folder: named where the error itself names no file.
    """
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return UserError(f"{error.filename or folder} cannot be read or written: {error.strerror}")
    full = os.strerror(errno.ENOSPC)
    return UserError(f"{folder} cannot be written: {full}") if full in str(error) else None
