"""Manifest, receipts and the lock: what a reader may rely on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest

from pipeline import manifest as manifests
from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.manifest import Manifest, Receipt, damaged_files, describe_files, read_error, write_json
from pipeline.plan import plan
from pipeline.progress import read_progress


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "shard/../../evil"}, "is no id of a 'shard' task"),
        ({"id": "shard"}, "is no id"),
        ({"stage": "evil"}, "is no id of a 'evil' task"),
        ({"key": "../../evil"}, "no SHA-256"),
        ({"needs": ["shard/none"]}, "needs 'shard/none'"),
        ({"needs": "shard/digits"}, "tasks.0.needs"),
        ({"spec": []}, "tasks.0.spec"),
        ({"spec": {"lr": float("inf")}}, "not finite"),
    ],
)
def test_manifest_whose_tasks_lead_out_of_the_store_is_refused(tmp_path, changes, message):
    experiment = load_experiment("quickstart")
    Manifest(experiment.resolved(), "/store", plan(experiment)).write(tmp_path / "manifest.json")
    said = json.loads((tmp_path / "manifest.json").read_text())
    said["tasks"][0] |= changes
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"manifest\.json is damaged") as refused:
        Manifest.read(tmp_path / "manifest.json")
    assert message in str(refused.value)


@pytest.mark.parametrize("number", ["1e999", "-1E+0400", "1" * 400 + ".0", "NaN", "-Infinity"])
def test_number_that_is_not_finite_is_refused_however_it_is_written(tmp_path, number):
    text = json.dumps(asdict(make_receipt("k1", metrics={"loss": 7777.5})))
    (tmp_path / "receipt.json").write_text(text.replace("7777.5", number))
    assert Receipt.read(tmp_path, "k1") is None
    (tmp_path / "receipt.json").write_text(text.replace("7777.5", "1e300"))
    assert Receipt.read(tmp_path, "k1") == make_receipt("k1", metrics={"loss": 1e300})


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": 5},
        {"files": []},
        {"files": {"a": {"sha256": "x"}}},
        {"files": {"../../etc/passwd": {"sha256": "x", "bytes": 1}}},
        {"files": {"": {"sha256": "x", "bytes": 1}}},
        {"files": {"/etc/passwd": {"sha256": "x", "bytes": 1}}},
        {"hosts": "here"},
        {"seconds": "1"},
    ],
)
def test_receipt_with_values_of_another_kind_does_not_count(tmp_path, changes):
    said = asdict(make_receipt("k1", metrics={"a": 1}))
    (tmp_path / "receipt.json").write_text(json.dumps(said | changes))
    assert Receipt.read(tmp_path, "k1") is None


@pytest.mark.parametrize("text", ["[]", "5", "[" * 100_000, '{"done": []}', "\x00"])
def test_damaged_progress_and_error_say_nothing(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    (tmp_path / "error.json").write_text(text if text[0] != "{" else "5")
    assert read_progress(tmp_path) is None and read_error(tmp_path) is None


@pytest.mark.parametrize("done", ['"x"', "NaN", "1" * 400, "null"])
def test_progress_that_is_no_number_is_none(tmp_path, done):
    (tmp_path / "progress.json").write_text(f'{{"done": {done}, "total": 2, "text": ""}}')
    assert read_progress(tmp_path) is None


def test_receipt_counts_only_with_its_key_and_whole(tmp_path):
    make_receipt("k1").write(tmp_path)
    assert Receipt.read(tmp_path, "k1") == make_receipt("k1")
    assert Receipt.read(tmp_path, "k2") is None
    text = (tmp_path / "receipt.json").read_text()
    (tmp_path / "receipt.json").write_text(text[: len(text) // 2])
    assert Receipt.read(tmp_path, "k1") is None


def test_receipt_does_not_count_with_any_bit_flipped_or_any_byte_missing(tmp_path):
    make_receipt("k1", metrics={"loss": 0.5}).write(tmp_path)
    path = tmp_path / "receipt.json"
    sound = path.read_bytes()
    assert json.loads(sound)["metrics"] == {"loss": 0.5}, "anybody can read it"
    for position in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert Receipt.read(tmp_path, "k1") is None, bytes(damaged)
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        assert Receipt.read(tmp_path, "k1") is None, length


def test_receipt_of_a_version_that_wrote_no_sum_counts(tmp_path):
    said = asdict(make_receipt("k1"))
    del said["sum"], said["inputs"]
    write_json(tmp_path / "receipt.json", said)
    assert Receipt.read(tmp_path, "k1") == make_receipt("k1")


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
