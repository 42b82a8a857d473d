"""What an experiment is: its sections with their defaults, and what they mean for a method or a data set.

Imports no torch, so that ``plan`` and ``show`` answer at once on a login node.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.errors import nearest
from pipeline.evaluate.protocols import PROTOCOL_NAMES, PROTOCOLS
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

    seeds: Literal["first", "each"] = "each"  # one pretraining a seed, or one that feeds every seed


class FinetuneSection(FinetuneSettings):
    protocols: list[str] = Field(
        ["finetune", "linear", "knn", "seg_linear", "seg_fpn", "detect"], min_length=1
    )  # a data set gets those of its kind
    fractions: list[float] = Field([0.01, 0.1, 1.0], min_length=1)
    fit: Literal["squash", "crop", "pad"] | None = None  # type: ignore[assignment]  # None: as pretrained

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

    @staticmethod
    def repeats_of(dataset: Dataset) -> list[Dataset]:
        """The data set with each of its repeated splits, each with its own name and seed; the first as it is.

        So raising ``splits.repeats`` adds tasks, and leaves those that are there.
        """
        splits = dataset.splits.model_copy(update={"repeats": 1})
        found = [dataset.model_copy(update={"splits": splits})]
        for number in range(2, dataset.splits.repeats + 1):
            own = {"name": f"{dataset.name}-r{number}", "seed": (dataset.seed + number - 1) % 2**31}
            found.append(found[0].model_copy(update=own))
        return found

    def protocols_of(self, dataset: Dataset) -> list[str]:
        """The protocols that a data set's labels are for."""
        return [name for name in self.finetune.protocols if PROTOCOLS[name].is_for(dataset)]

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
