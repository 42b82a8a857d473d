"""Jobs killed at random: a small run of ``benchmarks/chaos.py``; the large one is in docs/reliability.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LESS = [
    "finetune.protocols=[linear]",
    "finetune.fractions=[0.05, 0.5]",
    "seeds=[0, 1]",
    "resources.finetune={minutes: 10, tasks_per_job: 2}",
]


@pytest.mark.timeout(600)
def test_fine_tunings_killed_at_random_end_with_the_same_results(testbed, tmp_path):
    sets = [word for setting in LESS for word in ("--set", setting)]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--kills", "4", "--dir", str(tmp_path), *sets],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "results that differ" in ran.stdout
