"""The experiment file: read, check, resolve. Every error names the key and, where there is one, the line.

Imports no torch, so that ``plan``, ``show`` and ``--help`` answer at once on a login node.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources as package_files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pipeline.errors import UserError, nearest
from pipeline.evaluate.protocols import ALL_METRICS, PROTOCOL_NAMES, PROTOCOLS
from pipeline.methods.registry import METHODS, resolve_options, resolve_recipe
from pipeline.specs import (
    Architecture,
    Backbone,
    Dataset,
    FinetuneSettings,
    Name,
    Plain,
    ReportSettings,
    Resources,
    Seed,
    Strict,
    Training,
    UserPath,
)
from pipeline.strict_yaml import read_yaml

Json = dict[str, Any]


def _distinct(values: list) -> list:
    repeated = dict.fromkeys(str(value) for value in values if values.count(value) > 1)
    if repeated:
        raise ValueError(f"{', '.join(repeated)} stands there twice")
    return values


class MethodEntry(Strict):
    """One method of the experiment; its label in the tables is its key under ``methods``."""

    method: str = ""  # the registered method; default: the label
    options: Plain = {}  # the method's own options
    train: Plain = {}  # overrides of ``pretrain`` for this method
    backbones: dict[Architecture, Backbone] = {}  # its own, in place of the experiment's
    weights: UserPath | None = None  # initial weights of its backbones, instead of the backbones' own
    seeds: Literal["first", "each"] | None = None  # its pretrainings, where not as ``pretrain.seeds`` says


class PretrainSection(Training):
    """Training settings of every method; what is left out here comes from the method's own recipe."""

    seeds: Literal["first", "each"] = "first"  # one pretraining feeds every seed, or one a seed


class FinetuneSection(FinetuneSettings):
    protocols: list[str] = Field(
        ["finetune", "linear", "knn", "seg_linear", "seg_fpn", "detect"], min_length=1
    )  # a data set gets those of its kind
    fractions: list[float] = Field([0.01, 0.1, 1.0], min_length=1)

    @field_validator("protocols")
    @classmethod
    def _known(cls, protocols: list[str]) -> list[str]:
        for name in protocols:
            if name not in PROTOCOL_NAMES:
                raise ValueError(
                    f"unknown protocol {name!r}, expected one of {', '.join(PROTOCOL_NAMES)}"
                    + nearest(name, PROTOCOL_NAMES)
                )
        return _distinct(protocols)

    @field_validator("fractions")
    @classmethod
    def _shares(cls, fractions: list[float]) -> list[float]:
        for fraction in fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"{fraction} is not a label fraction; expected more than 0 and at most 1")
        _distinct([f"{100 * fraction:g} %" for fraction in fractions])  # as tasks are named
        return sorted(fractions)


class StageResources(Strict):
    shard: Resources = Resources(cpus_per_rank=2, minutes=120)
    search: Resources = Resources(minutes=1440)
    pretrain: Resources = Resources(minutes=1440)
    finetune: Resources = Resources(minutes=240, tasks_per_job=16)
    aggregate: Resources = Resources(minutes=30)

    @field_validator("*", mode="before")
    @classmethod
    def _over_the_stages_defaults(cls, given: Any, info: ValidationInfo) -> Any:
        """What is left out keeps this stage's default, not that of any task."""
        if not isinstance(given, dict) or info.field_name is None:
            return given
        return cls.model_fields[info.field_name].default.model_dump() | given

    @model_validator(mode="after")
    def _only_finetune_is_packed_or_single(self) -> StageResources:
        for stage in ("shard", "search", "pretrain", "aggregate"):
            if getattr(self, stage).tasks_per_job != 1:
                # A job fails as a whole, and with it would go the children of its healthy tasks.
                raise ValueError(f"{stage}.tasks_per_job must be 1: only finetune tasks share a job")
        for stage in ("shard", "finetune", "aggregate"):
            resources = getattr(self, stage)
            if resources.nodes * resources.ranks_per_node != 1:
                raise ValueError(f"{stage} runs as one process: nodes and ranks_per_node must be 1")
        return self


