"""From an experiment to its tasks: a pure function, with no files, no clock and no cluster."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.contents import of_dataset, of_weights
from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.manifest import Task
from pipeline.methods.registry import METHODS, searched_option
from pipeline.settings import identity
from pipeline.specs import (
    AggregateSpec,
    Architecture,
    Backbone,
    Dataset,
    FinetuneSettings,
    FinetuneSpec,
    PretrainSpec,
    Resources,
    SearchSpec,
    ShardSpec,
    Strict,
)

# Raise one when a stage's results, or a default that counts for it, change. What is not released yet may ride
# on the same number.
FORMATS = {"shard": 3, "search": 6, "pretrain": 6, "finetune": 10, "aggregate": 7}

SEARCH_SHORTENS = {"teacher_warmup_epochs", "freeze_last_layer_epochs"}  # options counted in epochs


def plan(experiment: Experiment, contents: Mapping[str, str] | None = None) -> tuple[Task, ...]:
    """Every task of an experiment, each after the tasks it needs.

    Args:
        contents: SHA-256 of files that decide results, by absolute path (:mod:`pipeline.contents`).

    Raises:
        UserError: two tasks would have one name: data set ``a-b`` with method ``c``, and ``a`` with ``b-c``.
    """
    contents = contents or {}
    tasks: list[Task] = []
    for dataset, repeat, pooled in _splits(experiment):
        spec = ShardSpec(
            dataset=_absolute(dataset), contents=of_dataset(dataset, contents), repeat=repeat, pooled=pooled
        )
        shard = make_task("shard", dataset.name, spec, (), experiment.resources.shard)
        tasks.append(shard)
        for label in experiment.methods:
            searches: dict[tuple[Architecture, ...], Task] = {}
            for archs, seed in _pretrainings(experiment, label):
                needs = [shard]
                if searched_option(experiment.options_of(label)):
                    if tuple(archs) not in searches:  # one, with the first seed, decides for all
                        given = _pretrain_spec(experiment, dataset, label, archs, seed, contents)
                        searches[tuple(archs)] = _search_task(experiment, given, archs, shard)
                        tasks.append(searches[tuple(archs)])
                    needs.append(searches[tuple(archs)])
                given = _pretrain_spec(experiment, dataset, label, archs, seed, contents)
                name = f"{dataset.name}-{label}-{'-'.join(archs)}-s{seed}"
                pretrain = make_task("pretrain", name, given, needs, experiment.resources.pretrain)
                tasks.append(pretrain)
                alone = len(experiment.pretraining_seeds_of(label)) == 1
                seeds = experiment.seeds if alone else [seed]
                for arch in archs:
                    tasks += _finetune_tasks(experiment, dataset, label, arch, seeds, (shard, pretrain))
    asked = AggregateSpec(experiment=experiment.name, report=experiment.report, seeds=experiment.seeds)
    tasks.append(make_task("aggregate", experiment.name, asked, tasks, experiment.resources.aggregate))
    for name, times in Counter(task.id for task in tasks).items():
        if times > 1:
            raise UserError(f"two tasks would be called {name}: give data sets and methods names that differ")
    return tuple(tasks)


def make_task(stage: str, name: str, spec: Strict, needs: Iterable[Task], resources: Resources) -> Task:
    """A task with its key.

    That is a SHA-256 over stage, that stage's format, what of the specification decides the result
    (:func:`pipeline.settings.identity`) and the needs' keys.
    """
    needs = tuple(needs)
    hashed = {
        "stage": stage,
        "format": FORMATS[stage],
        "spec": identity(spec),
        "needs": sorted(need.key for need in needs),
    }
    key = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return Task(
        id=f"{stage}/{name}",
        stage=stage,
        spec=spec.model_dump(mode="json"),
        needs=tuple(need.id for need in needs),
        key=key,
        resources=resources.model_dump(mode="json"),
    )


def _splits(experiment: Experiment) -> Iterator[tuple[Dataset, int, str]]:
    """Every data set with each of its splits, the number of the split, and what all are pooled as."""
    for whole in experiment.all_datasets:
        repeats = experiment.repeats_of(whole)
        for number, dataset in enumerate(repeats, start=1):
            yield dataset, number, whole.name if len(repeats) > 1 else ""


def _pretrainings(experiment: Experiment, label: str) -> list[tuple[list[Architecture], int]]:
    """Which nets are trained together, with which seed: all at once for a joint method, else one by one."""
    archs = list(experiment.backbones_of(label))
    together = [archs] if METHODS[experiment.method_of(label)].joint else [[arch] for arch in archs]
    return [(group, seed) for group in together for seed in experiment.pretraining_seeds_of(label)]


def _search_task(experiment: Experiment, spec: PretrainSpec, archs: list[Architecture], shard: Task) -> Task:
    """A training of its own length, whose warm-ups have the share of it that they have of the pretraining."""
    epochs, options = float(spec.options["search_epochs"]), dict(spec.options)
    shorter = min(1.0, epochs / spec.train.epochs)
    train = {"epochs": epochs, "warmup_epochs": spec.train.warmup_epochs * shorter}
    for name in SEARCH_SHORTENS & options.keys():
        options[name] *= shorter
    spec = SearchSpec.model_validate(
        spec.model_dump() | {"train": spec.train.model_dump() | train, "options": options}
    )
    name = f"{spec.dataset}-{spec.label}-{'-'.join(archs)}"
    return make_task("search", name, spec, (shard,), experiment.resources.search)


def _pretrain_spec(
    experiment: Experiment,
    dataset: Dataset,
    label: str,
    archs: list[Architecture],
    seed: int,
    contents: Mapping[str, str],
) -> PretrainSpec:
    backbones = {arch: _absolute_weights(experiment.backbones_of(label)[arch]) for arch in archs}
    return PretrainSpec(
        dataset=dataset.name,
        label=label,
        method=experiment.method_of(label),
        options=experiment.options_of(label),
        backbones=backbones,
        train=experiment.training_of(label),
        seed=seed,
        contents=of_weights(backbones, contents),
    )


def _finetune_tasks(
    experiment: Experiment,
    dataset: Dataset,
    label: str,
    arch: Architecture,
    seeds: list[int],
    needs: tuple[Task, Task],
) -> list[Task]:
    section = experiment.finetune
    given = section.model_dump(exclude={"protocols", "fractions"})
    fit = section.fit or experiment.training_of(label).fit
    settings = FinetuneSettings.model_validate(given | {"fit": fit})
    backbone = _absolute_weights(experiment.backbones_of(label)[arch])
    tasks = []
    for protocol in experiment.protocols_of(dataset):
        for fraction in section.fractions:
            for seed in seeds:
                spec = FinetuneSpec(
                    dataset=dataset.name,
                    label=label,
                    arch=arch,
                    backbone=backbone,
                    protocol=protocol,
                    fraction=fraction,
                    seed=seed,
                    settings=settings,
                )
                name = f"{dataset.name}-{label}-{arch}-{protocol}-{100 * fraction:g}pc-s{seed}"
                tasks.append(make_task("finetune", name, spec, needs, experiment.resources.finetune))
    return tasks


def _absolute(dataset: Dataset) -> Dataset:
    """The same data set wherever the command is typed: its root as an absolute path."""
    if dataset.root is None:
        return dataset
    return dataset.model_copy(update={"root": os.path.abspath(Path(dataset.root).expanduser())})


def _absolute_weights(backbone: Backbone) -> Backbone:
    if backbone.weights in ("random", "imagenet"):
        return backbone
    return backbone.model_copy(update={"weights": os.path.abspath(Path(backbone.weights).expanduser())})
