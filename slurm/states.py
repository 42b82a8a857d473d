"""What has become of jobs: one call of sacct for all of them, and squeue for those still in the queue."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from slurm.commands import ask
from slurm.errors import SlurmError
from slurm.identity import Submission, Submissions, number_of
from slurm.nodes import out_of_use

# fmt: off
FINAL = frozenset([
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "TIMEOUT",
])
# fmt: on
# How a job's last start may have ended that Slurm has put back into the queue; accounting then lags behind.
REQUEUED = frozenset(["BOOT_FAIL", "NODE_FAIL", "PREEMPTED"])
WHOLE = frozenset(["CANCELLED", "PENDING"])  # states that an array has as a whole
NODES_DOWN = "Nodes required for job are DOWN"
REASONS = {
    "AssocGrpCpuLimit": "the account has all the CPUs it may use at once",
    "AssocGrpGRES": "the account has all the GPUs it may use at once",
    "AssocMaxJobsLimit": "the account runs as many jobs as it may",
    "BadConstraints": "no node can give what it asks for: it will never start",
    "BeginTime": "requeued, waits about two minutes",
    "Dependency": "waits for other jobs",
    "DependencyNeverSatisfied": "a job that it needs failed",
    "InvalidAccount": "the account is not valid here",
    "InvalidQOS": "the QOS is not valid here",
    "JobArrayTaskLimit": "as many of its array run as may at once",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held by its user (scontrol release)",
    "JobHoldMaxRequeue": "requeued too often, held (scontrol release)",
    "NodeDown": "a node it needs is down",
    NODES_DOWN: "nodes it needs are down, drained or reserved",
    "None": "",
    "NonZeroExitCode": "ended with an error",
    "PartitionDown": "the partition is down",
    "PartitionNodeLimit": "asks for more nodes than the partition allows: it will not start",
    "PartitionTimeLimit": "asks for more time than the partition allows: it will not start",
    "Priority": "others are ahead of it in the queue",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS allows",
    "ReqNodeNotAvail": "nodes it needs are down or reserved",
    "Reservation": "waits for its reservation",
    "Resources": "waits for free nodes",
    "TimeLimit": "ran into its time limit",
    "launch_failed_requeued_held": "could not be started, held (scontrol release)",
}
# With these it may be nodes that are down or drained; the others have a cause of their own.
FOR_NODES = frozenset([NODES_DOWN, "NodeDown", "None", "ReqNodeNotAvail", "Resources"])
ENDINGS = ("DependencyNeverSatisfied", "NonZeroExitCode", "TimeLimit")  # the other reasons are for waiting


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job.

    Attributes:
        state: Slurm's word (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT …), or UNKNOWN for a job
            that Slurm has forgotten or never had.
        reason: why it waits or how it ended, in words; may be empty.
        node: the nodes it runs or ran on, as Slurm lists them; may be empty.
        exit_code: ``code:signal``; empty where not known.
        elapsed: running time as ``[days-]hours:minutes:seconds``; empty where not known.
    """

    state: str
    reason: str = ""
    node: str = ""
    exit_code: str = ""
    elapsed: str = ""


def job_states(ids: Sequence[str], submissions: Submissions | None = None) -> dict[str, JobState]:
    """What has become of jobs, with one call of ``sacct`` for all of them.

    Without accounting, and for jobs that are still in the queue (accounting lags behind, and does not say why
    a job waits), one call of ``squeue`` answers; it also knows jobs that ended some minutes ago.

    Args:
        ids: job ids such as ``123`` or ``123_4``.
        submissions: what was submitted under their numbers. Any other job that has got such a number is not
            looked at: after Slurm's numbers began again, or on another cluster, it may be anybody's. None:
            the numbers are taken to be right.

    Raises:
        SlurmError: neither command answers.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    try:
        known = _states(_from_sacct({number_of(job) for job in wanted}), submissions)
    except SlurmError:  # a site without accounting
        known = {}
    if any(state.state not in FINAL - REQUEUED for state in _pick(wanted, known).values()):
        rows = _from_squeue()
        known |= _states(rows, submissions)
        return _with_nodes(_pick(wanted, known), rows)
    return _pick(wanted, known)


def _with_nodes(states: Mapping[str, JobState], rows: Iterable[_Row]) -> dict[str, JobState]:
    """The states; of jobs that may wait for nodes that are down or drained, with what these are."""
    waiting = [
        job
        for row in rows
        if row.state == "PENDING" and _key(row.reason or "") in FOR_NODES
        for job in expand(row.job)
        if job in states and states[job].state == "PENDING"
    ]
    found = dict(states)
    for job, out in out_of_use(waiting).items():
        found[job] = replace(found[job], reason=f"{found[job].reason or 'waits'}; out of use: {out}")
    return found


def submit_times(numbers: Iterable[str], submissions: Submissions) -> dict[str, str]:
    """When jobs were submitted, in UTC, with one call of ``squeue``; those it does not list are left out.

    Args:
        numbers: of jobs or arrays that were submitted a moment ago.
        submissions: what was submitted under them.

    Raises:
        SlurmError: squeue does not answer.
    """
    asked = set(numbers)
    times: dict[str, str] = {}
    for row in _from_squeue():
        number = number_of(row.job)
        if number in asked and number in submissions and row.is_of(submissions[number]):
            times[number] = min(row.submitted, times.get(number, row.submitted))
    return times


def _pick(jobs: Iterable[str], known: Mapping[str, JobState]) -> dict[str, JobState]:
    # An array that was cancelled before any element started is listed as one job. Whatever else stands under
    # an array's own id is one of its elements, which accounting has not yet noted down as such.
    split = {number_of(job) for job in known if "_" in job}
    states = {}
    for job in jobs:
        array = number_of(job)
        found, whole = known.get(job), known.get(array)
        if found is None and whole is not None and whole.state in WHOLE and array not in split:
            found = whole
        states[job] = found or JobState("UNKNOWN", "Slurm does not know this job (any more)")
    return states


def seconds(elapsed: str) -> float:
    """What Slurm prints as ``[days-][hours:]minutes:seconds``, in seconds; 0 for anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", elapsed)
    if match is None:
        return 0.0
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def cancel(ids: Sequence[str], submissions: Submissions | None = None) -> None:
    """Cancel jobs; those that have ended already are left alone.

    Args:
        ids: job ids.
        submissions: what was submitted under their numbers; Slurm cancels a job only if its name and user are
            these. None: the numbers are taken to be right.

    Raises:
        SlurmError: Slurm refuses.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for job in dict.fromkeys(ids):
        only: tuple[str, ...] = ()
        if submissions is not None:
            known = submissions.get(number_of(job))
            if known is None:
                continue
            if not known.name.endswith("*"):
                only = (f"--name={known.name}",)
            if known.user is not None:
                only = (*only, f"--user={known.user}")
        groups.setdefault(only, []).append(job)
    refused: SlurmError | None = None
    for only, wanted in groups.items():
        for start in range(0, len(wanted), 1000):  # a command line has an end
            try:
                ask(["scancel", "--quiet", *only, *wanted[start : start + 1000]])
            except SlurmError as error:  # as it says, too, of one that has ended a moment ago
                refused = error
    if refused is not None:
        states = job_states([job for wanted in groups.values() for job in wanted], submissions)
        if any(state.state not in FINAL | {"UNKNOWN", "COMPLETING"} for state in states.values()):
            raise refused


def cancel_named(name: str) -> None:
    """Cancel this user's jobs of a name.

    Raises:
        SlurmError: Slurm refuses.
    """
    ask(["scancel", "--quiet", f"--user={os.getuid()}", f"--name={name}"])


@dataclass(frozen=True)
class _Row:
    """A line of sacct or squeue, in Slurm's words; ``reason`` is None where the command does not say it."""

    job: str
    state: str
    exit_code: str
    elapsed: str
    node: str
    reason: str | None = None
    user: str = ""
    cluster: str = ""
    submitted: str = ""
    name: str = ""

    def is_of(self, submission: Submission) -> bool:
        return submission.is_of(self.name, self.user, self.cluster, self.submitted)


