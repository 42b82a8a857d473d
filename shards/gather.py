"""The first pass: list all samples, decode every image, set unreadable ones apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from shards import codec, parallel
from shards.annotate import Entry, Measured, measure
from shards.errors import InputError, listed
from shards.options import ShardOptions
from shards.sources import Listing, Sample, Source, existing_folder, unlabelled_samples

MASK_ENDING = re.compile(
    r"[_-](?:mask|masks|seg|segmentation|label|labels|gt|groundtruth|annotation)(?:[_-]?\d+)?$", re.I
)
MASK_BEGINNING = re.compile(r"^(?:mask|seg|label|gt)[_-]", re.I)
MASK_FOLDERS = frozenset(
    {"mask", "masks", "label", "labels", "segmentation", "segmentations", "gt", "annotations"}
)
FEWEST_MASKS, MASK_SHARE = 3, 0.1  # below, names may happen to be like that
TWINS = 0.9  # of the images of a suffix have others' names: they are something else of the same
SHOWN = 8  # kinds of files named in a warning
Progress = Callable[[int, int, str], None]  # done, total, what is being done


def all_samples(source: Source, options: ShardOptions) -> tuple[Listing, list[Sample]]:
    """What the source lists, and all samples by path, the extra unlabelled ones among them.

    Raises:
        InputError: whatever the source raises; two samples with one key.
    """
    extra = [existing_folder((source.base or Path()) / path) for path in options.unlabelled]
    listing = source.listing(exclude=extra)
    ignored = Counter(listing.ignored)
    samples = sorted(listing.samples + unlabelled_samples(extra, ignored), key=lambda sample: sample.path)
    samples, notes = _without_excluded(samples, options.exclude)
    if listing.task in ("multiclass", "multilabel"):
        notes += refuse_masks(samples, options.exclude)
    notes += [f"{sum(ignored.values())} files passed over: {_counted(ignored)}"] if ignored else []
    listing = replace(listing, ignored=dict(sorted(ignored.items())), notes=listing.notes + notes)
    keys: dict[str, str] = {}
    for sample in samples:
        key = sample_key(sample.path)
        if key in keys:
            raise InputError(f"'{keys[key]}' and '{sample.path}' have one key, '{key}': rename one")
        keys[key] = sample.path
    return listing, samples


def _without_excluded(samples: list[Sample], patterns: Sequence[str]) -> tuple[list[Sample], list[str]]:
    """The samples whose path, or file name, matches no pattern; and how many each has left out."""
    everything = samples
    notes = []
    for pattern in patterns:
        if not any(matches(one.path, pattern) for one in everything):
            raise InputError(f"exclude: {pattern!r} matches no image")
        kept = [one for one in samples if not matches(one.path, pattern)]
        notes.append(f"exclude: {pattern!r} leaves out {len(samples) - len(kept)} images")
        samples = kept
    if patterns and not samples:
        raise InputError(f"exclude leaves out every image ({listed(patterns)})")
    return samples, notes


def matches(path: str, pattern: str) -> bool:
    """Whether a path, or its file name, matches a pattern of ``exclude``."""
    return fnmatchcase(path, pattern) or fnmatchcase(path.rsplit("/", 1)[-1], pattern)


def _counted(ignored: Mapping[str, int]) -> str:
    """Suffixes and names with their numbers, the most frequent first."""
    most = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(most) - SHOWN} other kinds" if len(most) > SHOWN else ""
    return ", ".join(f"{count} {name}" for name, count in most[:SHOWN]) + more


def refuse_masks(samples: Sequence[Sample], excluded: Sequence[str] = ()) -> list[str]:
    """Refuse masks that lie among the images of a set with classes, where they would be images.

    Names decide: ``X_mask``, ``X_seg``, ``mask_X`` … beside an image ``X``, or a folder ``masks`` repeating
    the names of the images beside it, for a tenth of the images or more.

    Args:
        samples: what is left of the source's images.
        excluded: the patterns that have left out others.

    Returns:
        A line for fewer images than that.

    Raises:
        InputError: with the two ways out.
    """
    plain: dict[str, str] = {}  # path without suffix → path
    for sample in samples:
        plain.setdefault(_stem(sample.path), sample.path)
    found = []
    for stem, path in plain.items():
        folder, _, name = stem.rpartition("/")
        image = MASK_ENDING.sub("", MASK_BEGINNING.sub("", name))
        above, _, last = folder.rpartition("/")
        if (image != name and image and f"{folder}/{image}".lstrip("/") in plain) or (
            last.lower() in MASK_FOLDERS and _beside(above, name, plain)
        ):
            found.append(path)
    if not found:
        return _refuse_twins(samples)
    patterns = [*excluded, *sorted({_pattern(path) for path in found})]
    line = (
        f"{len(found)} of {len(samples)} images look like masks of others, such as {found[0]}: leave them"
        f" out (exclude: {json.dumps(patterns)}), or read them as masks (source: masks)"
    )
    if len(found) >= FEWEST_MASKS and len(found) >= MASK_SHARE * len(samples):
        raise InputError(line)
    return [line]


def _refuse_twins(samples: Sequence[Sample]) -> list[str]:
    """Refuse images that all have the names of others with another suffix (``1.bmp``, ``1.png``).

    They are masks, or copies.

    Returns:
        A line where only some have.
    """
    suffixes: dict[str, list[str]] = {}
    for sample in samples:
        stem = _stem(sample.path)
        suffixes.setdefault(stem, []).append(sample.path[len(stem) :])
    twins = {stem: found for stem, found in suffixes.items() if len(found) > 1}
    if not twins:
        return []
    stem, found = next(iter(twins.items()))
    all_of = Counter(suffix for several in suffixes.values() for suffix in several)
    shared = Counter(suffix for several in twins.values() for suffix in several)
    suffix = max(shared, key=lambda suffix: (shared[suffix] / all_of[suffix], shared[suffix], suffix))
    line = (
        f"{len(twins)} names of images are there with several suffixes, such as {stem}{found[0]} and"
        f" {stem}{found[1]}: leave one kind out (exclude: {json.dumps([f'*{suffix}'])}), or, if they are"
        f" masks, read them so (source: masks, mask_suffix: {suffix})"
    )
    least = max(FEWEST_MASKS, MASK_SHARE * len(samples), TWINS * all_of[suffix])
    if shared[suffix] >= least:
        raise InputError(line)
    return [line]


def _beside(above: str, name: str, plain: Mapping[str, str]) -> bool:
    """Whether an image of this name lies in the folder above, or in a folder of images in it."""
    places = [above, f"{above}/images", f"{above}/image", f"{above}/img"]
    return any(f"{place}/{name}".lstrip("/") in plain for place in places)


def _pattern(path: str) -> str:
    """A pattern that leaves out the masks that are called as this one."""
    folder, _, name = _stem(path).rpartition("/")
    if ending := MASK_ENDING.search(name):
        return f"*{re.sub('[0-9]+$', '*', ending.group())}.*"
    return "mask*" if MASK_BEGINNING.match(name) else f"*/{folder.rpartition('/')[2]}/*"


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"


def sample_key(path: str) -> str:
    """The key of a sample in the tars: its path in safe characters, and 8 hex digits of its SHA-256.

    Keys hold no dot, as webdataset ends a key there.
    """
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", path.rsplit(".", 1)[0] if "." in path.rsplit("/", 1)[-1] else path)
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    return f"{stem[-60:].strip('_')}-{digest}".lstrip("-")


def inspect(
    samples: list[Sample], options: ShardOptions, pool: parallel.Pool, progress: Progress
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Readable samples, and (path, reason) of the others, both by path."""
    entries: list[Entry] = []
    rejected: list[tuple[str, str]] = []
    chunks = [samples[start : start + parallel.CHUNK] for start in range(0, len(samples), parallel.CHUNK)]
    for seen in pool.map(_inspect_chunk, [(chunk, options.rules) for chunk in chunks]):
        for result in seen:
            sample = samples[len(entries) + len(rejected)]
            if isinstance(result, str):
                rejected.append((sample.path, result))
            else:
                entries.append(Entry(sample, result[0], sample_key(sample.path), result[1]))
        progress(len(entries) + len(rejected), len(samples), "reading images")
    return entries, rejected


