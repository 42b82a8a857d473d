"""What is tried with bad input: one function a reader, shared by the property tests and by atheris.

A target takes a folder of its own and the bytes of one file. Its reader either takes them or refuses them
with one line that names the file; whatever else it raises is a finding.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline.errors import UserError, one_line
from pipeline.experiment_file import load_experiment
from pipeline.manifest import Manifest, Receipt, damaged_files, read_error
from pipeline.plan import plan
from pipeline.progress import read_progress
from shards import (
    CocoSource,
    CsvSource,
    FolderSource,
    Index,
    InputError,
    MaskSource,
    ShardOptions,
    VocSource,
    boxes,
    codec,
    masks,
    stream,
    verify,
    write,
)
from shards.sources import Listing
from slurm import SlurmError, load_profile

EXPERIMENT = """\
name: mini
dataset: {source: folder, root: /images, splits: {train: 0.6, val: 0.2, test: 0.2}, label_columns: [a, b]}
backbones:
  cnn: {name: test_resnet, args: {depth: 2}}
  vit: {name: test_vit, weights: imagenet}
methods:
  supervised: {}
  cass_vc: {options: {variance: 20.0, pairs: cross}, train: {epochs: 3}}
  mine: {method: dino, options: {n_local: 2}}
seeds: [0, 1]
pretrain: {epochs: 1, batch_size: 8, image_size: 32, seeds: each, clip_grad: null}
finetune: {protocols: [knn, linear], fractions: [0.1, 1.0], select_by: macro_f1}
report: {baseline: supervised, metric: accuracy}
resources: {pretrain: {nodes: 2, memory_gb: 4.5}, finetune: {tasks_per_job: 4}}
"""
PROFILE = """\
partition: gpu
device: cuda
memory_gb: 64
stages: {shard: {partition: cpu, minutes: 120}, pretrain: {nodes: 2, memory_gb: 128.5}}
setup: [module purge, module load cuda/12.4]
environment: {NCCL_SOCKET_IFNAME: ib0, OMP_NUM_THREADS: 4}
array_limit: 50
container: apptainer exec --nv image.sif
extra: {reservation: course, exclusive: true}
"""
TABLE = "path,label,split,group,a,b\nx/1,cat,train,p1,1,0\nx/2.png,dog,val,p2,0,1\nx/3.png,,test,,,\n"
COCO = """\
{"images": [{"id": 1, "file_name": "1.png", "width": 24, "height": 16}, {"id": 2, "file_name": "a/2.png"}],
"categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
"annotations": [
{"id": 7, "image_id": 1, "category_id": 5, "bbox": [1, 2.5, 8, 9], "area": 60.25, "iscrowd": 0,
"segmentation": [[1, 2.5, 9, 2.5, 9, 11.5, 1, 11.5]]},
{"id": 8, "image_id": 1, "category_id": 3, "bbox": [-3, 0, 9, 9], "iscrowd": 1,
"segmentation": {"size": [16, 24], "counts": [20, 4, 360]}},
{"id": 9, "image_id": 2, "category_id": 3, "segmentation": [[0, 0, 5, 0, 5, 5]]}]}
"""
VOC = """\
<annotation><size><width>24</width><height>16</height></size><object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>9</xmax><ymax>12</ymax></bndbox></object></annotation>
"""
BOXES = """\
{"area": [60.25, 9], "boxes": [[1, 2.5, 9, 11.5], [0, 0, 3, 3]], "crowd": [false, true], "labels": [1, 0],
"segments": [[[1, 2.5, 9, 2.5, 9, 11.5, 1, 11.5]], {"size": [16, 24], "counts": "d04X;"}]}
"""
SETTING = "methods.cass_vc.options={variance: 3}"
SOURCES: tuple[dict[str, object], ...] = (
    {},
    {"label_separator": "|", "group_column": "group"},
    {"label_columns": ("a", "b"), "split_column": "split"},
    {"split_column": "split", "classes": ("cat", "dog")},
)


@dataclass(frozen=True)
class Target:
    """One reader: what it is tried with, and a sound input to begin from."""

    run: Callable[[Path, bytes], None]
    sound: Callable[[], bytes]


@contextlib.contextmanager
def refusal(*names: str) -> Iterator[None]:
    """Lets pass what the user can mend, if it is said in one line with one of these names."""
    try:
        yield
    except (UserError, InputError, SlurmError) as error:
        said = one_line(error)
        assert said.strip() and "\n" not in said, repr(said)
        assert any(name in said for name in names), f"{said!r} names none of {names}"
        if isinstance(error, InputError):  # `python -m shards` prints it as it is
            assert str(error) == said and said.isprintable() and len(said) <= 2000, repr(said)


def experiment(folder: Path, data: bytes) -> None:
    """An experiment file that is taken can be planned, written down and read again."""
    path = folder / "experiment.yaml"
    path.write_bytes(data)
    with refusal(str(path), "two tasks would be called"):
        _planned(path, [])


def setting(folder: Path, data: bytes) -> None:
    """The same for one ``--set``."""
    path = folder / "experiment.yaml"
    path.write_text(EXPERIMENT)
    with refusal(str(path), "--set", "two tasks would be called"):
        _planned(path, [os.fsdecode(data)])  # as arguments come


def _planned(path: Path, settings: list[str]) -> None:
    experiment = load_experiment(str(path), settings)
    tasks = plan(experiment)
    resolved = json.loads(json.dumps(experiment.resolved(), allow_nan=False))
    again = path.with_name("resolved.yaml")
    again.write_text(yaml.safe_dump(resolved, sort_keys=False))
    assert [task.key for task in plan(load_experiment(str(again)))] == [task.key for task in tasks]
    for task in tasks:
        folder = os.path.normpath(f"store/{task.folder}")
        assert folder.startswith(f"store/{task.stage}/") and folder.count("/") == 2, task.folder


def profile(folder: Path, data: bytes) -> None:
    path = folder / "profile.yaml"
    path.write_bytes(data)
    with refusal(str(path)):
        load_profile(path).model_dump_json()


def table(folder: Path, data: bytes) -> None:
    """A CSV of labels, under every kind of options."""
    (folder / "labels.csv").write_bytes(data)
    for options in SOURCES:
        with refusal("labels.csv", "class"):
            listing = CsvSource(folder, **options).listing()  # type: ignore[arg-type]
            assert listing.samples and listing.classes


def coco(folder: Path, data: bytes) -> None:
    """A COCO file that is taken can be stored and read back, in another size too."""
    (folder / "images").mkdir(exist_ok=True)
    (folder / "annotations.json").write_bytes(data)
    with refusal("annotations.json", "class", "no annotation"):
        _stored(CocoSource(folder).listing())


def voc(folder: Path, data: bytes) -> None:
    """The same for an XML file."""
    for name, content in (("images/1.png", _image()), ("annotations/1.xml", data)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with refusal("1.xml", "class", "no annotation"):
        _stored(VocSource(folder, "images", "annotations").listing())


def _stored(listing: Listing) -> None:
    numbers = {name: number for number, name in enumerate(listing.classes)}
    for sample in listing.samples:
        assert isinstance(sample.annotation, boxes.Instances) and not sample.path.startswith(("/", ".."))
        placed = boxes.place(sample.annotation, (24, 16), (12, 8))
        data = boxes.to_json(placed.found, numbers, outlined=True)
        read = boxes.from_json(data, size=(12, 8), classes=len(numbers))
        assert len(read) + placed.dropped == len(sample.annotation.found)
        drawn = read.masks(8, 12)
        assert drawn is None or drawn.shape == (len(read), 8, 12)


def stored_boxes(folder: Path, data: bytes) -> None:
    """What ``KEY.boxes.json`` holds is taken only if it fits the image, and can be drawn or says why not."""
    del folder
    with refusal(""):
        read = boxes.from_json(data, size=(24, 16), classes=2)
        assert read.boxes.shape == (len(read), 4) and np.isfinite(read.boxes).all()
        read.masks(16, 24)


def mask(folder: Path, data: bytes) -> None:
    """A mask is stored as class numbers and read back, or has a reason why not."""
    path = folder / "1.png"
    path.write_bytes(data)
    with refusal("1.png", "masks hold"), contextlib.suppress(codec.Unreadable):
        values = masks.MaskFile("1.png", path).values()
        decided = masks.settle(masks.MaskValues(), dict.fromkeys(np.unique(values).tolist(), "1.png"))
        size, number = (values.shape[1], values.shape[0]), len(decided.classes)
        read = masks.from_png(masks.to_png(values, decided.table), size=size, classes=number)
        assert ((read == masks.IGNORE) | (read < number)).all()
    with refusal(""):
        masks.from_png(data, size=(16, 12), classes=3)


def index(folder: Path, data: bytes) -> None:
    _dataset(folder, {"index.json": data})


def samples(folder: Path, data: bytes) -> None:
    _dataset(folder, {"samples.csv": data})


def masked_samples(folder: Path, data: bytes) -> None:
    """The table of a segmentation set, which has two more columns."""
    _dataset(folder, {"samples.csv": data}, masked=True)


def tar(folder: Path, data: bytes) -> None:
    """A shard; the index, whose maker is the tar's, has its size and hash."""
    meta = json.loads(dataset_files()["index.json"])
    shard = meta["shards"][0]
    shard["bytes"], shard["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    _dataset(folder, {"index.json": json.dumps(meta).encode(), shard["name"]: data})


def _dataset(folder: Path, changed: dict[str, bytes], *, masked: bool = False) -> None:
    """Read everything of a dataset with some files changed: by row, as a stream, and to verify it."""
    place = folder / "dataset"
    place.mkdir(exist_ok=True)
    for name, content in {**dataset_files(masked=masked), **changed}.items():
        (place / name).write_bytes(content)
    with refusal(str(place)):
        opened = Index.open(place)
        for split in ("train", "val", "test"):
            opened.targets(opened.rows(split))
        for row in range(len(opened)):
            with refusal(str(place)):
                assert opened.decode(row).mode == "RGB"
            with refusal(str(place)):
                assert not masked or opened.mask(row).ndim == 2
    for split in ("train", "val", "test"):
        with refusal(str(place)):
            for row, data in stream(place, split, rank=0, world_size=1, epoch=0, seed=0):
                assert row >= 0 and data
    for problem in verify(place):
        assert problem.isprintable() and len(problem) <= 2000, repr(problem)


@functools.cache
def dataset_files(*, masked: bool = False) -> dict[str, bytes]:
    """The files of a small sound dataset, by name; made once."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        for number in range(12):
            path = root / "in" / "ab"[number % 2] / f"{number}.png"
            mask = root / "masks" / path.relative_to(root / "in")
            for file, picture in (
                (path, Image.new("RGB", (5, 4), (20 * number, 0, 9))),
                (mask, Image.new("L", (5, 4), number % 4 // 2)),
            ):
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
        source = MaskSource(root, "in") if masked else FolderSource(root / "in")
        write(source, root / "out", ShardOptions(shard_samples=20))
        return {path.name: path.read_bytes() for path in (root / "out").iterdir()}


def image(folder: Path, data: bytes) -> None:
    """An image is decoded and stored, or has a reason why not."""
    del folder
    for resize in (None, 8):
        try:
            seen = codec.inspect(data, rules=codec.Rules(resize=resize))
            stored = data if seen.original else codec.encode(data, rules=codec.Rules(resize=resize))
            assert codec.decode(stored).size == (seen.width, seen.height)
        except codec.Unreadable as error:
            assert str(error) and "\n" not in str(error)


def manifest(folder: Path, data: bytes) -> None:
    """A manifest that is taken has tasks whose folders are in the store, and can be written again."""
    path = folder / "manifest.json"
    path.write_bytes(data)
    with refusal(str(path)):
        read = Manifest.read(path)
        for task in read.tasks:
            assert os.path.normpath(f"store/{task.folder}").startswith(f"store/{task.stage}/")
            assert all(read.task(need) for need in task.needs)
        read.write(folder / "again.json")
        assert Manifest.read(folder / "again.json") == read


def receipt(folder: Path, data: bytes) -> None:
    """A receipt is taken only whole: all that is done with it works, within its folder."""
    (folder / "receipt.json").write_bytes(data)
    with refusal(str(folder)):
        read = Receipt.read(folder, RECEIPT.key)
        if read is not None:
            assert all(problem.startswith(f"{folder}/") for problem in damaged_files(folder, read))
            assert isinstance(read.metrics, dict) and isinstance(read.seconds, float)


def leftovers(folder: Path, data: bytes) -> None:
    """What a task says of its progress or its failure is there or not, never half there."""
    (folder / "progress.json").write_bytes(data)
    (folder / "error.json").write_bytes(data)
    said = read_progress(folder)
    assert said is None or (all(math.isfinite(number) for number in said[:2]) and isinstance(said[2], str))
    assert isinstance(read_error(folder), dict | None)


RECEIPT = Receipt(
    key="0" * 64,
    task="shard/x",
    stage="shard",
    metrics={"unfinished": ["finetune/y"], "test": {"accuracy": 0.5}},
    files={"cnn/model.safetensors": {"sha256": "0" * 64, "bytes": 3}},
    started="2025-01-01T00:00:00+00:00",
    ended="2025-01-01T00:00:01+00:00",
    seconds=1.0,
    hosts=["here"],
    world_size=1,
    versions={"python": "3.11"},
)


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "experiment.yaml"
        path.write_text(EXPERIMENT)
        read = load_experiment(str(path), ["seeds=[0]", "methods=[supervised]", "finetune.protocols=[knn]"])
        Manifest(read.resolved(), "/store", plan(read), jobs={"shard/mini": "1_2"}).write(path)
        return path.read_bytes()


def _receipt() -> bytes:
    return json.dumps(asdict(RECEIPT)).encode()  # without its sum, which would refuse whatever is changed


def _image() -> bytes:
    out = io.BytesIO()
    pixels = np.arange(16 * 12 * 3, dtype=np.uint8).reshape(12, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(out, "JPEG", exif=exif)
    return out.getvalue()


def _mask() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.resize(np.uint8([0, 1, 2, 255]), (12, 16))).save(out, "PNG")
    return out.getvalue()


def _tar() -> bytes:
    files = dataset_files()
    return files[json.loads(files["index.json"])["shards"][0]["name"]]


TARGETS = {
    "experiment": Target(experiment, EXPERIMENT.encode),
    "setting": Target(setting, SETTING.encode),
    "profile": Target(profile, PROFILE.encode),
    "table": Target(table, TABLE.encode),
    "index": Target(index, lambda: dataset_files()["index.json"]),
    "samples": Target(samples, lambda: dataset_files()["samples.csv"]),
    "tar": Target(tar, _tar),
    "image": Target(image, _image),
    "coco": Target(coco, COCO.encode),
    "voc": Target(voc, VOC.encode),
    "stored_boxes": Target(stored_boxes, BOXES.encode),
    "mask": Target(mask, _mask),
    "masked_samples": Target(masked_samples, lambda: dataset_files(masked=True)["samples.csv"]),
    "manifest": Target(manifest, _manifest),
    "receipt": Target(receipt, _receipt),
    "leftovers": Target(leftovers, lambda: b'{"done": 1, "total": 2.5, "text": "step", "message": "m"}'),
}
