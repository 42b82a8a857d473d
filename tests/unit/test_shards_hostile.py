"""Images, tars and indexes made to do harm: read as documented, or refused in one line, in bounded memory."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset.filters  # noqa: F401  (brings torch, which needs more memory than a test here has)
from PIL import Image

from shards import CsvSource, FolderSource, Index, InputError, ShardOptions, codec, stream, verify, write
from shards.__main__ import main
from shards.sources import Sample

MAKER = Path(__file__).parents[1] / "data" / "make_corpus.py"
corpus = SimpleNamespace(**runpy.run_path(str(MAKER)))
MEMORY = 1 << 30  # bytes that a test may use beyond what the process has
SECONDS = 60

REJECTED = {
    "text_called.png": "known format",
    "empty.png": "empty",
    "cut.jpg": "truncated",
    "cut.png": "truncated|broken",
    "cut.tif": "truncated|cut|enough data|buffer",
    "cut.webp": ".",
    "bomb.png": "decompression bomb",
    "bomb.tif": "decompression bomb",
    "bomb.bmp": "decompression bomb",
    "claims.png": "truncated|broken|enough data",
    "claims.tif": ".",
    "text_bomb.png": "too large",
    "pipe.png": "not a regular file",
    "endless.png": "not a regular file",
    "nowhere.png": "no such file",
    "holes.png": "larger than",
}
STORED = {  # name: (format, width, height, own bytes)
    "cmyk.jpg": ("jpg", 24, 16, False),
    "one.png": ("png", 1, 1, True),
    "wide.png": ("png", 20000, 1, True),
    "tall.jpg": ("jpg", 1, 20000, True),
    "moving.webp": ("jpg", 24, 16, False),
    "moving.png": ("png", 24, 16, False),
    "gif_called.png": ("png", 24, 16, False),
    "turned.jpg": ("jpg", 16, 24, False),
    "grey16.png": ("png", 24, 16, False),
    "grey16.tif": ("png", 24, 16, False),
    "palette.png": ("png", 24, 16, True),
    "metadata.png": ("png", 24, 16, True),
    "png_called.jpg": ("png", 24, 16, True),
}


@pytest.fixture(autouse=True)
def bounds():
    """Every test here runs in little memory, and ends."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A class folder of everything odd, and one of 60 sound images."""
    root = tmp_path_factory.mktemp("odd")
    (root / "odd").mkdir()
    (root / "sound").mkdir()
    for name, content in corpus.images().items():
        (root / "odd" / name).write_bytes(content)
    corpus.special_files(root / "odd")
    for number in range(60):
        Image.new("RGB", (4, 4), (4 * number, 0, 0)).save(root / "sound" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def written(odd, tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("written") / "dataset"
    return write(FolderSource(odd), folder, ShardOptions(max_rejected=1, duplicates="keep"))


def test_odd_images_are_rejected_with_their_reasons(written):
    with open(written.folder / "rejected.csv", newline="") as file:
        reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == set(REJECTED)
    for name, expected in REJECTED.items():
        assert re.search(f"(?i){expected}", reasons[name]), (name, reasons[name])
        assert reasons[name].isprintable()
    assert written.report["ignored_files"] == {}


@pytest.mark.parametrize("name", STORED)
def test_odd_image_is_stored_as_documented(written, odd, name):
    (row,) = np.flatnonzero(written.samples["path"] == f"odd/{name}")
    found = written.samples.iloc[row]
    own = written.read(row) == (odd / "odd" / name).read_bytes()
    assert (found["format"], found["width"], found["height"], own) == STORED[name]
    image = written.decode(row)
    assert image.mode == "RGB" and image.size == STORED[name][1:3]


@pytest.mark.parametrize(
    ("name", "turns", "near"),
    [
        ("cmyk.jpg", 0, 12),
        ("moving.png", 0, 0),
        ("moving.webp", 0, 24),
        ("turned.jpg", 3, 24),
        ("metadata.png", 0, 0),
    ],
)
def test_odd_image_shows_the_first_frame_upright(written, name, turns, near):
    (row,) = np.flatnonzero(written.samples["path"] == f"odd/{name}")
    expected = np.rot90(np.asarray(corpus.gradient()), turns).astype(int)
    assert np.abs(np.asarray(written.decode(row)).astype(int) - expected).max() <= near


def test_dataset_of_odd_images_is_sound_and_streams(written):
    assert verify(written.folder) == []
    rows = [row for row, _ in stream(written.folder, "train", rank=0, world_size=1, epoch=0, seed=0)]
    assert sorted(rows) == written.rows("train").tolist()


def test_stored_image_that_is_a_bomb_is_refused_by_the_reader(written):
    for name in ("bomb.png", "claims.png", "cut.jpg", "empty.png"):
        with pytest.raises(InputError, match="cannot be decoded") as refused:
            written.decode_bytes(corpus.images()[name])
        assert str(refused.value).isprintable()


def test_dicom_that_claims_a_huge_image_is_unreadable():
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import RLELossless

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = RLELossless
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.Rows = dataset.Columns = 65535
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 16, 16, 15
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = 0, "MONOCHROME2"
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(100)])
    dataset["PixelData"].VR = "OB"
    out = corpus.io.BytesIO()
    pydicom.dcmwrite(out, dataset, enforce_file_format=True)
    with pytest.raises(codec.Unreadable, match="decompression bomb"):
        codec.load(out.getvalue())


