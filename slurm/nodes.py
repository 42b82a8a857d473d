"""Nodes that no job can be started on, and the jobs that may wait for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slurm.commands import ask
from slurm.errors import SlurmError
from slurm.identity import number_of

# Beginnings of sinfo's words; an asterisk at the end of any says that the node does not answer.
UNAVAILABLE = ("down", "drain", "fail", "inval", "maint", "no_respond", "reboot", "unk")
MOST_NAMED = 4
Seen = tuple[str, str]  # a node's state and the reason given for it


def out_of_use(jobs: Sequence[str]) -> dict[str, str]:
    """What is down, drained or does not answer of the nodes that waiting jobs may run on.

    One call of ``squeue`` for the partitions and one of ``sinfo`` for their nodes. Where one of them does not
    answer nothing is known: why a job waits is no reason to fail.

    Args:
        jobs: ids of jobs in the queue: ``123``, ``123_4``.

    Returns:
        By job, such as ``2 of 8 nodes: n1, n2 (drained: bad disk)``; jobs without such nodes are left out.
    """
    if not jobs:
        return {}
    try:
        partitions = _partitions(jobs)
        nodes = _nodes({name for chosen in partitions.values() for name in chosen.split(",")})
    except SlurmError:
        return {}
    said = {}
    for chosen in set(partitions.values()):
        seen = {node: state for name in chosen.split(",") for node, state in nodes.get(name, {}).items()}
        if out := {node: state for node, state in seen.items() if _is_out(state[0])}:
            said[chosen] = f"{len(out)} of {len(seen)} nodes: {_listed(out)}"
    found = {job: partitions.get(number_of(job), "") for job in jobs}
    return {job: said[chosen] for job, chosen in found.items() if chosen in said}


def _partitions(jobs: Iterable[str]) -> dict[str, str]:
    """The partitions of jobs and arrays by their number; a job that may run in several has them all."""
    numbers = ",".join(sorted({number_of(job) for job in jobs}))
    printed = ask(
        ["squeue", "--me", "--noheader", f"--jobs={numbers}", "-O", "JobArrayID:64|,Partition:255|"]
    )
    rows = [line.strip().removesuffix("|").split("|") for line in printed.splitlines()]
    return {number_of(row[0].strip()): row[1].strip() for row in rows if len(row) == 2 and row[1].strip()}


def _nodes(partitions: Iterable[str]) -> dict[str, dict[str, Seen]]:
    """Partition → node → state and reason."""
    names = sorted(filter(None, partitions))
    if not names:
        return {}
    fields = "NodeList:255|,StateLong:64|,Partition:255|,Reason:255"
    printed = ask(["sinfo", "--noheader", "--Node", f"--partition={','.join(names)}", "-O", fields])
    found: dict[str, dict[str, Seen]] = {}
    for line in printed.splitlines():
        row = [part.strip() for part in line.split("|", 3)]
        if len(row) == 4:
            node, state, partition, reason = row
            found.setdefault(partition.removesuffix("*"), {})[node] = (state.lower(), reason)
    return found


def _is_out(state: str) -> bool:
    return state.startswith(UNAVAILABLE) or state.endswith("*")


def _listed(nodes: Mapping[str, Seen]) -> str:
    """Nodes by their state and reason, the first few of each by name."""
    alike: dict[Seen, list[str]] = {}
    for node, seen in nodes.items():
        alike.setdefault(seen, []).append(node)
    groups = []
    for (state, reason), names in alike.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        word = f"{state.rstrip('*')}, does not answer" if state.endswith("*") else state
        why = "" if reason in ("", "none", "(null)") else f": {reason}"
        groups.append(f"{', '.join(names[:MOST_NAMED])}{more} ({word}{why})")
    return ", ".join(groups)
