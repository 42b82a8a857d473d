"""Between the passes: refuse leaks between splits, make the splits that are missing, put samples in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shards import duplicates
from shards.annotate import Entry
from shards.errors import InputError
from shards.names import canonical
from shards.options import ShardOptions
from shards.report import Duplicates
from shards.sources import SPLITS, Sample
from shards.splits import make_splits, missing_shares, order


@dataclass(frozen=True)
class Assembled:
    """Samples in file order with their final splits; which splits were made; the identical images found.

    ``notes`` are what the user should know of the splits.
    """

    entries: list[Entry]
    splits_made: list[str]
    found: Duplicates
    notes: list[str]


def assemble(classes: Sequence[str], entries: list[Entry], options: ShardOptions) -> Assembled:
    """Decide which samples are in the dataset, in which split, and in which order.

    Within a split the order is random (a function of the seed and the key), so that a reader of one shard
    after the other still meets all classes.

    Raises:
        InputError: a group or identical pixels in two given splits, too little left for a split or a class.
    """
    if options.only_test:
        entries = [replace(entry, sample=replace(entry.sample, split="test")) for entry in entries]
        entries.sort(key=lambda entry: order(options.seed, entry.key))
        return Assembled(entries, [], Duplicates(), [])
    given = {entry.sample.split for entry in entries if entry.sample.labelled}
    entries, notes = _without_labels_to_train(entries, given)
    _check_groups(entries)
    entries, found = _handle_duplicates(entries, options)
    entries = _with_splits(entries, given, options)
    _check_left(classes, entries)
    entries.sort(key=lambda entry: (SPLITS.index(entry.sample.split), order(options.seed, entry.key)))
    return Assembled(entries, [split for split in SPLITS if split not in given], found, notes)


def _without_labels_to_train(entries: list[Entry], given: set[str]) -> tuple[list[Entry], list[str]]:
    """Entries of splits in which nothing is labelled become train's: nothing can be evaluated on them."""
    notes, moved = [], []
    for split in ("val", "test"):
        count = sum(entry.sample.split == split for entry in entries)
        if count and split not in given:
            notes.append(
                f"no image of the {split} split is labelled: its {count} images serve for pretraining, and"
                f" another {split} split is made out of train"
            )
    for entry in entries:
        if entry.sample.split not in given and not entry.sample.labelled:
            entry = replace(entry, sample=replace(entry.sample, split="train"))
        moved.append(entry)
    return moved, notes


def _check_groups(entries: list[Entry]) -> None:
    """A group must not be in two of the splits that the source gives."""
    where: dict[str, str] = {}
    for entry in entries:
        group, split = entry.sample.group, entry.sample.split
        if group and where.setdefault(group, split) != split:
            raise InputError(
                f"group '{group}' is in two splits, {where[group]} and {split} (e.g. {entry.sample.path}):"
                " mend the split column or leave it out"
            )


def _handle_duplicates(entries: list[Entry], options: ShardOptions) -> tuple[list[Entry], Duplicates]:
    """Find identical pixels; those in two given splits are an error, or dropped, or kept."""
    found = Duplicates()
    dropped: set[int] = set()
    for positions in duplicates.identical([entry.seen.pixel_hash for entry in entries]):
        samples = [entries[position].sample for position in positions]
        paths = [sample.path for sample in samples]
        splits = {_given_split(sample) for sample in samples}
        if len({_known(entries[place]) for place in positions if entries[place].sample.labelled}) > 1:
            found.conflicting.append(paths)
        if len(splits) == 1:
            found.within.append(paths)
            continue
        found.across.append([f"{sample.path} ({_given_split(sample)})" for sample in samples])
        if options.duplicates == "drop":
            best = max(splits, key=SPLITS.index)
            dropped |= {place for place in positions if _given_split(entries[place].sample) != best}
    if found.across and options.duplicates == "error":
        some = "; ".join(" = ".join(paths[:4]) for paths in found.across[:5])
        raise InputError(
            f"{len(found.across)} images are in two splits with identical pixels (duplicates: drop or keep"
            f" would allow it): {some}"
        )
    found.dropped = sorted(entries[position].sample.path for position in dropped)
    return [entry for position, entry in enumerate(entries) if position not in dropped], found


def _known(entry: Entry) -> tuple[tuple[str, ...], str]:
    """What the source says of a sample: its labels, and the content of its annotation."""
    return entry.sample.labels, entry.measured.content if entry.measured else ""


def _given_split(sample: Sample) -> str:
    """The split the source gives; samples without one are divided together with train, as one split."""
    return sample.split or "train"


def _with_splits(entries: list[Entry], given: set[str], options: ShardOptions) -> list[Entry]:
    """Entries with a final split: missing splits are made out of train, or of all where none are given."""
    shares = missing_shares(given, options.splits)
    if len(shares) == 1:
        return entries
    divided = [entry for entry in entries if _given_split(entry.sample) == "train"]
    splits = make_splits(
        _units(divided),
        [entry.sample.labels if entry.sample.labelled else None for entry in divided],
        shares,
        seed=options.seed,
    )
    chosen = {entry.key: split for entry, split in zip(divided, splits)}
    return [
        replace(entry, sample=replace(entry.sample, split=chosen.get(entry.key, entry.sample.split)))
        for entry in entries
    ]


def _units(entries: list[Entry]) -> list[str]:
    """The name of what must stay in one split with each entry: its group, or identical pixels."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for entry in entries:
        key = f"key {entry.key}"
        links = [f"pixels {entry.seen.pixel_hash}"]
        if entry.sample.group:
            links.append(f"group {canonical(entry.sample.group)}")  # one patient in two spellings is one
        for link in links:
            one, other = sorted((root(key), root(link)))
            parent[other] = one
    return [root(f"key {entry.key}") for entry in entries]


def _check_left(classes: Sequence[str], entries: list[Entry]) -> None:
    """Every split must have a labelled sample, and every class one to train on."""
    for split in SPLITS:
        if not any(entry.sample.labelled and entry.sample.split == split for entry in entries):
            raise InputError(f"the {split} split has no labelled image")
    trained = {label for entry in entries if entry.sample.split == "train" for label in entry.sample.labels}
    for name in classes:
        if name not in trained:
            raise InputError(f"class '{name}' has no image in the train split")
