"""From a source to a dataset folder: inspect every image, make splits, refuse leaks, write tars and index."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from shards import codec, duplicates, parallel, report
from shards.errors import InputError
from shards.index import (
    COLUMNS,
    FORMAT_VERSION,
    INDEX,
    REJECTED,
    REPORT,
    SAMPLES,
    Index,
    dump_json,
)
from shards.sources import SEPARATOR, SPLITS, Listing, Sample, Source, unlabelled_samples
from shards.splits import make_splits, missing_shares, order
from shards.tars import Member, Shard, write_shard

Progress = Callable[[int, int, str], None]  # done, total, what is being done
SHARE_SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}


@dataclass(frozen=True)
class ShardOptions:
    """How a dataset is written. All but ``processes`` decides the bytes.

    Attributes:
        splits: shares that missing splits are made with; they add up to 1.
        seed: of the splits made and of the order of the samples.
        resize: longest allowed short side in pixels; larger images are scaled down.
        duplicates: what identical pixels in two splits are: an "error"; or "drop" all but those of test, else
            of val; or "keep" them.
        max_rejected: share of unreadable images above which nothing is written.
        shard_samples: most samples a tar.
        unlabelled: folders of images without labels for pretraining; relative ones are below the source's
            root, or else the working directory.
        processes: reading and writing processes; None: one a CPU core of this process.
    """

    splits: dict[str, float] = field(default_factory=lambda: dict(SHARE_SPLITS))
    seed: int = 0
    resize: int | None = None
    duplicates: Literal["error", "drop", "keep"] = "error"
    max_rejected: float = 0.05
    shard_samples: int = 1000
    unlabelled: Sequence[str | Path] = ()
    processes: int | None = None

    def __post_init__(self) -> None:
        if set(self.splits) != set(SPLITS) or abs(sum(self.splits.values()) - 1) > 1e-6:
            raise InputError("splits must give train, val and test shares that add up to 1")
        if min(self.splits.values()) <= 0:
            raise InputError("every share in splits must be above 0")
        if self.duplicates not in ("error", "drop", "keep"):
            raise InputError(f"duplicates is '{self.duplicates}' (expected error, drop or keep)")
        if not 0 <= self.max_rejected <= 1:
            raise InputError(f"max_rejected is {self.max_rejected} (expected 0 to 1)")
        for name, value in (("resize", self.resize), ("processes", self.processes)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value} (expected at least 1)")
        if self.shard_samples < 1:
            raise InputError(f"shard_samples is {self.shard_samples} (expected at least 1)")


@dataclass
class Entry:
    """A readable sample on its way: ``sample.split`` is final once splits are made."""

    sample: Sample
    seen: codec.Inspection
    key: str


def write(
    source: Source,
    folder: str | Path,
    options: ShardOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Index:
    """Write a dataset: tars, ``samples.csv``, ``index.json``, ``rejected.csv``, ``data_report.json``.

    The same input gives the same bytes, whatever the number of processes. Everything is written to a
    hidden folder beside ``folder`` and moved at the end, ``index.json`` last; a dataset that was there is
    replaced, other files in the folder stay.

    Args:
        source: what to read: FolderSource, CsvSource or DigitsSource.
        folder: where to write.
        options: how; the defaults where None.
        progress: called now and then with what is done, the total, and a word.

    Returns:
        The open dataset.

    Raises:
        InputError: anything wrong with the input, or the folder cannot be written. Nothing is left behind.
    """
    options = options or ShardOptions()
    progress = progress or (lambda done, total, text: None)
    folder = Path(folder)
    listing, samples = _all_samples(source, options)
    with parallel.Pool(options.processes, len(samples)) as pool:
        entries, rejected = _inspect(samples, options, pool, progress)
        _check_readable(listing, entries, rejected, len(samples), options)
        given = {entry.sample.split for entry in entries if entry.sample.labelled}
        _check_groups(entries)
        entries, found = _handle_duplicates(entries, options)
        entries = _with_splits(entries, given, options)
        _check_classes(listing, entries)
        entries.sort(key=lambda entry: (SPLITS.index(entry.sample.split), order(options.seed, entry.key)))
        with _partial(folder) as partial:
            written = _write_shards(entries, partial, options, pool, progress)
            _write_tables(partial, entries, written, rejected)
            facts = report.Facts(
                listing=listing,
                samples=[entry.sample for entry in entries],
                seen=[entry.seen for entry in entries],
                rejected=rejected,
                splits_made=[split for split in SPLITS if split not in given],
                duplicates=found,
            )
            (partial / REPORT).write_bytes(dump_json(report.make(facts)))
            meta = _meta(listing, entries, written, samples, rejected, partial, options)
            (partial / INDEX).write_bytes(dump_json(meta))
            _publish(partial, folder)
    return Index.open(folder)


def _all_samples(source: Source, options: ShardOptions) -> tuple[Listing, list[Sample]]:
    extra = [_below_base(Path(path), source.base) for path in options.unlabelled]
    listing = source.listing(exclude=extra)
    samples = sorted(listing.samples + unlabelled_samples(extra), key=lambda sample: sample.path)
    keys: dict[str, str] = {}
    for sample in samples:
        key = sample_key(sample.path)
        if key in keys:
            raise InputError(f"'{keys[key]}' and '{sample.path}' have one key, '{key}': rename one")
        keys[key] = sample.path
    return listing, samples


def _below_base(path: Path, base: Path | None) -> Path:
    return base / path if base is not None and (base / path).is_dir() else path


def sample_key(path: str) -> str:
    """The key of a sample in the tars: its path in safe characters, and 8 hex digits of its SHA-256.

    Keys hold no dot, as webdataset ends a key there.
    """
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", path.rsplit(".", 1)[0] if "." in path.rsplit("/", 1)[-1] else path)
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    return f"{stem[-60:].strip('_')}-{digest}".lstrip("-")


def _inspect(
    samples: list[Sample], options: ShardOptions, pool: parallel.Pool, progress: Progress
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Readable samples, and (path, reason) of the others."""
    entries: list[Entry] = []
    rejected: list[tuple[str, str]] = []
    chunks = [samples[start : start + parallel.CHUNK] for start in range(0, len(samples), parallel.CHUNK)]
    for seen in pool.map(_inspect_chunk, [(chunk, options.resize) for chunk in chunks]):
        for result in seen:
            sample = samples[len(entries) + len(rejected)]
            if isinstance(result, str):
                rejected.append((sample.path, result))
            else:
                entries.append(Entry(sample, result, sample_key(sample.path)))
        progress(len(entries) + len(rejected), len(samples), "reading images")
    return entries, rejected


