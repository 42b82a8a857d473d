"""Stages run by hand: the same entry point for each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.stages import STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_as_a_program_and_says_what_is_wrong_in_one_line(stage, tmp_path):
    command = [sys.executable, "-m", f"pipeline.stages.{stage}", "--task", "x", "--manifest"]
    ran = subprocess.run([*command, str(tmp_path / "none.json")], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert (
        ran.stderr == f"error: cannot read the manifest {tmp_path / 'none.json'}: No such file or directory\n"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_a_task_of_another(stage, tmp_path):
    other = next(name for name in STAGES if name != stage)
    words = ["--manifest", str(tmp_path), "--task", f"{other}/x"]
    ran = subprocess.run(
        [sys.executable, "-m", f"pipeline.stages.{stage}", *words], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (2, f"error: {other}/x is not a {stage} task\n")


def test_user_id_without_a_passwd_entry_has_a_name(tmp_path):
    """As in a container that is started with `--user 54321`."""
    if os.geteuid():
        pytest.skip("only root can take another user id")
    code = (
        "import getpass; from pathlib import Path; from pipeline.process import set_up_process, user_name;"
        " from pipeline.lock import lock, lock_holder; import os, sys\n"
        "os.setuid(54321)\nset_up_process()\nprint(user_name(), getpass.getuser())\n"
        "path = Path(sys.argv[1]) / 'lock'\n"
        "with lock(path): print(lock_holder(path)['user'])"
    )
    place = tmp_path / "theirs"
    place.mkdir()
    os.chown(place, 54321, -1)
    for above in place.parents:
        if above == Path(tempfile.gettempdir()):
            break
        above.chmod(0o755)
    nameless = {
        name: said
        for name, said in os.environ.items()
        if name not in ("USER", "LOGNAME", "LNAME", "USERNAME")
    }
    ran = subprocess.run(
        [sys.executable, "-c", code, str(place)], capture_output=True, text=True, env=nameless
    )
    assert ran.stdout.split() == ["uid54321"] * 3, ran.stderr
