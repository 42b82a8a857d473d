"""What ``data_report.json`` says of a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards import alike, codec, intensity
from shards.annotate import Measured
from shards.duplicates import Copies, Linked
from shards.errors import listed
from shards.intensity import Kind, Window
from shards.names import nearly_equal
from shards.sources import ANNOTATIONS, SEPARATOR, SPLITS, Listing, Sample

EXAMPLES = 50  # duplicates named a kind
COPIES_COLUMNS = (
    *("picture", "kind", "correlation", "path_1", "split_1", "labels_1", "path_2", "split_2", "labels_2"),
    *("two_splits", "label_conflict"),
)
LARGE = 0.1  # share of the images that are unlikely to show one picture
BOX_COUNTS = ("crowd", "outlined", "clipped", "dropped")  # of annotate.Measured


@dataclass
class Duplicates:
    """The copies found: every pair; paths with identical pixels, a list a picture; and the paths dropped.

    ``dropped`` for identical pixels in another split, ``near_dropped`` for altered copies there.
    """

    pairs: list[Copies] = field(default_factory=list)
    within: list[list[str]] = field(default_factory=list)
    across: list[list[str]] = field(default_factory=list)
    conflicting: list[list[str]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    near_dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """All the report is made from; ``samples``, ``seen`` and ``measured`` have one entry each a sample."""

    listing: Listing
    samples: Sequence[Sample]
    seen: Sequence[codec.Inspection]
    measured: Sequence[Measured | None]
    rejected: Sequence[tuple[str, str]]
    splits_made: Sequence[str]
    duplicates: Duplicates
    windows: Mapping[Kind, Window]


def counts(classes: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
    """For each split: samples, unlabelled ones, groups, and samples of each class."""
    result = {}
    for split in SPLITS:
        chosen = [sample for sample in samples if sample.split == split]
        of_class = Counter(label for sample in chosen for label in sample.labels)
        result[split] = {
            "samples": len(chosen),
            "unlabelled": sum(not sample.labelled for sample in chosen),
            "groups": len({sample.group for sample in chosen} - {""}),
            "classes": {name: of_class[name] for name in classes},
        }
    return result


def make(facts: Facts, copies: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``data_report.json``; ``copies`` as :func:`copies_table` gives them."""
    near = _near_duplicates(facts, copies)
    table = counts(facts.listing.classes, facts.samples)
    annotations = {"annotations": _annotations(facts)} if facts.listing.task in ANNOTATIONS else {}
    return {
        "samples": len(facts.samples),
        "counts": table,
        **annotations,
        "splits_made": list(facts.splits_made),
        "formats": dict(sorted(Counter(one.format for one in facts.seen).items())),
        "original_bytes_kept": sum(one.original for one in facts.seen),
        "width": _spread([one.width for one in facts.seen]),
        "height": _spread([one.height for one in facts.seen]),
        "rejected": dict(Counter(reason for _, reason in facts.rejected).most_common()),
        "ignored_files": facts.listing.ignored,
        "duplicates": {
            "across_splits": len(facts.duplicates.across),
            "within_splits": len(facts.duplicates.within),
            "with_different_labels": len(facts.duplicates.conflicting),
            "dropped": len(facts.duplicates.dropped),
            "examples": {
                "across_splits": facts.duplicates.across[:EXAMPLES],
                "within_splits": facts.duplicates.within[:EXAMPLES],
                "with_different_labels": facts.duplicates.conflicting[:EXAMPLES],
                "dropped": facts.duplicates.dropped[:EXAMPLES],
            },
        },
        "near_duplicates": near,
        "warnings": _warnings(facts, table, near),
    }


def _annotations(facts: Facts) -> dict[str, Any]:
    """What masks or boxes hold: for each split pixels or boxes of each class, and what was done to boxes."""
    of_class = {split: dict.fromkeys(facts.listing.classes, 0) for split in SPLITS}
    known = [(sample.split, one) for sample, one in zip(facts.samples, facts.measured) if one]
    for split, one in known:
        for name, count in one.counts.items():
            of_class[split][name] += count
    if facts.listing.task == "segmentation":
        every = sum(sum(one.values.values()) for _, one in known)
        ignored = every - sum(sum(table.values()) for table in of_class.values())
        return {"pixels": of_class, "ignored_pixels": ignored}
    sums = {name: sum(getattr(one, name) for _, one in known) for name in BOX_COUNTS}
    return {"boxes": of_class, **sums}


