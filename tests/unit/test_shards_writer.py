"""A dataset is written whole or not at all, with the same bytes for the same input, and without leaks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import CsvSource, FolderSource, Index, InputError, ShardOptions, parallel, verify, write
from shards.writer import gather

SPLITS = ("train", "val", "test")


def noise(seed: int, size: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


def put(path: Path, image: Image.Image | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (noise(image) if isinstance(image, int) else image).save(path)


def classes(root: Path, count: int = 10, *, seed: int = 0) -> Path:
    """Class folders a and b with ``count`` different images each, in several formats."""
    for number in range(count):
        for place, name in enumerate("ab"):
            suffix = ("png", "jpg", "webp", "bmp", "tif")[number % 5]
            put(root / name / f"{number}.{suffix}", seed + 2 * number + place)
    return root


def with_splits(root: Path, *, count: int = 4) -> Path:
    for place, split in enumerate(SPLITS):
        classes(root / split, count, seed=1000 * place)
    return root


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_input_gives_same_bytes_whatever_the_processes(tmp_path, monkeypatch):
    root = classes(tmp_path / "in", 20)
    write(FolderSource(root), tmp_path / "one", ShardOptions(processes=1, shard_samples=7, resize=10))
    os.utime(root / "a" / "0.png", (1, 1))
    monkeypatch.setattr(parallel, "EACH", 1)
    monkeypatch.setattr(parallel, "CHUNK", 3)
    write(FolderSource(root), tmp_path / "two", ShardOptions(processes=2, shard_samples=7, resize=10))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert (tmp_path / "one" / "train-000001.tar").exists()


def test_another_seed_or_image_gives_another_fingerprint(tmp_path):
    root = classes(tmp_path / "in")
    first = write(FolderSource(root), tmp_path / "one")
    assert write(FolderSource(root), tmp_path / "two", ShardOptions(seed=1)).fingerprint != first.fingerprint
    put(root / "a" / "0.png", 999)
    changed = write(FolderSource(root), tmp_path / "three")
    assert changed.meta["source"]["fingerprint"] != first.meta["source"]["fingerprint"]


def test_plain_tar_and_plain_webdataset_read_the_tars(tmp_path):
    import webdataset

    index = write(FolderSource(classes(tmp_path / "in")), tmp_path / "out", ShardOptions(shard_samples=6))
    tars = sorted((tmp_path / "out").glob("*.tar"))
    names = [
        name for path in tars for name in subprocess.check_output(["tar", "tf", path], text=True).split()
    ]
    expected = {f"{key}.{suffix}" for key, suffix in zip(index.samples["key"], index.samples["format"])}
    assert set(names) == expected | {f"{key}.json" for key in index.samples["key"]} and len(names) == len(
        set(names)
    )
    read = list(webdataset.WebDataset([str(path) for path in tars], shardshuffle=False).decode("pil"))
    by_key = {sample["__key__"]: sample for sample in read}
    assert len(read) == len(index) == 20
    for row, entry in index.samples.iterrows():
        sample = by_key[entry["key"]]
        assert sample["json"] == {
            "labels": [entry["labels"]],
            "split": entry["split"],
            "group": "",
            "path": entry["path"],
        }
        assert np.array_equal(np.asarray(sample[entry["format"]]), np.asarray(index.decode(row)))


def test_original_bytes_lie_in_the_tar(tmp_path):
    root = classes(tmp_path / "in")
    index = write(FolderSource(root), tmp_path / "out")
    for row, path in enumerate(index.samples["path"]):
        original = (root / path).read_bytes()
        assert (index.read(row) == original) == path.endswith(("png", "jpg", "webp"))


def test_tar_members_have_no_time_owner_or_odd_mode(tmp_path):
    write(FolderSource(classes(tmp_path / "in")), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert {(one.mtime, one.uid, one.gid, one.uname, one.mode) for one in tar} == {(0, 0, 0, "", 0o644)}


def test_shards_are_of_nearly_one_size_and_no_larger_than_asked(tmp_path):
    index = write(
        FolderSource(classes(tmp_path / "in", 30)), tmp_path / "out", ShardOptions(shard_samples=10)
    )
    sizes = [shard["samples"] for shard in index.meta["shards"] if shard["split"] == "train"]
    assert sum(sizes) == 42 and max(sizes) <= 10 and max(sizes) - min(sizes) <= 1


def test_classes_are_mixed_within_a_shard(tmp_path):
    labels = write(FolderSource(classes(tmp_path / "in", 40)), tmp_path / "out").samples["labels"].tolist()
    assert sum(one != other for one, other in pairwise(labels)) > 20


def test_validation_is_made_out_of_train_and_test_stays(tmp_path):
    root = tmp_path / "in"
    classes(root / "train", 40)
    classes(root / "test", 10, seed=5000)
    samples = write(FolderSource(root), tmp_path / "out").samples
    counts = samples.groupby(["split", "labels"]).size().to_dict()
    assert counts == {(s, c): n for s, n in (("train", 35), ("val", 5), ("test", 10)) for c in "ab"}
    assert samples[samples["split"] == "test"]["path"].str.startswith("test/").all()
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["splits_made"] == ["val"]


def patients(root: Path, *, split: str = "") -> CsvSource:
    rows = ["path,label,patient,split"]
    for number in range(60):
        put(root / f"{number}.png", number)
        rows.append(f"{number}.png,{'ab'[number % 2]},p{number // 3},{split or SPLITS[number // 3 % 3]}")
    (root / "labels.csv").write_text("\n".join(rows))
    return CsvSource(root, group_column="patient", split_column="split")


@pytest.mark.parametrize("column", ["split", None])
def test_no_patient_is_in_two_splits(tmp_path, column):
    source = patients(tmp_path / "in", split="train")
    source = CsvSource(source.root, group_column="patient", split_column=column)
    samples = write(source, tmp_path / "out").samples
    assert samples.groupby("group")["split"].nunique().max() == 1
    assert set(samples["split"]) == set(SPLITS)


def test_group_in_two_given_splits_is_named(tmp_path):
    source = patients(tmp_path / "in")
    path = tmp_path / "in" / "labels.csv"
    path.write_text(path.read_text().replace("p4,val", "p4,test", 1))
    with pytest.raises(InputError, match=r"group 'p4' is in two splits, (test and val|val and test)"):
        write(source, tmp_path / "out")


def leaky(root: Path) -> Path:
    """The same picture in train and test (as PNG and BMP), and another twice in train."""
    with_splits(root)
    put(root / "train" / "a" / "leak.png", 77)
    put(root / "test" / "a" / "leak.bmp", 77)
    put(root / "train" / "b" / "twice1.png", 78)
    put(root / "train" / "b" / "twice2.png", 78)
    return root


def test_identical_pixels_in_two_splits_are_an_error_that_names_them(tmp_path):
    with pytest.raises(InputError, match=r"1 images are in two splits.*test/a/leak.bmp.*train/a/leak.png"):
        write(FolderSource(leaky(tmp_path / "in")), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("choice", "left"), [("drop", ["test/a/leak.bmp"]), ("keep", ["train/a/leak.png", "test/a/leak.bmp"])]
)
def test_identical_pixels_can_be_dropped_from_train_or_kept(tmp_path, choice, left):
    index = write(FolderSource(leaky(tmp_path / "in")), tmp_path / "out", ShardOptions(duplicates=choice))
    assert sorted(path for path in index.samples["path"] if "leak" in path) == sorted(left)
    found = index.report["duplicates"]
    assert (found["across_splits"], found["within_splits"], found["dropped"]) == (1, 1, int(choice == "drop"))
    assert any("identical pixels" in line for line in index.warnings)


def test_identical_pixels_get_one_split_where_splits_are_made(tmp_path):
    root = classes(tmp_path / "in", 15)
    for number in range(15):
        put(
            root / "a" / f"copy{number}.bmp",
            Image.open(root / "a" / f"{number}.{('png', 'jpg', 'webp', 'bmp', 'tif')[number % 5]}").convert(
                "RGB"
            ),
        )
    samples = write(FolderSource(root), tmp_path / "out").samples
    assert samples.groupby("pixel_hash").size().max() == 2
    assert samples.groupby("pixel_hash")["split"].nunique().max() == 1


def test_unlabelled_copy_of_a_test_image_is_a_leak(tmp_path):
    root = with_splits(tmp_path / "in")
    put(tmp_path / "extra" / "copy.bmp", Image.open(root / "test" / "a" / "0.png"))
    with pytest.raises(InputError, match=r"test/a/0.png.*unlabelled/extra/copy.bmp"):
        write(FolderSource(root), tmp_path / "out", ShardOptions(unlabelled=[tmp_path / "extra"]))


def test_same_pixels_with_two_labels_are_reported(tmp_path):
    root = classes(tmp_path / "in")
    put(root / "a" / "x.png", 500)
    put(root / "b" / "y.png", 500)
    index = write(FolderSource(root), tmp_path / "out")
    assert index.report["duplicates"]["with_different_labels"] == 1
    assert any("different labels" in line for line in index.warnings)


def test_unlabelled_folders_are_train_without_labels(tmp_path):
    root = classes(tmp_path / "in")
    for number in range(5):
        put(root / "pool" / f"{number}.png", 900 + number)
        put(tmp_path / "other" / "pool" / f"{number}.png", 950 + number)
    options = ShardOptions(unlabelled=["pool", tmp_path / "other" / "pool"])
    index = write(FolderSource(root), tmp_path / "out", options)
    assert index.classes == ["a", "b"]
    rows = index.rows("train", labelled=False)
    assert len(rows) == 10 and (index.targets(rows) == -1).all()
    assert len(index.rows("train", labelled=True)) == 14
    assert not len(index.rows("val", labelled=False)) and not len(index.rows("test", labelled=False))


def test_unreadable_images_are_listed_with_their_reason(tmp_path):
    root = classes(tmp_path / "in", 20)
    (root / "a" / "empty.png").touch()
    (root / "b" / "broken.jpg").write_bytes((root / "b" / "1.jpg").read_bytes()[:300])
    index = write(FolderSource(root), tmp_path / "out")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "rejected.csv").read_text())))
    assert [row["path"] for row in rows] == ["a/empty.png", "b/broken.jpg"]
    assert rows[0]["reason"] == "file is empty" and "runcated" in rows[1]["reason"]
    assert len(index) == 40 and any("2 unreadable" in line for line in index.warnings)
    with pytest.raises(InputError, match=r"2 of 42 images are unreadable.*0.01.*a/empty.png: file is empty"):
        write(FolderSource(root), tmp_path / "strict", ShardOptions(max_rejected=0.01))


def test_names_with_line_breaks_and_quotes_are_read_back(tmp_path):
    odd = ["a\rb", "a\nb", 'a"b', "a,b", "a\r\nb", "'", "a\u2028b"]
    for number in range(21):
        put(tmp_path / "in" / f"{number}\r.png", noise(number))
    with open(tmp_path / "in" / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        rows.writerow(["path", "label", "group"])
        rows.writerows([f"{number}\r.png", label, f"g{number}\r"] for number, label in enumerate(odd * 3))
    index = write(CsvSource(tmp_path / "in", group_column="group"), tmp_path / "out")
    assert set(index.samples["labels"]) == set(odd) and verify(tmp_path / "out") == []
    assert set(index.samples["path"]) == {f"{number}\r.png" for number in range(21)}


def test_unlabelled_folder_that_cannot_be_is_named(tmp_path):
    classes(tmp_path / "in", 3)
    for name in ("a\0b", "x" * 300):
        with pytest.raises(InputError, match="does not exist"):
            write(FolderSource(tmp_path / "in"), tmp_path / "out", ShardOptions(unlabelled=[name]))


def test_csv_row_without_its_file_is_rejected(tmp_path):
    source = patients(tmp_path / "in", split="train")
    (tmp_path / "in" / "7.png").unlink()
    index = write(source, tmp_path / "out")
    assert index.report["rejected"] == {"no such file": 1} and len(index) == 59


def test_no_readable_image_and_class_left_empty_are_named(tmp_path):
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_text("text")
    with pytest.raises(InputError, match=r"no readable image among 2 .*a/1.png: not an image"):
        write(FolderSource(tmp_path / "in"), tmp_path / "out")
    for number in range(9):
        put(tmp_path / "in" / "a" / f"good{number}.png", number)
    with pytest.raises(InputError, match="class 'b' has no readable image"):
        write(FolderSource(tmp_path / "in"), tmp_path / "out", ShardOptions(max_rejected=0.9))


def test_class_that_is_only_in_test_is_named(tmp_path):
    root = with_splits(tmp_path / "in")
    put(root / "test" / "c" / "1.png", 321)
    with pytest.raises(InputError, match="class 'c' has no image in the train split"):
        write(FolderSource(root), tmp_path / "out")


def test_keys_are_safe_unique_and_stable():
    paths = [
        "a/b.c/1.png",
        "a/b_c/1.png",
        "a/b.c/1.jpg",
        "ä/ü ö.png",
        ".x/y.png",
        "a/" + "long" * 90 + ".png",
        "__m__.png",
    ]
    keys = [gather.sample_key(path) for path in paths]
    assert len(set(keys)) == len(keys) and max(map(len, keys)) <= 80
    assert all(key.isascii() and not set(key) & set("./ ") and key[0] not in "-_" for key in keys)
    assert (
        gather.sample_key("train/a/1.png") == "train_a_1-" + hashlib.sha256(b"train/a/1.png").hexdigest()[:8]
    )


def test_two_samples_with_one_key_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "sample_key", lambda path: path.rsplit("/", 1)[-1].split(".")[0])
    with pytest.raises(InputError, match=r"'a/0.png' and 'b/0.png' have one key, '0'"):
        write(FolderSource(classes(tmp_path / "in")), tmp_path / "out")


def test_old_dataset_is_replaced_and_other_files_stay(tmp_path):
    out = tmp_path / "out"
    write(FolderSource(classes(tmp_path / "in", 30)), out, ShardOptions(shard_samples=5))
    (out / "progress.json").write_text("{}")
    write(FolderSource(tmp_path / "in"), out)
    write(FolderSource(tmp_path / "in"), tmp_path / "fresh")
    (out / "progress.json").unlink()
    assert digest(out) == digest(tmp_path / "fresh")


def test_failure_leaves_the_old_dataset_and_no_trace(tmp_path, monkeypatch):
    out = tmp_path / "out"
    root = classes(tmp_path / "in")
    write(FolderSource(root), out)
    before = digest(out)
    monkeypatch.setattr(
        "shards.writer._write_tables", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(InputError, match=r"cannot write dataset .*out: No space left") as caught:
        write(FolderSource(root), out, ShardOptions(seed=1))
    assert "\n" not in str(caught.value) and digest(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


FULL_DISK = """
import resource, signal, sys
from shards import FolderSource, InputError, ShardOptions, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    write(FolderSource(sys.argv[1]), sys.argv[2], ShardOptions(processes=1))
except InputError as error:
    print(error)
