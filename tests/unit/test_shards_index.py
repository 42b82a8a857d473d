"""An index answers from its table, reads any image by row, and refuses what is not its dataset."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import CsvSource, DigitsSource, Index, InputError, ShardOptions, write
from shards import index as index_module


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write(DigitsSource(), folder, ShardOptions(shard_samples=200))
    return folder


def table(root: Path, rows: list[str], head: str = "path,label", *, grey16: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(len(rows)):
        pixels = (
            rng.integers(0, 1000, (8, 8)).astype(np.uint16)
            if grey16
            else rng.integers(0, 255, (8, 8, 3), np.uint8)
        )
        Image.fromarray(pixels).save(root / f"{number}.png")
    (root / "labels.csv").write_text(
        "\n".join([head, *(f"{number}.png,{row}" for number, row in enumerate(rows))])
    )
    return root


def test_contract_columns_and_types(digits):
    samples = Index.open(digits).samples
    columns = [
        "key",
        "shard",
        "offset",
        "length",
        "format",
        "labels",
        "split",
        "group",
        "width",
        "height",
        "pixel_hash",
    ]
    assert set(columns) <= set(samples.columns) and list(samples.index) == list(range(1797))
    assert samples["offset"].dtype == np.int64 and set(samples["labels"]) == set("0123456789")
    assert set(samples["group"]) == {""} and samples["labelled"].all()


def test_rows_and_targets_of_digits_are_true(digits):
    from sklearn.datasets import load_digits

    index = Index.open(digits)
    rows = np.concatenate([index.rows(split) for split in ("train", "val", "test")])
    assert sorted(rows) == list(range(1797)) and rows.dtype == np.int64
    numbers = [int(path.split("/")[1][:4]) for path in index.samples["path"]]
    assert np.array_equal(index.targets(np.arange(1797)), load_digits().target[numbers])
    image = np.asarray(index.decode(5))[..., 0].astype(int)
    assert np.abs(image / 255 * 16 - load_digits().images[numbers[5]]).max() < 0.05


def test_unknown_split_is_named(digits):
    with pytest.raises(InputError, match="no split 'valid'"):
        Index.open(digits).rows("valid")


def test_unlabelled_samples_have_target_minus_one(tmp_path):
    rows = ["x", "y"] * 20 + [""] * 5
    index = write(CsvSource(table(tmp_path / "in", rows)), tmp_path / "out")
    unlabelled = index.rows("train", labelled=False)
    assert len(unlabelled) == 5 and (index.targets(unlabelled) == -1).all()
    assert set(index.targets(index.rows("train", labelled=True))) == {0, 1}


def test_multilabel_targets(tmp_path):
    rows = ["1,0", "1,1", "0,1", "0,0"] * 10 + [","] * 3
    source = CsvSource(table(tmp_path / "in", rows, "path,z,a"), label_columns=["z", "a"])
    index = write(source, tmp_path / "out")
    assert index.task == "multilabel" and index.classes == ["z", "a"]
    targets = index.targets(np.arange(len(index)))
    assert targets.dtype == np.float32 and targets.shape == (43, 2)
    for path, labels, target in zip(index.samples["path"], index.samples["labels"], targets):
        row = rows[int(path.split(".")[0])]
        expected = [float(cell or "nan") for cell in row.split(",")]
        assert np.array_equal(target, np.array(expected, np.float32), equal_nan=True)
        assert labels == "|".join(name for name, value in zip("za", expected) if value == 1)
    assert np.isnan(index.targets(index.rows("train", labelled=False))).all()


def test_names_such_as_na_and_numbers_stay_text(tmp_path):
    rows = ["NA,007", "null,008"] * 20
    rows = [f"{row}-{number}" for number, row in enumerate(rows)]
    source = CsvSource(
        table(tmp_path / "in", rows, "path,label,patient"), group_column="patient", classes=["NA", "null"]
    )
    index = write(source, tmp_path / "out")
    assert index.classes == ["NA", "null"] and set(index.samples["labels"]) == {"NA", "null"}
    assert all(group.startswith("00") for group in index.samples["group"])


def test_sixteen_bit_scale_is_the_datasets(tmp_path):
    index = write(CsvSource(table(tmp_path / "in", ["x"] * 10, grey16=True)), tmp_path / "out")
    black, white = index.meta["intensity"]["values"]
    assert 0 <= black < 100 and 900 < white <= 1023
    shown = [np.asarray(index.decode(row)) for row in range(10)]
    assert max(image.max() for image in shown) == 255 and min(image.min() for image in shown) == 0


def test_reading_after_fork_pickle_and_from_threads(digits, monkeypatch):
    monkeypatch.setattr(index_module, "OPEN_FILES", 2)
    index = Index.open(digits)
    expected = [index.read(row) for row in range(len(index))]
    copy = pickle.loads(pickle.dumps(index))
    assert [copy.read(row) for row in range(0, 1797, 50)] == expected[::50]
    results: dict[int, list[bytes]] = {}

    def read_all(worker: int) -> None:
        order = np.random.default_rng(worker).permutation(len(index))
        found = {int(row): index.read(int(row)) for row in order}
        results[worker] = [found[row] for row in range(len(index))]

    threads = [threading.Thread(target=read_all, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[worker] == expected for worker in range(4))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(index.read, range(0, 1797, 7)) == expected[::7]
    assert [index.read(row) for row in range(0, 1797, 50)] == expected[::50]


def test_few_files_stay_open(digits, monkeypatch):
    monkeypatch.setattr(index_module, "OPEN_FILES", 3)
    before = len(os.listdir("/proc/self/fd"))
    index = Index.open(digits)
    for row in range(0, 1797, 20):
        index.read(row)
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del index
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_equal_datasets_have_equal_fingerprints(digits, tmp_path):
    again = write(DigitsSource(), tmp_path / "again", ShardOptions(shard_samples=200))
    assert again.fingerprint == Index.open(digits).fingerprint
    assert write(DigitsSource(), tmp_path / "other").fingerprint != again.fingerprint


def copied(digits: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in digits.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_other_format_version_is_refused(digits, tmp_path):
    folder = copied(digits, tmp_path / "copy")
    meta = json.loads((folder / "index.json").read_text())
    meta["format_version"] = 99
    (folder / "index.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="copy has format version 99, expected 3"):
        Index.open(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("index.json", "no dataset of shards: index.json is missing"),
        ("samples.csv", "samples.csv is missing"),
        ("val-000000.tar", "val-000000.tar is missing"),
    ],
)
def test_missing_file_is_named(digits, tmp_path, name, message):
    folder = copied(digits, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(InputError, match=message):
        Index.open(folder)


def test_cut_shard_is_refused_when_opened_and_when_read(digits, tmp_path):
    folder = copied(digits, tmp_path / "copy")
    index = Index.open(folder)
    with open(folder / "val-000000.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"val-000000.tar is cut short"):
        index.read(int(index.rows("val")[-1]))
    with pytest.raises(InputError, match=r"val-000000.tar has 1000 bytes"):
        Index.open(folder)


def test_broken_tables_are_named(digits, tmp_path):
    folder = copied(digits, tmp_path / "copy")
    text = (folder / "samples.csv").read_text()
    (folder / "samples.csv").write_text(text.rsplit("\n", 2)[0] + "\n")
    with pytest.raises(InputError, match=r"samples.csv has 1796 rows"):
        Index.open(folder)
    (folder / "samples.csv").write_text(text.replace("offset", "place", 1))
    with pytest.raises(InputError, match=r"no column 'offset'"):
        Index.open(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index.json is not valid JSON"):
        Index.open(folder)