def test_corpus_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        subprocess.run([sys.executable, MAKER, tmp_path / name], check=True)
    for path in sorted((tmp_path / "one").rglob("*.*")):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        if path.is_file() and path.name != "holes.png":
            assert path.read_bytes() == other.read_bytes(), path.name


@pytest.fixture
def dataset(written, tmp_path) -> Path:
    """A copy to do harm to, deep enough that `../../` would show."""
    return Path(shutil.copytree(written.folder, tmp_path / "a" / "b" / "dataset"))


def replaced(dataset: Path, content: bytes) -> Path:
    """The dataset with another first shard; the index, from the same hand, tells its size and hash."""
    meta = json.loads((dataset / "index.json").read_text())
    shard = meta["shards"][0]
    (dataset / shard["name"]).write_bytes(content)
    shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    (dataset / "index.json").write_text(json.dumps(meta))
    return dataset / shard["name"]


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def read_all(dataset: Path) -> None:
    """By row: each image is decoded or refused in one line."""
    try:
        index = Index.open(dataset)
    except InputError as error:
        assert str(error).isprintable()
        return
    for row in range(len(index)):
        try:
            index.decode(row)
        except InputError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("kind", corpus.HOSTILE_TARS)
def test_hostile_tar_is_refused_and_nothing_is_written(dataset, tmp_path, kind):
    members = corpus.members_of((dataset / "train-000000.tar").read_bytes())
    tar = replaced(dataset, corpus.HOSTILE_TARS[kind](members))
    before = everything(tmp_path)
    read_all(dataset)
    with pytest.raises(InputError, match=r"train-000000\.tar|samples\.csv") as refused:
        list(stream(dataset, "train", rank=0, world_size=1, epoch=0, seed=0))
    assert str(refused.value).isprintable()
    problems = verify(dataset)
    assert problems and all(problem.isprintable() for problem in problems)
    assert any(tar.name in problem or "samples.csv" in problem for problem in problems)
    assert everything(tmp_path) == before and not Path("/tmp/escaped.png").exists()


