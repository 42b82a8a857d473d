"""What is looked at before anything is submitted, so that no job has to wait in a queue to find it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.installed import check_torch
from pipeline.manifest import Task
from pipeline.specs import TRAINING_STAGES, FinetuneSpec, PretrainSpec


def preflight(pending: Sequence[Task]) -> None:
    """Check what the tasks read, and the names that only timm and torch know.

    Raises:
        UserError, shards.InputError: a missing folder, file or CSV column, an unknown timm name or
            augmentation recipe, missing weights, a torch and a torchvision that do not fit.
    """
    stages = {task.stage for task in pending}
    if "shard" in stages:
        from pipeline.stages.shard import check_source

        for task in pending:
            if task.stage == "shard":
                check_source(task)
    if stages & {*TRAINING_STAGES, "finetune"}:
        check_torch()
    trained = [PretrainSpec.model_validate(task.spec) for task in pending if task.stage in TRAINING_STAGES]
    if trained:
        _check_pretraining(trained)
    tuned = [FinetuneSpec.model_validate(task.spec) for task in pending if task.stage == "finetune"]
    if tuned:
        _check_recipes({spec.settings.augment for spec in tuned})


def _check_pretraining(specs: Sequence[PretrainSpec]) -> None:
    from pipeline.nets.architectures import check_architecture
    from pipeline.nets.weights import weights_file

    for spec in specs:
        for arch, backbone in spec.backbones.items():
            check_architecture(backbone.name, arch)
            if backbone.weights not in ("random", "imagenet"):
                weights_file(backbone.weights, name=backbone.name)
    _check_recipes({spec.train.augment for spec in specs if spec.train.augment is not None})


def _check_recipes(recipes: set[str]) -> None:
    from pipeline.data.augment import Augment

    for recipe in sorted(recipes):
        Augment(recipe, size=8)
