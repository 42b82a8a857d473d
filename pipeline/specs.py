"""What a task is to do: one typed specification a stage, and the resources it runs on.

The planner makes specifications from an experiment; a stage reads its own with
``PretrainSpec.model_validate(task.spec)``. :mod:`pipeline.settings` says which of the settings decide results
and so are part of a task's key; resources never are. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.data.recipes import find_recipe
from pipeline.errors import UserError
from pipeline.typed import Typed

Architecture = Literal["cnn", "vit"]
Kind = Literal["classification", "segmentation", "detection"]  # of a data set
Labels = Literal["multiclass", "multilabel", "segmentation", "detection"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]  # part of folders' names
Seed = Annotated[int, Field(ge=0, lt=2**31)]
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold, and sort: it becomes part of keys and manifests."""
    try:
        json.dumps(values, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError):
        raise ValueError("expected plain values: numbers, text, true, false, lists, mappings") from None
    return values


def _reachable(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL")
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise ValueError(f"there is no home folder {path.split('/')[0]}")
    return path


def _no_number_as_text(value: Any) -> Any:
    """YAML reads 1e-1 and 1e6 as text, which a timm model would add and multiply."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str) and NUMBER.fullmatch(part):
            number = f"{float(part):g}"
            number = number if "." in number else number.replace("e", ".0e")
            raise ValueError(f"found the text '{part}' where a number belongs: write {number}")
    return value


def _known_recipe(name: str) -> str:
    try:
        find_recipe(name)
    except UserError as error:
        raise ValueError(str(error)) from None
    return name


def _way_to_compile(value: Any) -> Any:
    if isinstance(value, bool) or value == "graphs":
        return value
    raise ValueError(f"expected true, false or graphs, found {value!r}")


Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
TimmArg = Annotated[Any, AfterValidator(_no_number_as_text)]
UserPath = Annotated[str, AfterValidator(_reachable)]
RecipeName = Annotated[str, AfterValidator(_known_recipe)]


class Strict(Typed):
    """Unknown keys are refused, and a specification never changes once made."""

    # Defaults are validated too: 25 and 25.0 must not be two keys.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,
    )


class Splits(Strict):
    """Shares of the samples (or of the groups) that a missing split is made with."""

    train: float = Field(0.7, gt=0, lt=1)
    val: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    repeats: int = Field(1, ge=1, le=100)  # so many different splits, everything done on each

    @model_validator(mode="after")
    def _sum_to_one(self) -> Splits:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError("train, val and test must add up to 1")
        return self


class Intensity(Strict):
    """What is black and what is white in images of more than 8 bits a channel, in their own units."""

    black: float
    white: float

    @model_validator(mode="after")
    def _in_order(self) -> Intensity:
        if self.black >= self.white:
            raise ValueError(f"black {self.black:g} must be below white {self.white:g}")
        return self


MaskValue = Annotated[int, Field(ge=0, le=255)]
FOR_SOURCES = {  # key of a data set → the sources that it is for
    "mask_column": ("csv",),
    "images": ("masks", "coco", "voc"),
    "masks": ("masks",),
    "mask_suffix": ("masks",),
    "mask_classes": ("masks", "csv"),
    "mask_ignore": ("masks", "csv"),
    "annotations": ("coco", "voc"),
}


class Dataset(Strict):
    """Where the images are and how they become shards."""

    # default: the experiment's name
    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$", max_length=80)
    source: Literal["digits", "digit_pages", "folder", "csv", "masks", "coco", "voc"] = "folder"
    root: UserPath | None = None  # folder with the images; not needed for digits and pages of them
    csv: str = "labels.csv"  # file below root (or an absolute path)
    path_column: str = "path"
    label_columns: list[str] = ["label"]  # several: one 0/1 column a class (multi-label)
    label_separator: str | None = None  # "a|b" in one column: multi-label
    split_column: str | None = None
    group_column: str | None = None  # patient, slide …: never in two splits
    classes: list[str] | None = None  # default: those found, sorted
    mask_column: str | None = None  # csv: paths of masks below root, for segmentation
    images: str | None = None  # masks, coco, voc: folder below root; {split} stands for a split's name
    masks: str | None = None  # masks: folder below root
    mask_suffix: str | None = None  # masks: after the image's name in the mask's: _mask, .png
    mask_classes: dict[str, MaskValue] | None = None  # default: a class for each value that occurs
    mask_ignore: list[MaskValue] | None = None  # values of no class; default: 255 beside 0, 1, 2 …
    annotations: str | None = None  # coco: JSON file, voc: folder with XML files, below root
    unlabelled: list[str] = []  # more folders of images, for pretraining only
    exclude: list[str] = []  # patterns of images that are left out, such as "*_mask.png"
    splits: Splits = Splits()
    seed: Seed = 0
    resize: int | None = Field(None, ge=8, le=8192)  # longest allowed short side, in pixels
    intensity: Intensity | None = None  # None: as the images' values tell, and DICOM files their own windows
    duplicates: Literal["error", "drop", "keep"] = "error"  # identical pixels across splits
    near_duplicates: Literal["group", "drop", "warn"] = "group"  # altered copies
    max_rejected: float = Field(0.05, ge=0, le=1)  # share of unreadable images
    shard_samples: int = Field(1000, ge=1)
    version: int = 1  # raise it to shard again after the files at root have changed

    @property
    def kind(self) -> Kind:
        """What its labels are for."""
        if self.source in ("coco", "voc"):
            return "detection"
        masks = self.source in ("masks", "digit_pages") or self.mask_column
        return "segmentation" if masks else "classification"

    @property
    def labels(self) -> Labels:
        """What an image's label is, as its shards will say."""
        if self.kind != "classification":
            return self.kind
        return "multilabel" if len(self.label_columns) > 1 or self.label_separator else "multiclass"

    @field_validator("mask_classes", mode="before")
    @classmethod
    def _names_to_values(cls, given: Any) -> Any:
        if isinstance(given, dict) and not all(isinstance(name, str) for name in given):
            raise ValueError(
                "expected each class's name and its value, such as {background: 0, nucleus: 255}"
            )
        return given

    @field_validator("mask_ignore", mode="before")
    @classmethod
    def _one_or_several(cls, ignored: Any) -> Any:
        return [ignored] if isinstance(ignored, int) else ignored

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys for some sources appear only where given, and so are no part of other tasks' keys."""
        return {
            key: value for key, value in write(self).items() if value is not None or key not in FOR_SOURCES
        }

    @model_validator(mode="after")
    def _root_where_needed(self) -> Dataset:
        if self.source not in ("digits", "digit_pages") and not self.root:
            raise ValueError("root is missing: the folder with the images")
        return self

    @model_validator(mode="after")
    def _keys_of_this_source(self) -> Dataset:
        for key, sources in FOR_SOURCES.items():
            if getattr(self, key) is not None and self.source not in sources:
                raise ValueError(f"{key} is for source {' or '.join(sources)}, not for {self.source}")
        if self.source == "csv" and not self.mask_column and (self.mask_classes or self.mask_ignore):
            raise ValueError("mask_column is missing: the CSV's column with the paths of the masks")
        if self.kind == "segmentation" and self.classes is not None:
            raise ValueError("classes is not for masks: mask_classes gives each class its value")
        return self


class Backbone(Strict):
    """A timm model by name, its arguments and where its weights come from."""

    name: str
    weights: UserPath = "random"  # random | imagenet (timm's own) | a file
    # for timm.create_model, e.g. {embed_dim: 128, depth: 4}
    args: Annotated[dict[str, TimmArg], AfterValidator(_plain)] = {}

    @field_validator("args")
    @classmethod
    def _weights_come_from_weights(cls, args: dict[str, Any]) -> dict[str, Any]:
        for name in args:
            if name in ("checkpoint_path", "cache_dir") or name.startswith("pretrained"):
                raise ValueError(f"'{name}' is not for args: `weights` says where weights come from")
        return args


class Training(Strict):
    """Everything about a pretraining but the method and the nets, fully resolved."""

    epochs: float = Field(100, gt=0)
    batch_size: int = Field(64, ge=2)  # global: over all ranks and accumulation steps
    # Parts of a step. Losses that compare images, and batch normalisation, see one: batch_size / accumulate
    # images over all ranks, not the whole batch.
    accumulate: int = Field(1, ge=1)
    image_size: int = Field(224, ge=8, le=2048)
    fit: Literal["squash", "crop", "pad"] = "squash"  # how other shapes become square
    # A recipe of pipeline.data.recipes for whole views; small crops get the one called so with _local, where
    # there is one, else their own. None: the method's own.
    augment: RecipeName | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)  # at this batch size
    lr_min: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = None  # cosine from weight_decay to this
    clip_grad: float | None = Field(None, gt=0)
    averaging: Literal["none", "ema", "swa"] = "none"  # of the exported weights
    ema_decay: float = Field(0.999, gt=0, lt=1)
    swa_start: float = Field(0.75, ge=0, lt=1)  # share of the training after which SWA begins
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    sync_bn: bool = True
    channels_last: bool = True
    compile: Annotated[bool | Literal["graphs"], BeforeValidator(_way_to_compile)] = False
    recompute: bool = False  # activations are not kept: the backward pass computes them again
    reading: Literal["indexed", "streamed"] = "indexed"
    cache: Literal["auto", "gpu", "ram", "disk", "none"] = "auto"
    workers: int = Field(0, ge=0)  # decoding threads a rank; 0: as many as torch computes with
    checkpoint_steps: int | None = Field(None, ge=1)
    checkpoint_seconds: float = Field(600, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    on_nan: Literal["stop", "skip", "rollback"] = "stop"  # where a loss is not finite
    probe_epochs: float | None = Field(5, gt=0)  # k-NN probe and health each so many epochs


class FinetuneSettings(Strict):
    """Everything about a fine-tuning task but which backbone, fraction, seed and protocol."""

    head: Literal["probe", "random"] = "probe"  # the classifier begins as the linear probe's
    epochs: int = Field(50, ge=1)
    max_steps: int | None = Field(None, ge=1)  # epochs end early after so many steps
    batch_size: int = Field(16, ge=1)
    image_size: int | None = Field(None, ge=8, le=2048)  # None: as pretrained
    fit: Literal["squash", "crop", "pad"] = "squash"
    augment: RecipeName = "light"
    optimizer: Literal["adamw", "adam", "sgd"] = "adam"
    lr: float = Field(3e-4, gt=0)
    lr_min: float = Field(1e-6, ge=0)
    weight_decay: float = Field(0, ge=0)
    patience: int | None = Field(None, ge=1)  # epochs with a worse validation score than the best
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = Field(2, ge=0)
    class_weights: Literal["balanced", "none"] = "balanced"  # balanced: rare classes weigh more
    fractions_by: Literal["image", "group"] = "image"  # a fraction draws images, or whole groups (patients)
    validation: Literal["full", "fraction"] = "fraction"  # of the validation images: as of the train images
    select_by: str = "macro_f1"  # validation metric that picks the epoch
    knn_k: int = Field(20, ge=1)
    head_width: int = Field(256, ge=8)  # channels of a segmentation or detection head
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    cache: Literal["auto", "gpu", "ram", "disk", "none"] = "auto"
    workers: int = Field(0, ge=0)
    # Fine-tuned models in the store: of the seeds of a cell the best by validation, every one, or none.
    keep: Literal["best", "all", "none"] = "best"


class ReportSettings(Strict):
    """How the tables are made."""

    baseline: str = "supervised"  # the method that gains.csv and cost.csv compare with
    metric: str = "macro_f1"
    bootstrap: int = Field(1000, ge=10)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    # The comparisons with the baseline that p-values are adjusted for: methods (None: all that train) and
    # protocols (None: the first there is), over all nets and label fractions.
    compare: list[str] | None = None
    compare_protocols: list[str] | None = None


Contents = dict[str, str]  # SHA-256 of what decides a result and lies in a file, by the file's role


class ShardSpec(Strict):
    dataset: Dataset
    contents: Contents = {}  # of the table of labels
    repeat: int = Field(1, ge=1)  # of how many splits of one data set this is which
    pooled: str = ""  # the data set's name in the tables, where it is split several times


class PretrainSpec(Strict):
    dataset: str
    label: str  # the method's name in this experiment and its tables
    method: str  # the registered method
    options: dict[str, Any]  # complete: every option of the method
    backbones: dict[Architecture, Backbone]  # both for a joint method, else one
    train: Training
    seed: int
    contents: Contents = {}  # of files with initial weights, by architecture


class SearchSpec(PretrainSpec):
    """A short pretraining that finds the value of an option given as ``search``."""


class FinetuneSpec(Strict):
    dataset: str
    label: str  # the method's name
    arch: Architecture
    backbone: Backbone
    protocol: str  # of pipeline.evaluate.protocols
    fraction: float = Field(gt=0, le=1)  # of the labelled train split
    seed: int
    settings: FinetuneSettings


class AggregateSpec(Strict):
    experiment: str
    report: ReportSettings
    seeds: list[int]


class Resources(Strict):
    """What a task runs on. It never changes a result's key."""

    nodes: int = Field(1, ge=1)
    ranks_per_node: int = Field(1, ge=1)  # one process a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_rank: int = Field(1, ge=1)  # also torch's threads on a CPU
    memory_gb: float | None = Field(None, gt=0)  # a node
    minutes: int = Field(60, ge=1)
    tasks_per_job: int = Field(1, ge=1)  # small tasks packed into one job
    profile_steps: int = Field(0, ge=0, le=1000)  # of a training that are profiled; 0: none
    silence_seconds: int = Field(120, ge=10)  # a rank not heard from for so long is lost: the task ends