class Experiment(Strict):
    """A whole experiment: data sets × methods × backbones × protocols × label fractions × seeds."""

    name: Name
    dataset: Dataset | None = None
    datasets: dict[Name, Dataset] = {}  # instead of ``dataset``, where there are several
    backbones: dict[Architecture, Backbone] = Field(min_length=1)
    methods: dict[Name, MethodEntry] = Field(min_length=1)
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    pretrain: PretrainSection = PretrainSection()
    finetune: FinetuneSection = FinetuneSection()
    report: ReportSettings = ReportSettings()
    resources: StageResources = StageResources()

    @field_validator("methods", mode="before")
    @classmethod
    def _names_or_mapping(cls, methods: Any) -> Any:
        if isinstance(methods, list):
            return {str(name): {} for name in _distinct(methods)}
        if isinstance(methods, dict):
            return {str(name): {} if entry is None else entry for name, entry in methods.items()}
        return methods

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: list[int]) -> list[int]:
        return _distinct(seeds)

    @model_validator(mode="after")
    def _datasets_given_once(self) -> Experiment:
        if (self.dataset is None) == (not self.datasets):
            raise ValueError("give either dataset (one) or datasets (several, by name)")
        return self

    @model_validator(mode="after")
    def _baseline_among_methods(self) -> Experiment:
        """Where none is named and there is no ``supervised``, the first method is the baseline."""
        if "baseline" in self.report.model_fields_set or self.report.baseline in self.methods:
            return self
        report = self.report.model_copy(update={"baseline": next(iter(self.methods))})
        object.__setattr__(self, "report", report)
        return self

    @cached_property
    def all_datasets(self) -> list[Dataset]:
        """Every data set, named."""
        if self.dataset is not None:
            return [self.dataset.model_copy(update={"name": self.dataset.name or self.name})]
        return [data.model_copy(update={"name": name}) for name, data in self.datasets.items()]

    def protocols_of(self, dataset: Dataset) -> list[str]:
        """The protocols that a data set's labels are for."""
        return [name for name in self.finetune.protocols if PROTOCOLS[name].kind == dataset.kind]

    def method_of(self, label: str) -> str:
        return self.methods[label].method or label

    def options_of(self, label: str) -> Json:
        """Every option of a method, complete and checked."""
        return resolve_options(self.method_of(label), self.methods[label].options)

    def pretraining_seeds_of(self, label: str) -> list[int]:
        """A seed for each of a method's pretrainings; one that is alone feeds every seed of fine-tuning."""
        chosen = self.methods[label].seeds or self.pretrain.seeds
        return self.seeds[:1] if chosen == "first" else self.seeds

    def training_of(self, label: str) -> Training:
        """A method's training settings: defaults < its recipe < ``pretrain`` < ``methods.LABEL.train``."""
        given = self.pretrain.model_dump(include=set(self.pretrain.model_fields_set) - {"seeds"})
        given |= self.methods[label].train
        batch_size = given.get("batch_size", Training.model_fields["batch_size"].default)
        return Training.model_validate(resolve_recipe(self.method_of(label), batch_size=batch_size) | given)

    def backbones_of(self, label: str) -> dict[Architecture, Backbone]:
        """The backbones that a method trains, with the weights they start from.

        Those of its own entry, else those that the method brings along, else the experiment's; of the
        architectures that it can train, with the timm arguments that it wants.
        """
        entry, info = self.methods[label], METHODS[self.method_of(label)]
        weights = {} if entry.weights is None else {"weights": entry.weights}
        return {
            arch: info.with_args(arch, backbone.model_copy(update=weights))
            for arch, backbone in (self.backbones | info.backbones | entry.backbones).items()
            if arch in info.archs
        }

    def resolved(self) -> Json:
        """The experiment with every default written out, as JSON values; reading it gives the same plan."""
        whole = self.model_dump(mode="json", exclude={"methods", "pretrain"})
        whole["pretrain"] = self.pretrain.model_dump(mode="json", include=self.pretrain.model_fields_set)
        whole["methods"] = {
            label: {
                "method": self.method_of(label),
                "options": self.options_of(label),
                "train": self.training_of(label).model_dump(mode="json"),
                "backbones": {arch: net.model_dump(mode="json") for arch, net in entry.backbones.items()},
                "weights": entry.weights,
                "seeds": entry.seeds,
            }
            for label, entry in self.methods.items()
        }
        return whole


def ready_experiments() -> dict[str, Path]:
    """The experiment files that come with the package, by name."""
    folder = package_files.files("pipeline.experiments")
    return {Path(str(file)).stem: Path(str(file)) for file in folder.iterdir() if file.name.endswith(".yaml")}


def load_experiment(name: str, settings: Sequence[str] = ()) -> Experiment:
    """Read an experiment by the name of a ready one or by the path of a file.

    Args:
        name: ``quickstart``, or ``my/experiment.yaml``.
        settings: ``dotted.key=value`` strings that override the file; values are YAML.

    Raises:
        UserError: anything wrong, with file, line, key and what was expected.
    """
    path = _find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the experiment {path}: {why}") from None
    given, lines = read_yaml(text, name=str(path))
    if not isinstance(given, dict):
        raise UserError(
            f"{path}: expected an experiment (keys such as name, dataset, methods), found no mapping"
        )
    given.setdefault("name", path.stem)
    origin = _Origin(path, lines)
    for setting in settings:
        origin.overridden.append(_apply(given, setting))
    return _validate(given, origin)


