"""Secrets of the environment in errors, and the permissions of what is written."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline import launch
from pipeline.errors import UserError, one_line, redact
from pipeline.files import chosen_umask, write_atomically
from pipeline.jobs import JobFailed, TaskJob
from pipeline.manifest import Manifest, Task
from pipeline.stages import command
from slurm.secret_names import is_secret

TOKEN = "hf_AbCdEfGh0123456789"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("GITHUB_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_SESSION_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("PGPASSWORD", True),
        ("my_token", True),
        ("HF_TOKEN_PATH", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("PATH", False),
        ("HF_HOME", False),
    ],
)
def test_secrets_are_known_by_their_names(name, secret):
    assert is_secret(name) is secret


def test_value_of_a_secret_is_replaced_by_its_name(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN[:12])  # the beginning of the other
    monkeypatch.setenv("A_SECRET", "true")
    error = ValueError(f"401 for https://me:{TOKEN}@host\n  and {TOKEN[:12]}; it is true")
    assert one_line(error) == "401 for https://me:<HF_TOKEN>@host and <GITHUB_TOKEN>; it is true"


def test_secret_of_several_lines_is_replaced_as_a_whole_and_line_by_line(monkeypatch):
    monkeypatch.setenv("A_SECRET", "first  line\nsecond line")
    assert one_line(ValueError("got first  line\nsecond line")) == "got <A_SECRET>"
    assert redact("got second line") == "got <A_SECRET>"


def test_error_that_ends_a_process_is_printed_without_secrets():
    program = (
        "import os; from pipeline.errors import redact_uncaught; redact_uncaught()\n"
        "try:\n    raise ValueError(os.environ['HF_TOKEN'])\n"
        "except ValueError as error:\n    raise RuntimeError('second') from error"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "HF_TOKEN": TOKEN}, capture_output=True, text=True
    )
    assert ran.returncode == 1 and TOKEN not in ran.stderr
    assert "ValueError: <HF_TOKEN>" in ran.stderr and "RuntimeError: second" in ran.stderr


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest with one task, whose stage raises what ``error`` is set to."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    task = Task("shard/x", "shard", {}, (), "0" * 64)
    found = SimpleNamespace(
        path=tmp_path / "manifest.json", folder=tmp_path / task.folder, task=task, error=None
    )
    Manifest({"name": "x"}, str(tmp_path), (task,)).write(found.path)

    def run(work):
        raise found.error

    found.run = run
    monkeypatch.setattr("pipeline.stages.shard.run", run)
    return found


@pytest.fixture
def own_process(monkeypatch):
    """What a job sets for its whole process is set back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    before = os.umask(0)
    os.umask(before)
    yield
    os.umask(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_error_of_a_task_is_written_and_printed_without_secrets(manifest, own_process, capfd, kind):
    manifest.error = kind(f"cannot log in with {TOKEN}")
    with pytest.raises(JobFailed):
        TaskJob(manifest.path, [manifest.task])()
    text = (manifest.folder / "error.json").read_text()
    assert TOKEN not in text
    said = json.loads(text)
    assert said["message"] == "cannot log in with <HF_TOKEN>"
    assert said["traceback"][-1].endswith("cannot log in with <HF_TOKEN>")
    printed = "".join(capfd.readouterr())
    assert TOKEN not in printed and "cannot log in with <HF_TOKEN>" in printed


def by_launcher(manifest) -> None:
    launch.main(["status", "x"])


def by_stage_command(manifest) -> None:
    command.main("shard", ["--manifest", str(manifest.path), "--task", "x"])


@pytest.mark.parametrize("run", [by_launcher, by_stage_command])
def test_commands_set_their_umask_and_end_without_secrets(manifest, own_process, monkeypatch, capfd, run):
    manifest.error = RuntimeError(f"cannot log in with {TOKEN}")
    monkeypatch.setattr("pipeline.launch.run", manifest.run)
    os.umask(0o000)
    with pytest.raises(RuntimeError) as caught:
        run(manifest)
    assert os.umask(0) == 0o027
    sys.excepthook(caught.type, caught.value, caught.tb)
    printed = capfd.readouterr().err
    assert TOKEN not in printed and "cannot log in with <HF_TOKEN>" in printed


def test_job_takes_the_launchers_umask_along(manifest, own_process, monkeypatch):
    """Jobs may start without the launcher's environment (sbatch --export=NONE)."""
    monkeypatch.setenv("CASS_UMASK", "007")
    job = TaskJob(manifest.path, [manifest.task])
    monkeypatch.delenv("CASS_UMASK")
    manifest.error = UserError("no images")
    os.umask(0o077)
    with pytest.raises(JobFailed):
        job()
    assert os.umask(0) == 0o007
    assert stat.S_IMODE(manifest.folder.stat().st_mode) == 0o770


@pytest.mark.parametrize(
    ("said", "umask"), [(None, 0o027), ("", 0o027), ("007", 0o007), ("0077", 0o077), ("022", 0o022)]
)
def test_umask_is_chosen_in_the_environment(monkeypatch, said, umask):
    monkeypatch.delenv("CASS_UMASK", raising=False)
    if said is not None:
        monkeypatch.setenv("CASS_UMASK", said)
    assert chosen_umask() == umask


@pytest.mark.parametrize("said", ["000", "002\n", "020", "700", "007x", "7", "0o27", "u=rwx", "٠٢٧"])
def test_umask_that_is_none_or_gives_all_away_is_refused(monkeypatch, said):
    monkeypatch.setenv("CASS_UMASK", said)
    with pytest.raises(UserError, match="expected an octal number such as 027 or 007"):
        chosen_umask()


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o666), (0o027, 0o640), (0o077, 0o600)])
def test_file_that_is_written_whole_obeys_the_umask(tmp_path, own_process, umask, mode):
    os.umask(umask)
    write_atomically(tmp_path / "x", b"1")
    write_atomically(tmp_path / "x", b"2")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
