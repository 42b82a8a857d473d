"""The one error of this package."""

from __future__ import annotations


class SlurmError(ValueError):
    """A profile is wrong, or the cluster is not there or refuses; the message is one line."""