def _inspect_chunk(samples: list[Sample], resize: int | None) -> list[codec.Inspection | str]:
    """Runs in a worker: each file's measures, or the reason why it cannot be read."""
    results: list[codec.Inspection | str] = []
    for sample in samples:
        try:
            results.append(codec.inspect(sample.read(), resize=resize))
        except FileNotFoundError:
            results.append("no such file")
        except OSError as error:
            results.append(error.strerror or str(error))
        except codec.Unreadable as error:
            results.append(str(error))
    return results


def _check_readable(
    listing: Listing, entries: list[Entry], rejected: list[tuple[str, str]], total: int, options: ShardOptions
) -> None:
    some = "; ".join(f"{path}: {reason}" for path, reason in rejected[:3])
    if not entries:
        raise InputError(f"no readable image among {total} ({some})")
    if len(rejected) > options.max_rejected * total:
        raise InputError(
            f"{len(rejected)} of {total} images are unreadable, more than the share {options.max_rejected} of"
            f" max_rejected ({some})"
        )
    present = {label for entry in entries for label in entry.sample.labels}
    for name in listing.classes:
        if name not in present:
            raise InputError(f"class '{name}' has no readable image")


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


def _handle_duplicates(entries: list[Entry], options: ShardOptions) -> tuple[list[Entry], report.Duplicates]:
    """Find identical pixels; those in two given splits are an error, or dropped, or kept."""
    found = report.Duplicates()
    dropped: set[int] = set()
    for positions in duplicates.identical([entry.seen.pixel_hash for entry in entries]):
        samples = [entries[position].sample for position in positions]
        paths = [sample.path for sample in samples]
        splits = {sample.split for sample in samples}
        if len({sample.labels for sample in samples if sample.labelled}) > 1:
            found.conflicting.append(paths)
        if len(splits) == 1:
            found.within.append(paths)
            continue
        found.across.append([f"{sample.path} ({sample.split or 'no split'})" for sample in samples])
        if options.duplicates == "drop":
            best = max(splits, key=lambda split: ("", "train", "val", "test").index(split))
            dropped |= {position for position in positions if entries[position].sample.split != best}
    if found.across and options.duplicates == "error":
        some = "; ".join(" = ".join(paths[:4]) for paths in found.across[:5])
        raise InputError(
            f"{len(found.across)} images are in two splits with identical pixels (duplicates: drop or keep"
            f" would allow it): {some}"
        )
    found.dropped = sorted(entries[position].sample.path for position in dropped)
    return [entry for position, entry in enumerate(entries) if position not in dropped], found


def _with_splits(entries: list[Entry], given: set[str], options: ShardOptions) -> list[Entry]:
    """Entries with a final split: missing splits are made out of train, or of all where none are given."""
    shares = missing_shares(given, options.splits)
    if len(shares) == 1 and "" not in given:
        return entries
    divided = [entry for entry in entries if entry.sample.split in ("", "train")]
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
        links = [f"pixels {entry.seen.pixel_hash}"] + (
            [f"group {entry.sample.group}"] if entry.sample.group else []
        )
        for link in links:
            one, other = sorted((root(key), root(link)))
            parent[other] = one
    return [root(f"key {entry.key}") for entry in entries]


