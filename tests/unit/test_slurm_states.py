"""What Slurm's commands print, read by stand-ins for them."""

from __future__ import annotations

import pytest

import slurm
from slurm import JobState, SlurmError, Submission, job_states
from slurm.states import expand


@pytest.fixture
def say(tmp_path, monkeypatch):
    """``say(sacct=…, squeue=…)``: what the commands print; None: sacct fails. Returns the log of calls."""
    log = tmp_path / "calls"

    def say(*, sacct: str | None, squeue: str = ""):
        for name, text in (("sacct", sacct), ("squeue", squeue)):
            (tmp_path / f"{name}.txt").write_text(text or "")
            fails = (
                "echo 'sacct: error: Slurm accounting storage is disabled' >&2; exit 1"
                if text is None
                else ""
            )
            program = tmp_path / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n{fails}\ncat {tmp_path}/{name}.txt\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return log

    return say


def test_finished_jobs_take_one_call_of_sacct(say):
    log = say(
        sacct="7_0|COMPLETED|0:0|00:01:02|n1\n7_1|FAILED|1:0|00:00:03|n2\n9|TIMEOUT|0:0|01:00:00|n[1-2]\n"
    )
    states = job_states(["7_0", "7_1", "9"])
    assert states["7_0"] == JobState("COMPLETED", "", "n1", "0:0", "00:01:02")
    assert [state.state for state in states.values()] == ["COMPLETED", "FAILED", "TIMEOUT"]
    (call,) = log.read_text().splitlines()
    assert call.endswith("-j 7,9")


def test_waiting_jobs_say_why_in_words(say):
    say(
        sacct="7_[0-2%2]|PENDING|0:0|00:00:00|None assigned\n",
        squeue="7_0|PENDING|0|0:00||BeginTime|\n7_1|PENDING|0|0:00||Resources|\n7_2|PENDING|0|0:00||Strange|\n",
    )
    states = job_states(["7_0", "7_1", "7_2"])
    assert [state.reason for state in states.values()] == [
        "requeued, waits about two minutes",
        "waits for free nodes",
        "Strange",
    ]


def test_job_that_accounting_does_not_have_yet_is_found_in_the_queue(say):
    say(sacct="", squeue="8|RUNNING|0|0:05|n3|None|\n")
    assert job_states(["8"]) == {"8": JobState("RUNNING", "", "n3", "0:0", "0:05")}


def test_job_of_a_failed_node_that_is_queued_again_is_not_over(say):
    say(sacct="8|NODE_FAIL|0:0|00:05:00|n3\n", squeue="8|PENDING|0|0:00||BeginTime|\n")
    assert job_states(["8"])["8"].state == "PENDING"
    say(sacct="8|NODE_FAIL|0:0|00:05:00|n3\n", squeue="")
    assert job_states(["8"])["8"].state == "NODE_FAIL"


def test_site_without_accounting(say):
    say(sacct=None, squeue="8|FAILED|256|0:05|n3|NonZeroExitCode|\n")
    states = job_states(["8", "9"])
    assert states["8"] == JobState("FAILED", "ended with an error", "n3", "1:0", "0:05")
    assert states["9"].state == "UNKNOWN"


def test_cancelled_says_by_whom_or_that_a_parent_failed(say):
    say(sacct="1|CANCELLED by 1000|0:0|00:00:00|\n2|CANCELLED|0:0|00:00:00|\n")
    states = job_states(["1", "2", "2_4"])
    assert states["1"] == JobState("CANCELLED", "by 1000", "", "0:0", "00:00:00")
    assert states["2"].reason == states["2_4"].reason == "a job that it needs failed"


def test_array_element_that_accounting_lists_under_the_arrays_id_stands_for_no_other(say):
    """Its record comes before the note which element it is."""
    say(sacct="22|FAILED|1:0|00:00:01|n1\n", squeue="22_0|RUNNING|0|0:01|n2|None|\n")
    assert job_states(["22_0"])["22_0"].state == "RUNNING"
    say(sacct="22|CANCELLED by 0|0:0|00:00:01|n1\n22_0|COMPLETED|0:0|00:00:01|n2\n")
    assert [state.state for state in job_states(["22_0", "22_1"]).values()] == ["COMPLETED", "UNKNOWN"]


def test_cluster_that_does_not_answer_is_an_error(say, tmp_path):
    say(sacct=None)
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact controller' >&2\nexit 1\n"
    )
    with pytest.raises(SlurmError, match="'squeue' failed: Unable to contact controller"):
        job_states(["1"])


def test_nothing_asked_nothing_run():
    assert job_states([]) == {}


def test_ranges_of_array_elements_expand():
    assert expand("7_[0-2,5%4]") == ["7_0", "7_1", "7_2", "7_5"]
    assert expand("7_3") == ["7_3"]
    assert expand("7") == ["7"]