@pytest.mark.parametrize("kind", corpus.HOSTILE_ENDS)
def test_what_follows_the_last_sample_is_found_by_verify(dataset, tmp_path, kind):
    members = corpus.members_of((dataset / "train-000000.tar").read_bytes())
    replaced(dataset, corpus.HOSTILE_ENDS[kind](members))
    before = everything(tmp_path)
    problems = verify(dataset)
    assert problems
    assert all(problem.startswith("train-000000.tar ") and problem.isprintable() for problem in problems)
    assert everything(tmp_path) == before


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "name",
    [
        "../train-000000.tar",
        "/etc/passwd",
        "train-000000.tar'; touch escaped; '.tar",
        "train-000000.tar\n",
        "",
    ],
)
def test_shard_whose_name_leads_elsewhere_is_refused(dataset, tmp_path, name):
    """A stream over HTTP would hand the name to a shell."""
    shutil.copy(dataset / "train-000000.tar", dataset.parent)
    changed(dataset / "index.json", '"train-000000.tar"', json.dumps(name))
    before = everything(tmp_path)
    for read in (
        Index.open,
        lambda folder: list(stream(folder, "train", rank=0, world_size=1, epoch=0, seed=0)),
    ):
        with pytest.raises(InputError, match=r"index\.json: shards\.0\.name"):
            read(dataset)
    (problem,) = verify(dataset)
    assert "shards.0.name" in problem
    assert everything(tmp_path) == before


def test_address_that_would_run_a_command_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is no URL"):
        next(stream("http://localhost:1/'; touch escaped; '", "train", rank=0, world_size=1, epoch=0, seed=0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("shard", "../../etc/passwd", "shard is '../../etc/passwd'"),
        ("offset", "-512", "offset is '-512'"),
        ("offset", "0", "offset is '0'"),
        ("offset", str(2**62), "offset is"),
        ("offset", str(2**80), "cannot be read"),
        ("length", str(2**62), "length is"),
        ("length", "0", "length is '0'"),
        ("key", "../escaped", "key is '../escaped'"),
        ("format", "tar", "format is 'tar'"),
        ("split", "test", "split is 'test'"),
        ("labels", "nothing", "label 'nothing'"),
        ("width", "0", "width is '0'"),
    ],
)
def test_table_that_points_out_of_its_shards_is_refused(dataset, column, value, message):
    with open(dataset / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0][column] = value
    with open(dataset / "samples.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    with pytest.raises(InputError) as refused:
        Index.open(dataset)
    assert message in str(refused.value) and "samples.csv" in str(refused.value)


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '{"format_version": 1}', '{"format_version": 1, "task": []}']
)
def test_index_that_is_no_index_is_refused(dataset, text):
    (dataset / "index.json").write_text(text)
    with pytest.raises(InputError, match="dataset"):
        Index.open(dataset)


@pytest.mark.parametrize("name", ["index.json", "samples.csv", "data_report.json", "train-000000.tar"])
def test_pipe_in_the_place_of_a_file_does_not_block(dataset, name):
    (dataset / name).unlink()
    os.mkfifo(dataset / name)
    with pytest.raises(InputError, match=name):
        _ = Index.open(dataset).warnings
    if name != "data_report.json":
        with pytest.raises(InputError, match=name):
            list(stream(dataset, "train", rank=0, world_size=1, epoch=0, seed=0))
    assert any(name in problem for problem in verify(dataset))


def test_file_of_a_tebibyte_is_not_read(dataset):
    with open(dataset / "index.json", "wb") as file:
        file.truncate(corpus.TIB)
    with pytest.raises(InputError, match="larger than"):
        Index.open(dataset)
    with pytest.raises(OSError, match="not a regular file"):
        Sample("x.png", Path("/dev/zero")).read()


def test_error_that_quotes_the_input_stays_one_line(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text('path,label\n1.png,"a\nb\x1b[31m\r|"\n')
    assert main(["write", "csv", str(tmp_path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == "error: class name 'a b\\x1b[31m |' is empty or holds '|'\n"
    with pytest.raises(InputError) as refused:
        CsvSource(tmp_path, label_columns=["x" * 100_000]).listing()
    assert len(str(refused.value)) <= 2000
