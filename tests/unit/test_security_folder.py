"""The folder of submitit's pickles: whoever can write there decides what jobs run."""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path

import pytest

from slurm import LocalJob, LocalScheduler, SlurmError
from slurm.submission import private_folder

STRANGER = 4711
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def folder_of(path: Path, rights: int, owner: int | None = None) -> Path:
    path.mkdir()
    path.chmod(rights)
    if owner is not None:
        os.chown(path, owner, -1)
    return path


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_folder_is_made_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        private_folder(tmp_path / "runs" / "logs")
    finally:
        os.umask(before)
    assert mode(tmp_path / "runs" / "logs") == 0o700
    assert mode(tmp_path / "runs") == 0o777 & ~umask | 0o700


@pytest.mark.parametrize("rights", [0o755, 0o750, 0o500, 0o777])
def test_folder_that_is_there_becomes_private(tmp_path, rights):
    assert mode(private_folder(folder_of(tmp_path / "logs", rights))) == 0o700


@pytest.mark.parametrize("rights", [0o770, 0o707, 0o1777])
def test_folder_others_could_fill_is_refused_until_somebody_has_looked(tmp_path, rights):
    folder = folder_of(tmp_path / "logs", rights)
    (folder / "17_submitted.pkl").touch()
    with pytest.raises(SlurmError, match="could be written to by others until now"):
        private_folder(folder)
    assert mode(folder) == 0o700
    private_folder(folder)


def test_link_is_refused_and_what_it_points_to_left_alone(tmp_path):
    elsewhere = folder_of(tmp_path / "elsewhere", 0o755)
    (tmp_path / "logs").symlink_to(elsewhere)
    with pytest.raises(SlurmError, match="is a link"):
        private_folder(tmp_path / "logs")
    assert mode(elsewhere) == 0o755


def test_link_further_up_is_followed(tmp_path):
    folder_of(tmp_path / "scratch", 0o755)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    assert mode(private_folder(tmp_path / "runs" / "logs")) == 0o700


@pytest.mark.parametrize("further", ["", "deep/er"])
def test_place_where_anybody_can_replace_it_is_refused(tmp_path, further):
    above = folder_of(tmp_path / "open", 0o777)
    with pytest.raises(SlurmError, match="any user can replace it") as caught:
        private_folder(above / further / "logs")
    assert f"chmod o-w {above}" in str(caught.value)
    above.chmod(0o1777)  # as /tmp is
    private_folder(above / further / "logs")
    above.chmod(0o775)
    private_folder(above / further / "logs")


def test_place_is_judged_behind_links_too(tmp_path):
    folder_of(tmp_path / "open", 0o777)
    folder_of(tmp_path / "open" / "runs", 0o755)
    (tmp_path / "runs").symlink_to(tmp_path / "open" / "runs")
    with pytest.raises(SlurmError, match="any user can replace it"):
        private_folder(tmp_path / "runs" / "logs")


@needs_root
def test_folder_of_another_user_is_refused(tmp_path):
    folder = folder_of(tmp_path / "logs", 0o700, STRANGER)
    with pytest.raises(SlurmError, match="belongs to another user"):
        private_folder(folder)


@needs_root
def test_folder_or_link_that_a_stranger_put_into_a_shared_place_is_refused(tmp_path):
    """In a folder such as /tmp a stranger can be there first with what a user will write to."""
    shared = folder_of(tmp_path / "tmp", 0o1777)
    folder_of(shared / "runs", 0o755, STRANGER)
    folder_of(tmp_path / "mine", 0o755)
    (shared / "link").symlink_to(tmp_path / "mine")
    os.chown(shared / "link", STRANGER, -1, follow_symlinks=False)
    for name in ("runs", "link"):
        with pytest.raises(SlurmError, match="any user can replace it"):
            private_folder(shared / name / "logs")


@needs_root
def test_sticky_folder_of_a_stranger_protects_nothing(tmp_path):
    shared = folder_of(tmp_path / "shared", 0o1777, STRANGER)
    with pytest.raises(SlurmError, match="any user can replace it"):
        private_folder(shared / "logs")


LOOK = """
import os, pathlib, stat
folder = pathlib.Path(os.environ["SUBMITIT_FOLDER"])
calls = [path.name for path in folder.iterdir() if path.name.endswith("_submitted.pkl")]
pathlib.Path({seen!r}).write_text(f"{{folder}} {{stat.S_IMODE(folder.stat().st_mode):o}} {{len(calls)}}")
"""  # what a job writes down: where its pickled call lies, and who may go there


def test_calls_of_jobs_on_this_machine_lie_where_no_stranger_can_replace_them(tmp_path, monkeypatch):
    """Their logs may lie anywhere, as in a folder that a container shares with everybody."""
    logs = folder_of(tmp_path / "open", 0o777) / "logs"
    ran = LocalScheduler(logs).run(
        [LocalJob("look", functools.partial(exec, LOOK.format(seen=str(tmp_path / "seen"))))]
    )
    assert ran, "".join(path.read_text() for path in logs.glob("*.err"))
    folder, rights, calls = (tmp_path / "seen").read_text().split()
    assert (rights, calls) == ("700", "1") and not Path(folder).is_relative_to(tmp_path)
    assert not Path(folder).exists() and not list(logs.glob("*.pkl")) and list(logs.glob("*_0_log.err"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "open"))
    with pytest.raises(SlurmError, match="any user can replace it"):
        LocalScheduler(logs).run([])
