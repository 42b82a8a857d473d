"""The one error of this package."""

from __future__ import annotations


class SlurmError(ValueError):
    """A profile is wrong, or the cluster is not there or refuses; the message is one line."""


class SlurmErrors(SlurmError):
    """Several mistakes in one profile; ``errors`` has one line each."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = errors