def _from_sacct(jobs: Iterable[str]) -> list[_Row]:
    """Every job that ever had one of these numbers, and every start of one that was queued again."""
    fields = "JobID,State,ExitCode,Elapsed,NodeList,UID,Cluster,Submit,JobName"
    said = ["--noheader", "--parsable2", "--allocations", "--duplicates", f"--format={fields}"]
    printed = ask(["sacct", *said, "-j", ",".join(sorted(jobs))])
    rows = []
    for line in printed.splitlines():
        job, state, exit_code, elapsed, node, *identity = line.split("|", 8)
        rows.append(_Row(job, state, exit_code, elapsed, node, None, *identity))
    return sorted(rows, key=lambda row: row.submitted)  # of several, the last counts


def _from_squeue() -> list[_Row]:
    fields = (
        "JobArrayID:64|,State:32|,exit_code:16|,TimeUsed:32|,NodeList:255|,Reason:255|,UserID:16|,Cluster:64|,"
        "SubmitTime:24|,Name:255|"
    )
    printed = ask(["squeue", "--me", "--noheader", "--array", "--states=all", "-O", fields])
    return [
        _Row(*[part.strip() for part in line.removesuffix("|").split("|", 9)])
        for line in printed.splitlines()
        if "|" in line
    ]


def _states(rows: Iterable[_Row], submissions: Submissions | None) -> dict[str, JobState]:
    """The states of the jobs in some rows, without those of other jobs under the same numbers."""
    states = {}
    for row in rows:
        if submissions is not None:
            submission = submissions.get(number_of(row.job))
            if submission is None or not row.is_of(submission):
                continue
        word, _, detail = row.state.partition(" ")  # "CANCELLED by 1000"
        why, exit_code = row.reason or "", row.exit_code
        if word == "CANCELLED" and not detail and row.reason is None:
            why = "DependencyNeverSatisfied"  # by nobody; accounting does not keep the reason
        tells = word == "PENDING" or (word in FINAL and why in ENDINGS)
        if exit_code.isdigit():  # squeue prints what wait() returns
            exit_code = f"{int(exit_code) >> 8}:{int(exit_code) & 127}"
        node = "" if row.node in ("None assigned", "(null)") else row.node
        for one in expand(row.job):
            states[one] = JobState(word, _in_words(why) if tells else detail, node, exit_code, row.elapsed)
    return states


def _in_words(reason: str) -> str:
    """Slurm's reason as a sentence; one that is not in the list stays as it is."""
    return REASONS.get(_key(reason), reason)


def _key(reason: str) -> str:
    """The part of a reason that names it. Some versions write sentences, with spaces or underscores."""
    return reason.split(",")[0].strip("() ").replace(NODES_DOWN.replace(" ", "_"), NODES_DOWN)


def expand(job: str) -> list[str]:
    """The ids that one line stands for: ``7_[0-2,5%4]`` is 7_0, 7_1, 7_2 and 7_5 (not started yet)."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?::\d+)?(?:%\d+)?\]", job)
    if match is None:
        return [job]
    ids = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        ids += [f"{match[1]}_{index}" for index in range(int(first), int(last or first) + 1)]
    return ids