OURS = Submission("study-shard-1a2b3c", 1000, "alps", "2026-03-01T10:00:00")


@pytest.mark.parametrize(
    ("name", "user", "cluster", "submitted", "ours"),
    [
        ("study-shard-1a2b3c", "1000", "alps", "2026-03-01T10:00:00", True),
        ("study-shard-1a2b3c", "1000", "alps", "2026-03-01T12:30:00", True),  # queued again since
        ("study-shard-1a2b3c", "", "", "N/A", True),  # Slurm does not say
        ("precious", "1000", "alps", "2026-03-01T10:00:00", False),
        ("study-shard-9f9f9f", "1000", "alps", "2026-03-01T10:00:00", False),
        ("study-shard-1a2b3c", "1001", "alps", "2026-03-01T10:00:00", False),
        ("study-shard-1a2b3c", "1000", "jura", "2026-03-01T10:00:00", False),
        ("study-shard-1a2b3c", "1000", "alps", "2026-03-01T09:59:59", False),
    ],
)
def test_job_of_the_same_number_is_ours_only_if_all_that_is_known_agrees(
    say, name, user, cluster, submitted, ours
):
    """After Slurm's numbers began again, or on another cluster."""
    expected = "RUNNING" if ours else "UNKNOWN"
    say(sacct=f"8|RUNNING|0:0|00:05:00|n3|{user}|{cluster}|{submitted}|{name}\n")
    assert job_states(["8"], {"8": OURS})["8"].state == expected
    say(sacct=None, squeue=f"8|RUNNING|0|0:05|n3|None|{user}|{cluster}|{submitted}|{name}|\n")
    assert job_states(["8"], {"8": OURS})["8"].state == expected
    assert job_states(["8"])["8"].state == "RUNNING", "who does not say what was submitted gets the number's"


def test_accounting_tells_ours_from_a_later_job_of_the_same_number_and_from_its_own_earlier_start(say):
    name = OURS.name
    say(
        sacct=f"8_0|PENDING|0:0|00:00:00||1000|alps|2026-03-01T11:00:00|{name}\n"
        f"8_0|REQUEUED|0:0|00:01:00|n1|1000|alps|2026-03-01T10:00:00|{name}\n"
        f"8_1|COMPLETED|0:0|00:01:00|n1|1000|alps|2026-03-01T10:00:00|{name}\n"
        "8_1|RUNNING|0:0|00:01:00|n1|1000|alps|2027-01-01T10:00:00|pre|cious\n"
    )
    states = job_states(["8_0", "8_1"], {"8": OURS})
    assert [state.state for state in states.values()] == ["PENDING", "COMPLETED"]


def test_jobs_of_an_earlier_version_are_known_by_the_beginning_of_their_name(say):
    say(sacct="8|RUNNING|0:0|00:05:00|n3|1000|alps|2026-03-01T10:00:00|study-shard-1a2b3c\n")
    assert job_states(["8"], {"8": Submission("study-shard-*")})["8"].state == "RUNNING"
    assert job_states(["8"], {"8": Submission("study-pretrain-*")})["8"].state == "UNKNOWN"


def test_only_jobs_of_the_name_and_user_are_cancelled(say, tmp_path):
    log = say(sacct="")
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "scancel $*" >> {log}\n')
    (tmp_path / "scancel").chmod(0o755)
    slurm.cancel(["8_0", "8_1", "9", "10"], {"8": OURS, "9": Submission("study-aggregate-*")})
    assert log.read_text().splitlines() == [
        "scancel --quiet --name=study-shard-1a2b3c --user=1000 8_0 8_1",
        "scancel --quiet 9",
    ]


def test_when_jobs_were_submitted_is_asked_once_for_all(say):
    log = say(
        sacct=None,
        squeue="8_0|PENDING|0|0:00||Priority|1000|alps|2026-03-01T10:00:05|a|\n"
        "8_1|PENDING|0|0:00||Priority|1000|alps|2026-03-01T10:00:05|a|\n"
        "9|PENDING|0|0:00||Priority|1000|alps|2026-03-01T10:00:05|b|\n",
    )
    known = {"8": Submission("a", 1000, "alps"), "9": Submission("x", 1000, "alps")}
    assert slurm.submit_times(["8", "9"], known) == {"8": "2026-03-01T10:00:05"}
    assert len(log.read_text().splitlines()) == 1


def test_several_clusters_at_once_are_refused(monkeypatch, say):
    say(sacct=None)
    monkeypatch.setattr("slurm.commands.available", lambda: True)
    monkeypatch.setenv("SLURM_CLUSTERS", "alps,jura")
    with pytest.raises(SlurmError, match="name one"):
        slurm.require_controller()
