"""A real Slurm for the tests in this folder.

Fixtures, each a cluster that is brought up at its first use and taken down at the session's end:

- ``testbed``: four nodes (n1 … n4, eight claimed CPUs each), with accounting.
- ``testbed_without_accounting``: two nodes, no slurmdbd: ``sacct`` fails.
- ``testbed_with_small_arrays``: two nodes, no accounting, MaxArraySize 5.
- ``testbed_with_gpus``: two nodes, no accounting; one, alone in the partition ``gpu``, claims two GPUs.
- ``testbed_with_networks``: two nodes, c1 and c2, no accounting; each has a network that can be cut.

Asking for one points SLURM_CONF at it for that test, here and in every subprocess. A requeued job waits
five seconds there, not two minutes. Partitions: ``main`` (default), and ``low``, whose jobs are preempted by
those in ``high``.

- ``profile``: a ``slurm.Profile`` without GPUs whose jobs can import this folder's ``calls.py``.
- ``launch``: ``launch(*arguments, settings=…)`` runs ``python -m pipeline.launch`` in the test's folders.
- ``profile_file``: a profile for it.
- ``wait``: ``wait(ids, seconds=60)`` polls until all jobs have ended and returns ``{id: JobState}``.

Without Slurm (or root) the tests are skipped; with CASS_REQUIRE_SLURM=1 in the environment they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import slurm
from slurm.states import FINAL
from slurm.testbed.cluster import Testbed

HERE = Path(__file__).parent
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "slurmdbd", "mariadbd", "mariadb-install-db", "ip")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
        if HERE / "faults" in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def _slurm_installed() -> None:
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    why = f"not installed: {', '.join(lacking)}" if lacking else "not root" if os.geteuid() else ""
    if why and os.environ.get("CASS_REQUIRE_SLURM") == "1":
        pytest.fail(f"CASS_REQUIRE_SLURM=1, but a Slurm testbed cannot be had here: {why}", pytrace=False)
    if why:
        pytest.skip(f"no Slurm testbed: {why}")


def _cluster(folder: Path, *options: str) -> Iterator[Testbed]:
    command = [sys.executable, "-m", "slurm.testbed"]
    place = ["--dir", str(folder)]
    subprocess.run([*command, "up", *place, "--requeue-seconds", "5", *options], check=True)
    try:
        yield Testbed(folder)
    finally:
        subprocess.run([*command, "down", *place], check=True)


@pytest.fixture(scope="session")
def _with_accounting(_slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    yield from _cluster(tmp_path_factory.mktemp("testbed"), "--nodes", "4")


@pytest.fixture(scope="session")
def _without_accounting(
    _slurm_installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Testbed]:
    yield from _cluster(tmp_path_factory.mktemp("testbed"), "--nodes", "2", "--no-accounting")


@pytest.fixture(scope="session")
def _with_small_arrays(_slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    folder = tmp_path_factory.mktemp("testbed")
    yield from _cluster(folder, "--nodes", "2", "--no-accounting", "--max-array-size", "5")


@pytest.fixture(scope="session")
def _with_gpus(_slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    folder = tmp_path_factory.mktemp("testbed")
    yield from _cluster(folder, "--nodes", "2", "--no-accounting", "--gpu-nodes", "1")


@pytest.fixture(scope="session")
def _with_networks(_slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"]
    allowed = subprocess.run(probe, capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"no networks for nodes to be had here: {allowed.stderr.strip()}")
    folder = tmp_path_factory.mktemp("testbed")
    yield from _cluster(folder, "--nodes", "2", "--no-accounting", "--networks")


@pytest.fixture
def testbed_with_networks(_with_networks: Testbed, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    monkeypatch.setenv("SLURM_CONF", str(_with_networks.conf))
    return _with_networks


@pytest.fixture
def testbed(_with_accounting: Testbed, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    monkeypatch.setenv("SLURM_CONF", str(_with_accounting.conf))
    return _with_accounting


@pytest.fixture
def testbed_without_accounting(_without_accounting: Testbed, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    monkeypatch.setenv("SLURM_CONF", str(_without_accounting.conf))
    return _without_accounting


@pytest.fixture
def testbed_with_small_arrays(_with_small_arrays: Testbed, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    monkeypatch.setenv("SLURM_CONF", str(_with_small_arrays.conf))
    return _with_small_arrays


@pytest.fixture
def testbed_with_gpus(_with_gpus: Testbed, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    monkeypatch.setenv("SLURM_CONF", str(_with_gpus.conf))
    return _with_gpus


@pytest.fixture
def profile() -> slurm.Profile:
    return slurm.Profile(device="cpu", environment={"PYTHONPATH": str(HERE)})


@pytest.fixture
def wait() -> Callable[..., dict[str, slurm.JobState]]:
    def poll(ids: Sequence[str], seconds: float = 60) -> dict[str, slurm.JobState]:
        deadline = time.monotonic() + seconds
        while True:
            states = slurm.job_states(ids)
            if all(state.state in FINAL for state in states.values()):
                return states
            assert time.monotonic() < deadline, f"after {seconds} s: {states}"
            time.sleep(0.3)

    return poll


@pytest.fixture
def launch(tmp_path):
    """``launch(*arguments, settings=…)`` runs ``python -m pipeline.launch`` in this test's folders."""

    def run(
        *arguments: str, settings=(), check: int | None = 0, timeout: float = 560
    ) -> subprocess.CompletedProcess[str]:
        sets = [word for setting in settings for word in ("--set", setting)]
        places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
        command = [sys.executable, "-m", "pipeline.launch", *arguments, *places, *sets]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=timeout)
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def profile_file(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(f"device: cpu\npython: {sys.executable}\narray_limit: 1\n")
    return str(path)
