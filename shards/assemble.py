"""Between the passes: refuse leaks between splits, make the splits that are missing, put samples in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shards import duplicates, patients
from shards.annotate import Entry
from shards.duplicates import Copies, Linked, given_split
from shards.errors import InputError
from shards.gather import sample_key
from shards.names import canonical
from shards.options import ShardOptions
from shards.report import Duplicates
from shards.sources import SPLITS
from shards.splits import make_splits, missing_shares, order


@dataclass(frozen=True)
class Assembled:
    """Samples in file order with their final splits; which splits were made; the copies found.

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
    entries, told = patients.tell(entries)
    _check_groups(entries)
    pairs = duplicates.find(entries)
    entries, found = _handle_duplicates(entries, pairs, options)
    entries = _with_splits(entries, given, pairs, options)
    _check_left(classes, entries)
    entries.sort(key=lambda entry: (SPLITS.index(entry.sample.split), order(options.seed, entry.key)))
    return Assembled(entries, [split for split in SPLITS if split not in given], found, notes + told)


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


def _handle_duplicates(
    entries: list[Entry], pairs: list[Copies], options: ShardOptions
) -> tuple[list[Entry], Duplicates]:
    """Identical pixels in two given splits are an error, dropped, or kept; altered copies may be dropped."""
    found = Duplicates(pairs)
    dropped: set[str] = set()
    for positions in duplicates.identical(entries):
        samples = [entries[position].sample for position in positions]
        paths = [sample.path for sample in samples]
        splits = {given_split(sample) for sample in samples}
        if len({_known(entries[place]) for place in positions if entries[place].sample.labelled}) > 1:
            found.conflicting.append(paths)
        if len(splits) == 1:
            found.within.append(paths)
            continue
        found.across.append([f"{sample.path} ({given_split(sample)})" for sample in samples])
        if options.duplicates == "drop":
            best = max(splits, key=SPLITS.index)
            dropped |= {sample.path for sample in samples if given_split(sample) != best}
    if found.across and options.duplicates == "error":
        some = "; ".join(" = ".join(paths[:4]) for paths in found.across[:5])
        raise InputError(
            f"{len(found.across)} images are in two splits with identical pixels (duplicates: drop or keep"
            f" would allow it): {some}"
        )
    if options.near_duplicates != "warn":
        near = [pair for pair in pairs if pair.kind == "near"]
        copies = duplicates.dropped(near, unlabelled=options.near_duplicates == "group")
        found.near_dropped = sorted(copies - dropped)
    found.dropped = sorted(dropped)
    dropped.update(found.near_dropped)
    return [entry for entry in entries if entry.sample.path not in dropped], found


def _known(entry: Entry) -> tuple[tuple[str, ...], str]:
    """What the source says of a sample: its labels, and the content of its annotation."""
    return entry.sample.labels, entry.measured.content if entry.measured else ""


def _with_splits(
    entries: list[Entry], given: set[str], pairs: list[Copies], options: ShardOptions
) -> list[Entry]:
    """Entries with a final split: missing splits are made out of train, or of all where none are given."""
    shares = missing_shares(given, options.splits)
    if len(shares) == 1:
        return entries
    divided = [entry for entry in entries if given_split(entry.sample) == "train"]
    labels = [entry.sample.labels if entry.sample.labelled else None for entry in divided]
    linked = [pair for pair in pairs if pair.kind == "near" and options.near_duplicates != "warn"]
    try:
        splits = make_splits(_units(divided, linked), labels, shares, seed=options.seed)
    except InputError as error:
        hint = f" ({len(linked)} pairs are altered copies: near_duplicates: warn divides them)"
        raise InputError(f"{error}{hint if linked else ''}") from None
    chosen = {entry.key: split for entry, split in zip(divided, splits)}
    return [
        replace(entry, sample=replace(entry.sample, split=chosen.get(entry.key, entry.sample.split)))
        for entry in entries
    ]


def _units(entries: list[Entry], pairs: list[Copies]) -> list[str]:
    """The name of what must stay in one split with each entry: its group, and what shows the same."""
    linked = Linked()
    for entry in entries:
        linked.link(f"key {entry.key}", f"pixels {entry.seen.pixel_hash}")
        if entry.sample.group:  # one patient in two spellings is one
            linked.link(f"key {entry.key}", f"group {canonical(entry.sample.group)}")
    for pair in pairs:
        linked.link(f"key {sample_key(pair.first.path)}", f"key {sample_key(pair.second.path)}")
    return [linked.root(f"key {entry.key}") for entry in entries]


def _check_left(classes: Sequence[str], entries: list[Entry]) -> None:
    """Every split must have a labelled sample, and every class one to train on."""
    for split in SPLITS:
        if not any(entry.sample.labelled and entry.sample.split == split for entry in entries):
            raise InputError(f"the {split} split has no labelled image")
    trained = {label for entry in entries if entry.sample.split == "train" for label in entry.sample.labels}
    for name in classes:
        if name not in trained:
            raise InputError(f"class '{name}' has no image in the train split")
