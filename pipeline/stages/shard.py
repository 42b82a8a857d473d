"""The shard stage: from images as they lie on disk to webdataset tars with an index."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: a mistake or an installation that cannot work is one line
    from pipeline.stages.command import main

    main("shard")

import sys
from collections.abc import Sequence
from pathlib import Path

import shards
from pipeline.errors import UserError
from pipeline.inventory import take_inventory, write_inventory
from pipeline.manifest import Task
from pipeline.specs import FOR_SOURCES, Dataset, ShardSpec
from pipeline.stages.work import Outcome, Work
from shards.boxes import Instances
from shards.gather import all_samples
from shards.sources import SPLITS, Listing


def run(work: Work) -> Outcome:
    """Write the data set into the task's folder.

    Raises:
        shards.InputError: whatever is wrong with the images, labels or splits, in one line.
        UserError: the splits are to be repeated, and the source gives some.
    """
    spec = ShardSpec.model_validate(work.task.spec)
    dataset = spec.dataset
    options = options_of(dataset, processes=work.resources.cpus_per_rank)
    write_inventory(work.folder, take_inventory(dataset))  # before an image is read
    index = shards.write(source_of(dataset), work.folder, options, progress=work.progress)
    given = [split for split in ("val", "test") if split not in index.report.get("splits_made", ())]
    if spec.pooled and given:
        raise UserError(given_splits(spec.pooled, given))
    for warning in index.warnings:
        print(f"warning: {warning}", flush=True)
    samples = index.samples
    return Outcome(
        metrics={
            "task": index.task,
            "classes": index.classes,
            "warnings": index.warnings,
            "samples": {split: int((samples["split"] == split).sum()) for split in SPLITS},
        }
    )


def given_splits(dataset: str, given: Sequence[str]) -> str:
    """What to say of a data set whose splits cannot be drawn several times."""
    return (
        f"splits.repeats: the source of {dataset} gives splits ({', '.join(given)}), which are the same each"
        " time; set repeats: 1, or leave the given splits out (split folders, split_column)"
    )


def options_of(dataset: Dataset, *, processes: int = 1) -> shards.ShardOptions:
    """How the experiment file wants a data set written."""
    return shards.ShardOptions(
        splits=dataset.splits.model_dump(exclude={"repeats"}),
        seed=dataset.seed,
        resize=dataset.resize,
        duplicates=dataset.duplicates,
        near_duplicates=dataset.near_duplicates,
        max_rejected=dataset.max_rejected,
        exclude=dataset.exclude,
        intensity=None if dataset.intensity is None else (dataset.intensity.black, dataset.intensity.white),
        shard_samples=dataset.shard_samples,
        unlabelled=dataset.unlabelled,
        processes=processes,
    )


def source_of(dataset: Dataset) -> shards.Source:
    """The source that a data set of the experiment file describes."""
    if dataset.source == "digits":
        return shards.DigitsSource()
    if dataset.source == "digit_pages":
        return shards.DigitPagesSource()
    assert dataset.root is not None  # specs.Dataset has checked it
    if dataset.source == "folder":
        return shards.FolderSource(dataset.root, classes=dataset.classes)
    given = {key: getattr(dataset, key) for key, sources in FOR_SOURCES.items() if dataset.source in sources}
    given = {key: value for key, value in given.items() if value is not None}  # the source has the defaults
    if dataset.source == "masks":
        return shards.MaskSource(dataset.root, **given)
    if dataset.source == "coco":
        return shards.CocoSource(dataset.root, classes=dataset.classes, **given)
    if dataset.source == "voc":
        return shards.VocSource(dataset.root, classes=dataset.classes, **given)
    return shards.CsvSource(
        dataset.root,
        csv=dataset.csv,
        path_column=dataset.path_column,
        label_columns=dataset.label_columns,
        label_separator=dataset.label_separator,
        split_column=dataset.split_column,
        group_column=dataset.group_column,
        classes=dataset.classes,
        **given,
    )


def check_source(task: Task, *, outlined: str | None = None) -> Listing:
    """List the source without reading an image, to refuse a missing folder, file, column or class early.

    Args:
        task: of this stage.
        outlined: a protocol that needs the outlines of objects, where one is to run on this data set.

    Returns:
        What it lists.

    Raises:
        shards.InputError: as ``run`` would, but for what only the images' bytes tell.
        UserError: outlines are needed, and no object has one.
    """
    dataset = ShardSpec.model_validate(task.spec).dataset
    source = source_of(dataset)
    folders = [(source.base or Path()) / folder for folder in dataset.unlabelled]
    for folder in folders:
        if not folder.is_dir():
            raise shards.InputError(f"no folder {folder} (unlabelled images)")
    listing, _ = all_samples(source, options_of(dataset))
    if outlined is not None:
        _check_outlines(listing, dataset.name, outlined)
    return listing


def _check_outlines(listing: Listing, dataset: str, protocol: str) -> None:
    """Refuse a data set whose objects are all without an outline, and say where some are."""
    known = [sample.annotation for sample in listing.samples if isinstance(sample.annotation, Instances)]
    objects = [one for instances in known for one in instances.found]
    lacking = sum(one.segment is None for one in objects)
    if not lacking:
        return
    said = f"{protocol} needs the outline of every object, and {lacking} of the {len(objects)} of {dataset}"
    if lacking == len(objects):
        raise UserError(f"finetune.protocols: {said} have none; the protocol detect needs boxes only")
    print(f"warning: {said} have none: it fails on the images that show one", file=sys.stderr)