def _check_classes(listing: Listing, entries: list[Entry]) -> None:
    """Every class must be left with a sample to train on once duplicates are dropped."""
    trained = {label for entry in entries if entry.sample.split == "train" for label in entry.sample.labels}
    for name in listing.classes:
        if name not in trained:
            raise InputError(f"class '{name}' has no image in the train split")


def _write_shards(
    entries: list[Entry], partial: Path, options: ShardOptions, pool: parallel.Pool, progress: Progress
) -> list[Shard]:
    """Tars of nearly equal numbers of samples, split by split."""
    jobs = []
    for split in SPLITS:
        members = [
            Member(entry.key, entry.sample, entry.seen.format, entry.seen.original, entry.seen.sha256)
            for entry in entries
            if entry.sample.split == split
        ]
        number = -(-len(members) // options.shard_samples)
        bounds = [len(members) * place // number for place in range(number + 1)] if number else [0]
        for place, (start, stop) in enumerate(pairwise(bounds)):
            jobs.append((partial / f"{split}-{place:06d}.tar", members[start:stop], options.resize))
    written: list[Shard] = []
    done = 0
    for shard in pool.map(_write_job, jobs):
        written.append(shard)
        done += len(shard.places)
        progress(done, len(entries), "writing shards")
    return written


def _write_job(path: Path, members: list[Member], resize: int | None) -> Shard:
    return write_shard(path, members, resize=resize)


def _write_tables(
    partial: Path, entries: list[Entry], written: list[Shard], rejected: list[tuple[str, str]]
) -> None:
    places = [(shard.name, *place) for shard in written for place in shard.places]
    with open(partial / SAMPLES, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for entry, (name, offset, length) in zip(entries, places):
            sample, seen = entry.sample, entry.seen
            labels, labelled = SEPARATOR.join(sample.labels), int(sample.labelled)
            rows.writerow(
                [
                    *(entry.key, name, offset, length, seen.format, labels, labelled, sample.split),
                    *(sample.group, seen.width, seen.height, seen.pixel_hash, sample.path),
                ]
            )
    with open(partial / REJECTED, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "reason"])
        rows.writerows(rejected)


def _meta(
    listing: Listing,
    entries: list[Entry],
    written: list[Shard],
    samples: list[Sample],
    rejected: list[tuple[str, str]],
    partial: Path,
    options: ShardOptions,
) -> dict[str, Any]:
    peak = max(entry.seen.peak16 for entry in entries)
    return {
        "format_version": FORMAT_VERSION,
        "task": listing.task,
        "classes": listing.classes,
        "samples": len(entries),
        "counts": report.counts(listing.classes, [entry.sample for entry in entries]),
        "grey16_max": 2 ** max(8, peak.bit_length()) - 1,
        "shards": [
            {
                "name": shard.name,
                "split": shard.name.rsplit("-", 1)[0],
                "samples": len(shard.places),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
            }
            for shard in written
        ],
        "files": {
            name: hashlib.sha256((partial / name).read_bytes()).hexdigest()
            for name in (SAMPLES, REJECTED, REPORT)
        },
        "source": {
            "samples": len(samples),
            "rejected": len(rejected),
            "fingerprint": _source_fingerprint(samples, entries),
        },
        "options": {
            "splits": options.splits,
            "seed": options.seed,
            "resize": options.resize,
            "duplicates": options.duplicates,
            "shard_samples": options.shard_samples,
        },
    }


def _source_fingerprint(samples: list[Sample], entries: list[Entry]) -> str:
    """SHA-256 over every sample's path, labels, group and (where readable and kept) file content."""
    content = {entry.sample.path: entry.seen.sha256 for entry in entries}
    digest = hashlib.sha256()
    for sample in samples:
        line = [
            sample.path,
            sample.labels,
            sample.labelled,
            sample.split,
            sample.group,
            content.get(sample.path),
        ]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that is gone at the end; an OSError becomes an InputError."""
    me = f"{socket.gethostname()}-{os.getpid()}"
    partial = folder.parent / f".{folder.name}.{me}.partial"
    existed = folder.is_dir()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        partial.mkdir()
        yield partial
    except OSError as error:
        raise InputError(f"cannot write dataset {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed and folder.is_dir() and not (folder / INDEX).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Remove what a killed writer on this host left of this dataset."""
    for left in folder.parent.glob(f".{folder.name}.{socket.gethostname()}-*.partial"):
        number = left.name.rsplit("-", 1)[1].removesuffix(".partial")
        if number.isdigit() and (int(number) == os.getpid() or not Path(f"/proc/{number}").exists()):
            shutil.rmtree(left, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    """Move the finished files to ``folder``, so that an index.json there always has its dataset beside it."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    (folder / INDEX).unlink(missing_ok=True)
    names = sorted(path.name for path in partial.iterdir())
    for old in folder.glob("*.tar"):
        if re.fullmatch(r"(train|val|test)-\d{6}\.tar", old.name) and old.name not in names:
            old.unlink()
    names.remove(INDEX)
    for name in [*names, INDEX]:
        os.replace(partial / name, folder / name)