def _inspect_chunk(
    samples: list[Sample], rules: codec.Rules
) -> list[tuple[codec.Inspection, Measured | None] | str]:
    """Runs in a worker: each file's measures and its annotation's, or the reason why it cannot be used."""
    results: list[tuple[codec.Inspection, Measured | None] | str] = []
    for sample in samples:
        try:
            seen = codec.inspect(sample.read(), rules=rules)
            results.append((seen, measure(sample, seen)))
        except FileNotFoundError:
            results.append("no such file")
        except OSError as error:
            results.append(error.strerror or str(error))
        except codec.Unreadable as error:
            results.append(str(error))
    return results


def check_readable(
    entries: list[Entry], rejected: list[tuple[str, str]], total: int, options: ShardOptions
) -> None:
    """Refuse a dataset with too many unreadable images. Raises InputError."""
    some = "; ".join(f"{path}: {reason}" for path, reason in rejected[:3])
    if not entries:
        raise InputError(f"no readable image among {total} ({some})")
    if len(rejected) > options.max_rejected * total:
        raise InputError(
            f"{len(rejected)} of {total} images are unreadable, more than the share {options.max_rejected} of"
            f" max_rejected ({some})"
        )


def check_present(classes: Sequence[str], entries: list[Entry]) -> None:
    """Refuse a dataset in which nothing is left of a class. Raises InputError."""
    present = {label for entry in entries for label in entry.sample.labels}
    for name in classes:
        if name not in present:
            raise InputError(f"class '{name}' has no readable image")
