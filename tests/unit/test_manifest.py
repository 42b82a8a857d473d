"""Manifest, receipts and the lock: what a reader may rely on."""

from __future__ import annotations

import json
import os

import pytest

from pipeline import manifest as manifests
from pipeline.errors import UserError
from pipeline.experiment import load_experiment
from pipeline.manifest import Manifest, Receipt, damaged_files, describe_files, write_json
from pipeline.plan import plan


def make_receipt(key: str, **changes) -> Receipt:
    said = dict(key=key, task="shard/x", stage="shard", metrics={}, files={}, started="", ended="")
    return Receipt(**{**said, "seconds": 1.0, "hosts": ["h"], "world_size": 1, **changes})


def test_manifest_read_back_is_the_same(tmp_path):
    experiment = load_experiment("quickstart")
    written = Manifest(experiment.resolved(), "/store", plan(experiment)).with_jobs({"shard/digits": "12_3"})
    written.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == written


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "tasks": [{}]}']
)
def test_damaged_manifest_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json") as refused:
        Manifest.read(tmp_path / "manifest.json")
    assert "\n" not in str(refused.value)


def test_receipt_counts_only_with_its_key_and_whole(tmp_path):
    make_receipt("k1").write(tmp_path)
    assert Receipt.read(tmp_path, "k1") == make_receipt("k1")
    assert Receipt.read(tmp_path, "k2") is None
    text = (tmp_path / "receipt.json").read_text()
    (tmp_path / "receipt.json").write_text(text[: len(text) // 2])
    assert Receipt.read(tmp_path, "k1") is None


def test_receipt_of_another_format_version_is_refused(tmp_path):
    make_receipt("k1", format=manifests.FORMAT + 1).write(tmp_path)
    with pytest.raises(UserError, match="format version 2"):
        Receipt.read(tmp_path, "k1")


def test_damage_is_found_by_hash(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"0123")
    (tmp_path / "log").write_bytes(b"abc")
    receipt = make_receipt("k", files=describe_files(tmp_path))
    assert set(receipt.files) == {"a/weights", "log"} and damaged_files(tmp_path, receipt) == []
    (tmp_path / "a" / "weights").write_bytes(b"0124")
    (tmp_path / "log").unlink()
    problems = damaged_files(tmp_path, receipt)
    assert len(problems) == 2 and "SHA-256" in problems[0] and "missing" in problems[1]


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["file.json"]
