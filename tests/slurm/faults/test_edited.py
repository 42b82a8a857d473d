"""The experiment file edited while its jobs run, and accounting lost meanwhile."""

from __future__ import annotations

import pytest
from slow import INTERVAL, TASK

pytestmark = pytest.mark.timeout(300)
ON_THEIR_WAY = "0 tasks submitted; 1 were submitted before and are still on their way"
REFUSED = "1 jobs are queued or running of tasks that this experiment had before it was changed"


def test_experiment_edited_while_its_jobs_run(slow, undisturbed, testbed):
    text = slow.experiment.read_text()
    slow.experiment = slow.folder / "slow.yaml"
    slow.experiment.write_text(text)
    slow.launch("pretrain")
    slow.wait_for_step(INTERVAL)
    jobs = dict(slow.manifest.jobs)
    for before, after in (
        ("epochs: 3", "epochs: 4"),
        ("projector_dim: 32", "projector_dim: 16"),
        ("image_size: 32", "image_size: 48"),
    ):
        slow.experiment.write_text(text.replace(before, after))
        refused = slow.launch("pretrain", check=2)
        assert refused.stderr.startswith(f"error: {REFUSED}"), refused.stderr
        assert slow.manifest.jobs == jobs
    slow.experiment.write_text(text.replace("checkpoint_steps: 10", "checkpoint_steps: 11"))
    assert ON_THEIR_WAY in slow.launch("pretrain").stdout, "an execution setting changes no result"
    slow.experiment.write_text(text.replace("methods:\n", "methods:\n  supervised: {}\n"))
    assert "submitted 2 pretrain tasks" in slow.launch("pretrain").stdout
    assert slow.manifest.jobs[TASK] == jobs[TASK] and len(slow.manifest.jobs) == 4
    assert slow.wait_for_end() == "COMPLETED"
    assert slow.resumed_at() == [] and slow.bits() == undisturbed


def test_accounting_lost_in_mid_run(slow, undisturbed, testbed):
    slow.launch("pretrain")
    slow.wait_for_step(INTERVAL)
    testbed.lose_accounting()
    try:
        assert "running: pretrain/slow" in slow.launch("status").stdout
        assert ON_THEIR_WAY in slow.launch("pretrain").stdout
        assert slow.wait_for_end() == "COMPLETED"
        assert slow.resumed_at() == [] and slow.bits() == undisturbed
        assert "everything is done" in slow.launch("pretrain").stdout
    finally:
        testbed.bring_back_accounting()
