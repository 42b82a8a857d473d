"""What ``index.json``, ``samples.csv`` and ``KEY.boxes.json`` must say before anything is read by them.

A dataset may come from anywhere: a name in it must not lead out of its folder or into a command line, and a
number in it must not ask for more memory than its tars have bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shards.boxes import FARTHEST, MOST_OBJECTS
from shards.boxes import MOST_BYTES as MOST_BOX_BYTES
from shards.errors import InputError
from shards.files import MOST_BYTES
from shards.masks import IGNORE
from shards.sources import ANNOTATIONS, Task, check_classes
from shards.tars import BLOCK

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["train", "val", "test"]
Table = Literal["samples.csv", "rejected.csv", "duplicates.csv", "data_report.json"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Corner = Annotated[float, Field(ge=0, le=FARTHEST)]
ClassNumber = Annotated[int, Field(ge=0, lt=2**31)]
Area = Annotated[float, Field(ge=0, le=FARTHEST**2)]
Box = Annotated[list[Corner], Field(min_length=4, max_length=4)]
FORMATS = ("jpg", "png", "webp")


class _Described(BaseModel):
    model_config = ConfigDict(strict=True)  # further keys may stand there


class _Shard(_Described):
    name: str = Field(pattern=r"^(train|val|test)-[0-9]{6,12}\.tar$")
    split: Split
    samples: Number = Field(ge=1)
    bytes: Number
    sha256: Sha256

    @model_validator(mode="after")
    def _named_for_its_split(self) -> _Shard:
        if not self.name.startswith(f"{self.split}-"):
            raise ValueError(f"{self.name} is not a shard of the {self.split} split")
        return self


class _Counts(_Described):
    samples: Number
    unlabelled: Number
    classes: dict[str, Number]


class _Meta(_Described):
    task: Task
    classes: list[str] = Field(min_length=1)
    samples: Number
    counts: dict[Split, _Counts]
    intensity: dict[Literal["values", "unit"], Annotated[list[float], Field(min_length=2, max_length=2)]]
    shards: list[_Shard] = Field(min_length=1)
    files: dict[Table, Sha256]

    @model_validator(mode="after")
    def _each_once(self) -> _Meta:
        check_classes(self.classes)
        if self.task == "segmentation" and len(self.classes) > IGNORE:
            raise ValueError(f"{len(self.classes)} classes, but a mask can hold only {IGNORE}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) < len(names):
            raise ValueError("a shard is named twice")
        return self


class BoxesContent(BaseModel):
    """``KEY.boxes.json``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)  # further keys may stand there

    # One entry an object in each; of many errors, the first says enough.
    boxes: list[Box] = Field(max_length=MOST_OBJECTS, fail_fast=True)
    labels: list[ClassNumber] = Field(max_length=MOST_OBJECTS, fail_fast=True)
    crowd: list[bool] = Field(max_length=MOST_OBJECTS, fail_fast=True)
    area: list[Area] = Field(max_length=MOST_OBJECTS, fail_fast=True)
    segments: list[Any] | None = Field(None, max_length=MOST_OBJECTS)

    @model_validator(mode="after")
    def _of_one_length(self) -> BoxesContent:
        segments = self.boxes if self.segments is None else self.segments
        lengths = {len(self.boxes), len(self.labels), len(self.crowd), len(self.area), len(segments)}
        if len(lengths) > 1:
            raise ValueError("boxes, labels, crowd, area and segments are not of one length")
        return self


def check_boxes(content: Any) -> BoxesContent:
    """The content of a ``KEY.boxes.json``, checked. Raises InputError with the key."""
    try:
        return BoxesContent.model_validate(content)
    except ValidationError as error:
        raise InputError(_first(error, "boxes")) from None


def check_meta(meta: Any, where: str) -> None:
    """Refuse an ``index.json`` that lacks something or holds what no dataset has.

    Args:
        meta: its content.
        where: what errors call it.

    Raises:
        InputError: with the key.
    """
    try:
        _Meta.model_validate(meta)
    except ValidationError as error:
        raise InputError(f"{where}: {_first(error, 'index')}") from None


def _first(error: ValidationError, whole: str) -> str:
    """The first of a model's errors with its key; ``whole`` where it is of no key."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or whole
    return f"{key}: {first['msg'].removeprefix('Value error, ')}"


def check_samples(samples: pd.DataFrame, meta: Mapping[str, Any], where: str) -> None:
    """Refuse a table of samples that does not fit its index.

    Args:
        samples: the columns of ``samples.csv`` with their types.
        meta: the content of ``index.json``, checked.
        where: what errors call the table.

    Raises:
        InputError: with the line.
    """
    shards = {shard["name"]: shard for shard in meta["shards"]}
    counts = samples["shard"].value_counts().to_dict()
    if len(samples) != sum(shard["samples"] for shard in meta["shards"]):
        raise InputError(f"{where} has {len(samples)} rows, but index.json counts another number")

    def expect(column: str, sound: pd.Series, expected: str) -> None:
        if not sound.all():
            row = int((~sound).to_numpy().argmax())
            found = str(samples[column].iloc[row])[:100]
            raise InputError(f"{where}: sample {row}: {column} is {found!r}, expected {expected}")

    expect("key", samples["key"].str.fullmatch(r"[A-Za-z0-9_-]{1,100}"), "letters, digits, '-' and '_'")
    expect("key", ~samples["key"].duplicated(), "each key once")
    expect("shard", samples["shard"].isin(list(shards)), "a shard of index.json")
    for name, shard in shards.items():
        if counts.get(name, 0) != shard["samples"]:
            raise InputError(f"{where} has {counts.get(name, 0)} samples of {name}, not {shard['samples']}")
    split = samples["shard"].map({name: shard["split"] for name, shard in shards.items()})
    expect("split", samples["split"] == split, "that of its shard")
    expect("format", samples["format"].isin(FORMATS), f"one of {', '.join(FORMATS)}")
    end = samples["shard"].map({name: shard["bytes"] for name, shard in shards.items()}).astype("int64")

    def expect_place(offset: str, length: str, there: pd.Series, most: int) -> None:
        expect(offset, ~there | samples[offset].between(BLOCK, end), "a place in its shard")
        expect(length, ~there | samples[length].between(1, most), f"1 to {most} bytes")
        expect(length, ~there | (samples[length] <= end - samples[offset]), "an end within its shard")

    expect_place("offset", "length", samples["key"] != "", MOST_BYTES)
    if meta["task"] in ANNOTATIONS:
        labelled = samples["labelled"] != 0
        most = MOST_BOX_BYTES if meta["task"] == "detection" else MOST_BYTES
        expect_place("annotation_offset", "annotation_length", labelled, most)
        for column in ("annotation_offset", "annotation_length"):
            expect(column, labelled | (samples[column] == 0), "0 for a sample without annotation")
    for column in ("width", "height"):
        expect(column, samples[column] >= 1, "1 or more pixels")