def copies_table(facts: Facts) -> list[dict[str, Any]]:
    """The rows of ``duplicates.csv``: two images that show the same, those of one picture together.

    A split is that of the dataset, or "dropped".
    """
    splits = {sample.path: sample.split for sample in facts.samples}
    linked = Linked()
    for pair in facts.duplicates.pairs:
        linked.link(pair.first.path, pair.second.path)
    numbers: dict[str, int] = {}
    rows = []
    for pair in facts.duplicates.pairs:
        here, there = (splits.get(sample.path, "dropped") for sample in (pair.first, pair.second))
        rows.append(
            {
                "picture": numbers.setdefault(linked.root(pair.first.path), len(numbers)),
                "kind": pair.kind,
                "correlation": pair.correlation,
                **{"path_1": pair.first.path, "split_1": here, "labels_1": SEPARATOR.join(pair.first.labels)},
                **{
                    "path_2": pair.second.path,
                    "split_2": there,
                    "labels_2": SEPARATOR.join(pair.second.labels),
                },
                "two_splits": int("dropped" not in (here, there) and here != there),
                "label_conflict": int(pair.conflict),
            }
        )
    return sorted(rows, key=lambda row: row["picture"])


def _near_duplicates(facts: Facts, table: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [row for row in table if row["kind"] == "near"]
    linked = Linked()
    for row in rows:
        linked.link(row["path_1"], row["path_2"])
    sizes = Counter(linked.root(path) for path in {row[key] for row in rows for key in ("path_1", "path_2")})
    apart = [row for row in rows if row["two_splits"]]
    return {
        "min_correlation": alike.MIN_DETAIL,
        "pairs": len(rows),
        "images": sum(sizes.values()),
        "most_of_one_picture": max(sizes.values(), default=0),
        "across_splits": len(apart),
        "with_different_labels": sum(row["label_conflict"] for row in rows),
        "dropped": len(facts.duplicates.near_dropped),
        "examples": [*apart, *(row for row in rows if not row["two_splits"])][:EXAMPLES],
    }


def _frames(facts: Facts) -> list[str]:
    """Files of several pages or frames, of which the first is in the dataset."""
    several = [(sample.path, one.frames) for sample, one in zip(facts.samples, facts.seen) if one.frames > 1]
    if not several:
        return []
    left = sum(frames - 1 for _, frames in several)
    path, frames = several[0]
    return [
        f"{len(several)} files have several pages or frames, such as {path} with {frames}: the first of each"
        f" is taken, {left} are left out"
    ]


def _intensities(facts: Facts) -> list[str]:
    """What became black and white in images of more than 8 bits, and what looks as if it were wrong."""
    lines = []
    deep = [(sample.path, one.levels) for sample, one in zip(facts.samples, facts.seen) if one.levels]
    for kind, window in sorted(facts.windows.items()):
        mine = [(path, levels) for path, levels in deep if levels.kind == kind]
        if not mine:
            continue
        what = "floats from 0 to 1" if kind == "unit" else "more than 8 bits a channel"
        lines.append(
            f"{len(mine)} images of {what}: values from {window[0]:g} to {window[1]:g} become black to white"
            " (dataset.intensity can set them)"
        )
        far = intensity.outliers([levels for _, levels in mine])
        away = [one for one, is_far in zip(mine, far) if is_far]
        if away:
            path, levels = away[0]
            lines.append(
                f"{len(away)} of them reach far beyond the others, such as {path} with values from"
                f" {levels.quantiles[0]:g} to {levels.quantiles[-1]:g}: they are shown on the others' scale"
            )
        used = float(np.median([intensity.used_share(levels, window) for _, levels in mine]))
        if used < intensity.LITTLE:
            lines.append(
                f"the median of these images uses {used:.0%} of the range from black to white: dark or flat;"
                " dataset.intensity: {black: …, white: …} would spread it"
            )
    spans = [one.span for one in facts.seen if one.levels is None]
    if spans and np.median(spans) < intensity.LITTLE * intensity.BYTE:
        lines.append(
            f"the median image of 8 bits a channel uses {np.median(spans) / intensity.BYTE:.0%} of the range"
            " from black to white: dark or flat"
        )
    if deep and spans:
        lines.append(
            f"{len(deep)} images have more than 8 bits a channel and {len(spans)} have 8: are they alike?"
        )
    windowed = sum(one.windowed for one in facts.seen)
    if windowed and len(facts.windows) and any(levels.kind == "values" for _, levels in deep):
        lines.append(
            f"{windowed} DICOM images say themselves what is black and white and others do not:"
            " dataset.intensity makes one scale of all"
        )
    return lines


def _spellings(facts: Facts) -> list[str]:
    """Classes, and groups, whose names are one to a person: they differ in case, spaces, zeros or ``.0``."""
    lines = []
    for several in nearly_equal(facts.listing.classes)[:EXAMPLES]:
        lines.append(f"classes {listed(several)} differ in spelling only: are they one?")
    splits: dict[str, set[str]] = {}
    for sample in facts.samples:
        if sample.group:
            splits.setdefault(sample.group, set()).add(sample.split)
    spelled = nearly_equal(splits)
    if spelled:
        apart = [several for several in spelled if len(set.union(*(splits[name] for name in several))) > 1]
        first = (apart or spelled)[0]
        where = sorted(set.union(*(splits[name] for name in first)), key=SPLITS.index)
        lines.append(
            f"{len(spelled)} groups have several spellings (case, spaces, zeros, '.0'), {len(apart)} of them"
            f" in several splits, such as {listed(first)} in {' and '.join(where)}: is each one group?"
        )
    return lines


def _warnings(facts: Facts, table: dict[str, Any], near: dict[str, Any]) -> list[str]:
    lines = [*facts.listing.notes, *_spellings(facts), *_intensities(facts), *_frames(facts)]
    if facts.listing.task in ("multiclass", "multilabel") and len(facts.listing.classes) == 1:
        only = facts.listing.classes[0]
        lines.append(f"there is only one class, '{only}': good for pretraining, not for fine-tuning")
    if facts.rejected:
        lines.append(f"{len(facts.rejected)} unreadable images are left out (rejected.csv)")
    for split, entry in table.items():
        for name, count in entry["classes"].items():
            if not count:
                lines.append(f"class '{name}' has no sample in the {split} split")
        if split != "train" and entry["unlabelled"]:
            lines.append(
                f"{entry['unlabelled']} images of the {split} split are unlabelled and serve for nothing:"
                " pretraining takes train images"
            )
    clipped = sum(one.clipped for one in facts.measured if one)
    dropped = sum(one.dropped for one in facts.measured if one)
    if clipped:
        lines.append(f"{clipped} boxes reached beyond their images and are clipped")
    if dropped:
        lines.append(f"{dropped} boxes without any area in their images are left out")
    copies = facts.duplicates
    if copies.dropped:
        lines.append(f"{len(copies.dropped)} images with identical pixels in another split are dropped")
    elif copies.across:
        lines.append(f"{len(copies.across)} images are in two splits with identical pixels (duplicates.csv)")
    if copies.conflicting:
        lines.append(
            f"{len(copies.conflicting)} images are there twice with different labels (duplicates.csv)"
        )
    if near["pairs"]:
        lines += _near_lines(facts, near)
    return lines


def _near_lines(facts: Facts, near: dict[str, Any]) -> list[str]:
    what = "altered copies of one another (mirrored, turned, cropped, scaled or recompressed; duplicates.csv)"
    lines = [f"{near['images']} images are {what}"]
    if near["across_splits"]:
        lines.append(
            f"{near['across_splits']} pairs of altered copies are in two splits: scores promise too much"
            " (duplicates.csv has them; near_duplicates: drop leaves out those of train)"
        )
    if near["with_different_labels"]:
        lines.append(
            f"{near['with_different_labels']} pairs of altered copies have different labels (duplicates.csv)"
        )
    if near["dropped"]:
        first = facts.duplicates.near_dropped[0]
        lines.append(
            f"{near['dropped']} images are left out as altered copies of val or test images, such as {first}"
        )
    if near["most_of_one_picture"] > LARGE * len(facts.samples):
        lines.append(
            f"{near['most_of_one_picture']} images are linked as copies of one another and stay in one split:"
            " if they are not, near_duplicates: warn divides them"
        )
    return lines


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}
