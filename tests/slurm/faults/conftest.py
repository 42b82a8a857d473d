"""Things that break, on the real cluster of the folder above.

``slow`` is a pretraining on two nodes, started as a user starts it. A test breaks something in its middle and
then asks :meth:`slow.Slow.bits` whether the result is that of ``undisturbed``, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slow import Slow


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bits of the same pretraining, on two ranks of this machine, with nothing broken."""
    slow = Slow(tmp_path_factory.mktemp("undisturbed"), "resources.pretrain={nodes: 1, ranks_per_node: 2}")
    slow.launch("pretrain", cluster="local")
    return slow.bits()


@pytest.fixture
def slow(testbed, undisturbed, tmp_path) -> Iterator[Slow]:
    made = Slow(tmp_path)
    yield made
    if (tmp_path / "runs" / "slow" / "manifest.json").exists():
        made.launch("cancel", check=None)