"""


def test_tar_that_cannot_grow_is_one_line_and_no_trace(tmp_path):
    root = classes(tmp_path / "in")
    told = subprocess.check_output([sys.executable, "-c", FULL_DISK, root, tmp_path / "out"], text=True)
    assert told.startswith("cannot write dataset") and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write dataset"):
        write(FolderSource(classes(tmp_path / "in")), tmp_path / "file" / "out")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    import socket

    left = tmp_path / f".out.{socket.gethostname()}-999999999.partial"
    left.mkdir()
    other = tmp_path / ".out.otherhost-1.partial"
    other.mkdir()
    write(FolderSource(classes(tmp_path / "in")), tmp_path / "out")
    assert not left.exists() and other.exists()


def test_file_that_changes_while_sharding_is_named(tmp_path):
    root = classes(tmp_path / "in")

    def meddle(done: int, total: int, text: str) -> None:
        if done == total and text == "reading images":
            put(root / "a" / "0.png", 4321)

    with pytest.raises(InputError, match=r"a/0.png changed while"):
        write(FolderSource(root), tmp_path / "out", progress=meddle)


def test_death_of_a_process_is_one_line():
    with pytest.raises(InputError, match="a process that reads images died"), parallel.Pool(2, 1000) as pool:
        list(pool.map(os._exit, [(1,)]))


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    write(FolderSource(classes(tmp_path / "in")), tmp_path / "out", progress=lambda *args: seen.append(args))
    assert (20, 20, "reading images") in seen and seen[-1] == (20, 20, "writing shards")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"splits": {"train": 0.5, "val": 0.1, "test": 0.1}}, "add up to 1"),
        ({"splits": {"train": 0.8, "val": 0, "test": 0.2}}, "above 0"),
        ({"duplicates": "ignore"}, "expected error, drop or keep"),
        ({"near_duplicates": "keep"}, "expected group, drop or warn"),
        ({"max_rejected": 2}, "max_rejected is 2"),
        ({"shard_samples": 0}, "shard_samples is 0"),
        ({"resize": 0}, "resize is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"unlabelled": ["nowhere"]}, "nowhere does not exist"),
    ],
)
def test_wrong_options_are_named(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        write(FolderSource(classes(tmp_path / "in", 3)), tmp_path / "out", ShardOptions(**wrong))


def test_writer_returns_what_open_reads(tmp_path):
    index = write(FolderSource(classes(tmp_path / "in")), tmp_path / "out")
    assert index.samples.equals(Index.open(tmp_path / "out").samples)


def test_import_is_light():
    heavy = {"torch", "pandas", "pydantic", "webdataset", "sklearn"}
    code = f"import shards, sys; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
