"""Things that break, on the real cluster of the folder above.

``slow`` is a pretraining on two nodes, started as a user starts it. A test breaks something in its middle and
then asks :meth:`slow.Slow.bits` whether the result is that of ``undisturbed``, to the bit.
What every fault cost is printed at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from slow import Pause, Slow

PAUSES = pytest.StashKey[list[tuple[str, list[Pause]]]]()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bits of the same pretraining, on two ranks of this machine, with nothing broken."""
    slow = Slow(tmp_path_factory.mktemp("undisturbed"), "resources.pretrain={nodes: 1, ranks_per_node: 2}")
    slow.launch("pretrain", cluster="local")
    return slow.bits()


@pytest.fixture
def slow(testbed, undisturbed, tmp_path, request) -> Iterator[Slow]:
    yield from _watched(tmp_path, request)


@pytest.fixture
def slow_with_networks(testbed_with_networks, undisturbed, tmp_path, request) -> Iterator[Slow]:
    yield from _watched(tmp_path, request)


def _watched(folder: Path, request: pytest.FixtureRequest) -> Iterator[Slow]:
    made, ended = Slow(folder), threading.Event()
    watcher = threading.Thread(target=made.watch, args=(ended,))
    watcher.start()
    yield made
    ended.set()
    watcher.join()
    request.config.stash[PAUSES].append((request.node.name, made.pauses))
    if (folder / "runs" / "slow" / "manifest.json").exists():
        made.launch("cancel", check=None)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PAUSES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What every fault cost, for docs/reliability.md."""
    measured = [(test, pauses) for test, pauses in config.stash[PAUSES] if pauses]
    if measured:
        terminalreporter.section("pauses of the training, and steps done twice")
    for test, pauses in measured:
        said = ", ".join(f"{pause.seconds:.0f} s and {pause.repeated}" for pause in pauses)
        terminalreporter.write_line(f"{test}: {said}")
