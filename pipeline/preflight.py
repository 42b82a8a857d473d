"""What is looked at before anything is submitted, so that no job has to wait in a queue to find it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.installed import check_torch
from pipeline.manifest import Task
from pipeline.specs import TRAINING_STAGES, FinetuneSpec, PretrainSpec, ShardSpec


def preflight(pending: Sequence[Task]) -> None:
    """Check what the tasks read, the names that only timm and torch know, and that nets can be built.

    Raises:
        UserError, shards.InputError: a missing folder, file or CSV column, an unknown timm name or
            augmentation recipe, missing weights, a torch and a torchvision that do not fit, and what
            :func:`pipeline.buildable.check_buildable` finds.
    """
    stages = {task.stage for task in pending}
    trained = [PretrainSpec.model_validate(task.spec) for task in pending if task.stage in TRAINING_STAGES]
    tuned = [FinetuneSpec.model_validate(task.spec) for task in pending if task.stage == "finetune"]
    if "shard" in stages:
        from pipeline.stages.shard import check_source

        outlined = {spec.dataset: spec.protocol for spec in tuned if PROTOCOLS[spec.protocol].outlines}
        for task in pending:
            if task.stage == "shard":
                name = ShardSpec.model_validate(task.spec).dataset.name
                check_source(task, outlined=outlined.get(name))
    if stages & {*TRAINING_STAGES, "finetune"}:
        check_torch()
    recipes = {spec.train.augment for spec in trained} | {spec.settings.augment for spec in tuned}
    _check_recipes({recipe for recipe in recipes if recipe is not None})
    if trained or tuned:
        from pipeline.buildable import check_buildable

        check_buildable(trained, tuned)


def _check_recipes(recipes: set[str]) -> None:
    from pipeline.data.augment import Augment

    for recipe in sorted(recipes):
        Augment(recipe, size=8)
