"""What several files of these tests need, and what takes long to make."""

from __future__ import annotations

from pathlib import Path

import pytest
from kept_models import make_experiment


@pytest.fixture(scope="session")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished experiment, of which no test leaves anything changed."""
    root = tmp_path_factory.mktemp("kept")
    make_experiment(root)
    return root
