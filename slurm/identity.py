"""Which job is meant: its number alone does not say it, since Slurm's numbers begin again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Submission:
    """What was submitted under one number, as a job or as an array.

    Attributes:
        name: the job's name; one that ends with ``*`` stands for all that begin so.
        user: the user id that it runs under; None: not known.
        cluster: Slurm's name of the cluster; empty: not known.
        submitted: when, as Slurm says it, in ISO 8601 and UTC; empty: not known. A job that is queued again
            gets a later one.
    """

    name: str
    user: int | None = None
    cluster: str = ""
    submitted: str = ""

    def is_of(self, name: str, user: str, cluster: str, submitted: str) -> bool:
        """Whether a job that Slurm lists is this one; what either side does not say is not compared."""
        named = name.startswith(self.name[:-1]) if self.name.endswith("*") else name == self.name
        return (
            named
            and (self.user is None or not user or user == str(self.user))
            and (not self.cluster or not cluster or cluster == self.cluster)
            and (not self.submitted or not submitted[:1].isdigit() or submitted >= self.submitted)
        )


Submissions = Mapping[str, Submission]  # by the number that a job's or an array's id begins with


def number_of(job: str) -> str:
    """The number of a job or of the array that it belongs to: ``123`` of ``123`` and of ``123_4``."""
    return job.split("_")[0]
