"""Work in several processes gives what one process gives."""

from __future__ import annotations

import os

import numpy as np
import pytest

from benchmarks.synthetic import Shape, make
from pipeline.errors import UserError
from pipeline.report import bootstrap, parallel
from pipeline.report.load import collect
from pipeline.specs import ReportSettings
from pipeline.stages.runner import _everything

pytestmark = pytest.mark.skipif(parallel.sys.platform != "linux", reason="only Linux forks safely")


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(parallel, "workers", lambda: 2)
    monkeypatch.setattr(bootstrap, "workers", lambda: 2)


def test_parts_are_done_elsewhere_and_come_back_in_order(two_workers):
    found = parallel.in_parallel(lambda number: (number, os.getpid()), range(5))
    assert [number for number, _ in found] == list(range(5))
    assert os.getpid() not in {process for _, process in found}


def test_an_exception_comes_back_and_a_dead_process_is_one_line(two_workers):
    with pytest.raises(ZeroDivisionError):
        parallel.in_parallel(lambda number: 1 // number, [1, 0])
    with pytest.raises(UserError, match="too little memory"):
        parallel.in_parallel(lambda number: os._exit(9), [1, 2])


def test_intervals_and_damage_are_those_of_one_process(two_workers, monkeypatch, tmp_path):
    manifest = make(Shape(datasets=2, methods=2, protocols=2, fractions=2, seeds=2), tmp_path, finished=True)
    damaged = next(task for task in manifest.tasks if task.stage == "finetune")
    (manifest.folder(damaged) / "predictions.npz").write_bytes(b"")
    collected = collect(_everything(manifest, manifest.tasks[-1]), metric="macro_f1")
    settings = ReportSettings(bootstrap=20, baseline="supervised")
    alone = bootstrap.bootstrap(collected, settings)
    monkeypatch.setattr(bootstrap, "TASKS_A_PROCESS", 1)
    together = bootstrap.bootstrap(collected, settings)
    assert alone.damaged.keys() == together.damaged.keys() == {damaged.key}
    assert np.array_equal(alone.gains, together.gains, equal_nan=True)
    assert np.array_equal(alone.each_gain, together.each_gain, equal_nan=True)
    assert alone.units == together.units
    for name, ends in alone.metrics.items():
        assert np.array_equal(ends, together.metrics[name], equal_nan=True)
    assert not np.isnan(alone.gains).all()
