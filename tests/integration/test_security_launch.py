"""Real launches: what permissions everything has that they write, and that no secret is anywhere in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "tiny.yaml"
LESS = [
    "methods={simclr: {}}",
    "backbones={cnn: {name: test_resnet}}",
    "seeds=[0]",
    "finetune.protocols=[linear]",
    "finetune.fractions=[0.1]",
    "report.bootstrap=10",
]
SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGh0123456789",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    "GITHUB_TOKEN": "ghp_zyxwvutsrqponmlkjihg9876543210",
    "DB_PASSWORD": "correct-horse-battery-staple",
}

pytestmark = pytest.mark.slow


def launch(folder: Path, *, umask: int, code: int = 0, **environment: str) -> str:
    """Launch the tiny experiment as a process of its own; returns what it printed."""
    places = ["--store", str(folder / "store"), "--runs", str(folder / "runs")]
    sets = [word for setting in LESS for word in ("--set", setting)]
    before = os.umask(umask)  # a launcher inherits it
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pipeline.launch", "all", TINY, "--cluster", "local", *places, *sets],
            env={**os.environ, **SECRETS, **environment},
            capture_output=True,
            text=True,
        )
    finally:
        os.umask(before)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def everything(folder: Path) -> list[Path]:
    found = [path for name in ("store", "runs") for path in (folder / name, *(folder / name).rglob("*"))]
    assert len(found) > 20
    return found


def with_secrets(folder: Path) -> list[str]:
    """Every secret in every file that was written, whatever its format."""
    return [
        f"{path}: {name}"
        for path in everything(folder)
        if path.is_file()
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    ]


def modes(folder: Path) -> Counter[tuple[str, str]]:
    """How many files and folders outside the private one have which permissions."""
    private = folder / "runs" / "tiny" / "logs"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    return Counter(
        ("folder" if path.is_dir() else "file", oct(stat.S_IMODE(path.stat().st_mode)))
        for path in everything(folder)
        if path != private
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An experiment that has run to its tables, started by somebody whose files all may change."""
    folder = tmp_path_factory.mktemp("finished")
    printed = launch(folder, umask=0o000)
    assert not [name for name, secret in SECRETS.items() if secret in printed]
    return folder


def test_files_are_0640_and_folders_0750_whatever_the_callers_umask(finished):
    suffixes = {path.suffix for path in everything(finished)}
    assert {".tar", ".csv", ".json", ".safetensors", ".npz", ".png", ".md"} <= suffixes
    assert any(path.name.startswith("events.out.tfevents") for path in everything(finished))
    assert set(modes(finished)) == {("file", "0o640"), ("folder", "0o750")}


def test_no_secret_of_the_environment_is_written(finished):
    assert not with_secrets(finished)


def test_files_of_a_shared_store_can_be_changed_by_the_group(tmp_path):
    launch(tmp_path, umask=0o077, CASS_UMASK="007")
    assert set(modes(tmp_path)) == {("file", "0o660"), ("folder", "0o770")}


def test_secret_in_a_librarys_error_is_not_written(tmp_path):
    library = tmp_path / "libraries" / "sklearn"  # the digits come from it
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(
        "import os, sys\n"
        "if 'SUBMITIT_EXECUTOR' in os.environ:\n"
        "    raise RuntimeError('cannot log in with ' + os.environ['HF_TOKEN'])\n"
        f"sys.path.remove({str(library.parent)!r})\n"
        "del sys.modules['sklearn']\n"
        "import sklearn\n"  # the launcher gets the true one
    )
    folder = tmp_path / "work"
    printed = launch(folder, umask=0o022, code=1, PYTHONPATH=str(library.parent))
    assert "cannot log in with <HF_TOKEN>" in printed and SECRETS["HF_TOKEN"] not in printed
    (error,) = (folder / "store" / "shard").glob("*/error.json")
    assert json.loads(error.read_text())["message"] == "cannot log in with <HF_TOKEN>"
    logs = [path.read_text() for path in (folder / "runs" / "tiny" / "logs").glob("*_log.err")]
    assert any("cannot log in with <HF_TOKEN>" in log for log in logs)
    assert not with_secrets(folder)
