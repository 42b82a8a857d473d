"""What is looked at before anything is submitted, so that no job has to wait in a queue to find it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.errors import UserError, raise_all
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.installed import check_torch
from pipeline.manifest import Task
from pipeline.specs import FinetuneSpec, PretrainSpec, ShardSpec
from pipeline.stages import TRAINING_STAGES

if TYPE_CHECKING:
    from shards.sources import Listing


def preflight(pending: Sequence[Task], sharded: Mapping[str, Path] | None = None) -> None:
    """Check what the tasks read, the names that only timm and torch know, and that nets can be built.

    Every check is made, and all that is wrong is told at once.

    Args:
        pending: the tasks still to run.
        sharded: folders of data sets that are there already, by the task that made each.

    Raises:
        UserError, shards.InputError: a missing folder, file or CSV column, an unknown timm name, missing
            weights, a torch and a torchvision that do not fit, objects without outlines for a protocol that
            needs them, no groups where label fractions are to draw them, and what
            :func:`pipeline.buildable.check_buildable` finds.
    """
    trained = [PretrainSpec.model_validate(task.spec) for task in pending if task.stage in TRAINING_STAGES]
    tuned = [FinetuneSpec.model_validate(task.spec) for task in pending if task.stage == "finetune"]
    checks: list[Callable[[], None]] = [
        partial(check_data, pending),
        *(
            partial(check, pending, sharded or {})
            for check in (_check_outlines, _check_classes, _check_groups)
        ),
    ]
    if trained or tuned:
        checks.append(partial(_check_nets, trained, tuned))
    _all_of(checks)


def _check_nets(trained: Sequence[PretrainSpec], tuned: Sequence[FinetuneSpec]) -> None:
    check_torch()
    from pipeline.buildable import check_buildable

    check_buildable(trained, tuned)


def _all_of(checks: Iterable[Callable[[], None]]) -> None:
    """Make every check, and raise what they found: one error as it is, several together."""
    from shards.errors import InputError

    found: list[Exception] = []
    for check in checks:
        try:
            check()
        except (UserError, InputError) as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    raise_all([error if isinstance(error, UserError) else UserError(str(error)) for error in found])


def check_data(pending: Sequence[Task]) -> None:
    """Check the folders, tables and label files of data sets that are not sharded yet. Imports no torch.

    Raises:
        UserError, shards.InputError: what is wrong, of every data set.
    """
    tuned = [FinetuneSpec.model_validate(task.spec) for task in pending if task.stage == "finetune"]
    _all_of(partial(_check_source, task, tuned) for task in pending if task.stage == "shard")


def _check_source(task: Task, tuned: Sequence[FinetuneSpec]) -> None:
    from pipeline.stages.shard import check_source, given_splits

    outlined = {spec.dataset: spec.protocol for spec in tuned if PROTOCOLS[spec.protocol].outlines}
    spec_ = ShardSpec.model_validate(task.spec)
    name = spec_.dataset.name
    listing = check_source(task, outlined=outlined.get(name))
    given = sorted({sample.split for sample in listing.samples if sample.labelled} - {""})
    if spec_.pooled and given:
        raise UserError(given_splits(spec_.pooled, given))
    if any(spec.dataset == name for spec in tuned):
        _require_classes(name, listing.task, listing.classes)
    if any(spec.dataset == name and _draws_groups(spec) for spec in tuned):
        _require_groups(name, listing)


def _require_classes(dataset: str, labels: str, classes: Sequence[str]) -> None:
    """Refuse to fine-tune where there is one class, before anything trains for it."""
    if labels in ("multiclass", "multilabel") and len(classes) == 1:
        raise UserError(
            f"{dataset} has only one class, '{classes[0]}': fine-tuning needs at least two."
            " To pretrain alone: python -m pipeline.launch pretrain"
        )


def _check_classes(pending: Sequence[Task], sharded: Mapping[str, Path]) -> None:
    """Of data sets that are there."""
    from shards.index import INDEX, read_json

    seen: set[str] = set()
    for task in pending:
        for need in task.needs if task.stage == "finetune" else ():
            if need in sharded and need not in seen:
                seen.add(need)
                meta = read_json(sharded[need] / INDEX)
                _require_classes(task.spec["dataset"], meta.get("task", ""), meta.get("classes", ()))


def _draws_groups(spec: FinetuneSpec) -> bool:
    return spec.settings.fractions_by == "group" and spec.fraction < 1


def _require_groups(dataset: str, listing: Listing) -> None:
    """Refuse to draw groups where the source gives none, and no file may be DICOM, whose bytes may."""
    from pipeline.data.fractions import no_groups
    from shards.codec import DICOM_SUFFIXES, SUFFIXES

    suffixes = {
        PurePosixPath(sample.path).suffix.lower() for sample in listing.samples if sample.location is not None
    }
    known = all(suffix in SUFFIXES - DICOM_SUFFIXES for suffix in suffixes)
    if known and not any(sample.group for sample in listing.samples):
        raise UserError(no_groups(dataset))


def _check_groups(pending: Sequence[Task], sharded: Mapping[str, Path]) -> None:
    """Of data sets that are there."""
    from pipeline.data.fractions import no_groups
    from shards.index import INDEX, read_json

    tuned = [task for task in pending if task.stage == "finetune"]
    drawn = {need: task for task in tuned if _draws_groups(FinetuneSpec(**task.spec)) for need in task.needs}
    for need in drawn.keys() & sharded.keys():
        counts = read_json(sharded[need] / INDEX).get("counts", {}).get("train", {})
        if counts.get("groups") == 0:
            raise UserError(no_groups(drawn[need].spec["dataset"]))


def _check_outlines(pending: Sequence[Task], sharded: Mapping[str, Path]) -> None:
    """Of data sets that are there."""
    tasks = [t for t in pending if t.stage == "finetune" and PROTOCOLS[t.spec["protocol"]].outlines]
    if not tasks:
        return
    from shards.index import INDEX, read_json

    for task in tasks:
        protocol = task.spec["protocol"]
        for folder in (sharded[need] for need in task.needs if need in sharded):
            if not read_json(folder / INDEX).get("outlined", False):
                raise UserError(
                    f"finetune.protocols: {protocol} needs the outline of every object, and in {folder} some"
                    " have none; the protocol detect needs boxes only"
                )