class _Origin:
    """Where a key was written: a line of the file, or ``--set``."""

    def __init__(self, path: Path, lines: dict[tuple, int]) -> None:
        self.path, self.lines = path, lines
        self.overridden: list[tuple[str, ...]] = []

    def of(self, location: Sequence[Any]) -> str:
        parts = tuple(map(str, location))
        for key in self.overridden:
            if parts[: len(key)] == key:
                return "--set"
        for length in range(len(parts), 0, -1):
            if parts[:length] in self.lines:
                return f"{self.path}:{self.lines[parts[:length]]}"
        return str(self.path)

    def error(self, location: Sequence[Any], message: str) -> UserError:
        return UserError(f"{self.of(location)}: {'.'.join(map(str, location)) or 'experiment'}: {message}")


def _find(name: str) -> Path:
    ready = ready_experiments()
    if name in ready:
        return ready[name]
    path = Path(name)
    if os.path.isfile(path):  # unlike Path.is_file, false too where the name is too long
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise UserError(f"no experiment file {name}")
    raise UserError(
        f"no experiment {name!r}{nearest(name, ready)} (ready: {', '.join(sorted(ready))}; or give a file)"
    )


def _apply(given: Json, setting: str) -> tuple[str, ...]:
    """Put one ``dotted.key=value`` into the experiment; returns the key's parts."""
    dotted, equals, text = setting.partition("=")
    parts = tuple(dotted.split("."))
    if not equals or not all(parts):
        raise UserError(f"--set {setting}: expected KEY=VALUE, such as pretrain.epochs=20")
    value, _ = read_yaml(text, name=f"--set {dotted}")
    place: Any = given
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place.get(part), list) and part == "methods":
            place[part] = {str(name): {} for name in place[part]}
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise UserError(f"--set {setting}: {'.'.join(parts[: depth + 1])} has no keys below it")
    place[parts[-1]] = value
    return parts


def _validate(given: Json, origin: _Origin) -> Experiment:
    try:
        experiment = Experiment.model_validate(given)
    except ValidationError as error:
        raise _first_error(error, Experiment, (), origin) from None
    for label, entry in experiment.methods.items():
        name = experiment.method_of(label)
        where = ("methods", label)
        if name not in METHODS:
            raise origin.error(where, f"unknown method{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
        try:
            experiment.options_of(label)
        except UserError as error:
            raise origin.error((*where, "options"), str(error)) from None
        try:
            Training.model_validate(entry.train)
        except ValidationError as error:
            raise _first_error(error, Training, (*where, "train"), origin) from None
        missing = set(METHODS[name].archs) - set(experiment.backbones_of(label))
        if METHODS[name].joint and missing:
            raise origin.error(("backbones",), f"the method {name} needs both a cnn and a vit")
        for arch in entry.backbones:
            if arch not in METHODS[name].archs:
                raise origin.error((*where, "backbones", arch), f"the method {name} trains no {arch}")
        if missing == set(METHODS[name].archs):
            raise origin.error(where, f"the method {name} trains a {' or '.join(METHODS[name].archs)} only")
    for where, metric in (
        (("finetune", "select_by"), experiment.finetune.select_by),
        (("report", "metric"), experiment.report.metric),
    ):
        if metric not in ALL_METRICS:  # whether the labels are multiple is known after sharding
            hint = nearest(metric, ALL_METRICS) or f" (known: {', '.join(ALL_METRICS)})"
            raise origin.error(where, f"unknown metric {metric!r}{hint}")
    for dataset in experiment.all_datasets:
        if not experiment.protocols_of(dataset):
            fitting = ", ".join(name for name, info in PROTOCOLS.items() if info.kind == dataset.kind)
            raise origin.error(
                ("finetune", "protocols"), f"none is for {dataset.kind}, which {dataset.name} is ({fitting})"
            )
    baseline = experiment.report.baseline
    if baseline not in experiment.methods:
        raise origin.error(
            ("report", "baseline"),
            f"{baseline!r} is not one of the methods ({', '.join(experiment.methods)})"
            + nearest(baseline, experiment.methods),
        )
    return experiment


def _first_error(error: ValidationError, model: type[BaseModel], prefix: tuple, origin: _Origin) -> UserError:
    """The most telling of pydantic's errors, as one line."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    location = [part for part in problem["loc"] if part != "[key]"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        hint = nearest(str(location[-1]), known)
        message = "unknown key" + (hint or f" (known here: {', '.join(known)})")
    elif problem["type"] == "missing":
        message = "missing"
    elif problem["type"] == "string_pattern_mismatch":  # of all patterns there is only that of names
        said = repr(problem["input"])
        message = f"expected letters, digits, '_', '.' and '-', the first a letter or digit, found {said}"
    elif problem["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, found {problem['input']!r}"[:300]
    return origin.error((*prefix, *location), message)


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that a model allows at a place such as ('resources', 'pretrain')."""
    current: Any = model
    for part in location:
        fields: Mapping[str, Any] = getattr(current, "model_fields", {})
        annotation = fields[part].annotation if part in fields else current
        current = _model_within(annotation)
        if current is None:
            return []
    return list(getattr(current, "model_fields", {}))


def _model_within(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _model_within(part)
        if found is not None:
            return found
    return None
