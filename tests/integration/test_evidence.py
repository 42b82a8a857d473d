"""The evidence script: one sitting or several, the same tables, and all of the time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import evidence

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


@pytest.mark.slow
def test_interrupted_evidence_goes_on_and_counts_every_sitting(tmp_path, monkeypatch):
    out = tmp_path / "result.md"
    places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs"), "--out", str(out)]
    commits = iter(["aaaaaaa", "bbbbbbb"])
    monkeypatch.setattr(evidence, "commit", lambda: next(commits))
    assert evidence.main([TINY, *places, "--minutes", "0.02"]) == evidence.UNFINISHED
    assert not out.exists()
    assert evidence.main([TINY, *places]) == 0
    spent = json.loads((tmp_path / "runs" / "tiny" / "sittings.json").read_text())
    text = out.read_text()
    assert len(spent) == 2 and "in 2 sittings" in text
    assert text.startswith(f"# tiny\n\n    python -m pipeline.launch all {TINY}\n\nCommit aaaaaaa, bbbbbbb, ")
    assert "](" not in text.split("## Cost")[0]  # plots lie beside the report, not beside this
    assert "cass_vc" in text and "CPU cores" in text
