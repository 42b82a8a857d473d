"""From a source to a dataset folder."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from shards import codec, gather, intensity, parallel, report
from shards.annotate import Entry, settle
from shards.assemble import assemble
from shards.gather import Progress
from shards.index import (
    COPIES,
    FORMAT_VERSION,
    INDEX,
    REJECTED,
    REPORT,
    SAMPLES,
    Index,
    columns_of,
    dump_json,
)
from shards.options import ShardOptions
from shards.publish import partial_folder, publish
from shards.sources import ANNOTATIONS, SEPARATOR, SPLITS, Sample, Source
from shards.tars import Member, Shard, write_shard


def write(
    source: Source,
    folder: str | Path,
    options: ShardOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Index:
    """Write a dataset: tars, ``index.json``, ``data_report.json`` and three tables.

    The same input gives the same bytes, whatever the number of processes. Everything is written to a
    hidden folder beside ``folder`` and moved at the end, ``index.json`` last; a dataset that was there is
    replaced, other files in the folder stay.

    Args:
        source: what to read: FolderSource, CsvSource, MaskSource, CocoSource, VocSource or DigitsSource.
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
    listing, samples = gather.all_samples(source, options)
    with partial_folder(folder) as partial, parallel.Pool(options.processes, len(samples)) as pool:
        readable, rejected = gather.inspect(samples, options, pool, progress)
        gather.check_readable(readable, rejected, len(samples), options)
        listing, readable = settle(listing, readable)
        if not options.only_test:
            gather.check_present(listing.classes, readable)
        assembled = assemble(listing.classes, readable, options)
        entries = assembled.entries
        levels = [entry.seen.levels for entry in entries if entry.seen.levels is not None]
        windows = intensity.windows(levels, options.intensity) | dict(options.windows or {})
        rules = replace(options.rules, windows=windows)
        written = _write_shards(entries, partial, options, rules, pool, progress)
        facts = report.Facts(
            listing=replace(listing, notes=listing.notes + assembled.notes),
            samples=[entry.sample for entry in entries],
            seen=[entry.seen for entry in entries],
            rejected=rejected,
            measured=[entry.measured for entry in entries],
            splits_made=assembled.splits_made,
            duplicates=assembled.found,
            windows=windows,
        )
        copies = report.copies_table(facts)
        _write_tables(partial, entries, written, facts, copies)
        (partial / REPORT).write_bytes(dump_json(report.make(facts, copies)))
        meta = _meta(facts, samples, written, partial, options)
        (partial / INDEX).write_bytes(dump_json(meta))
        publish(partial, folder)
    return Index.open(folder)


def _write_shards(
    entries: list[Entry],
    partial: Path,
    options: ShardOptions,
    rules: codec.Rules,
    pool: parallel.Pool,
    progress: Progress,
) -> list[Shard]:
    """Tars of nearly equal numbers of samples, split by split."""
    jobs = []
    for split in SPLITS:
        members = [
            Member(
                *(entry.key, entry.sample, entry.seen.format, entry.seen.original, entry.seen.sha256),
                annotation=entry.stored,
            )
            for entry in entries
            if entry.sample.split == split
        ]
        number = -(-len(members) // options.shard_samples)
        bounds = [len(members) * place // number for place in range(number + 1)] if number else [0]
        for place, (start, stop) in enumerate(pairwise(bounds)):
            jobs.append((partial / f"{split}-{place:06d}.tar", members[start:stop], rules))
    written: list[Shard] = []
    done = 0
    for shard in pool.map(_write_job, jobs):
        written.append(shard)
        done += len(shard.places)
        progress(done, len(entries), "writing shards")
    return written


def _write_job(path: Path, members: list[Member], rules: codec.Rules) -> Shard:
    return write_shard(path, members, rules=rules)


def _write_tables(
    partial: Path,
    entries: list[Entry],
    written: list[Shard],
    facts: report.Facts,
    copies: list[dict[str, Any]],
) -> None:
    task = facts.listing.task
    places = [(shard.name, *place) for shard in written for place in shard.places]
    annotations = [place if task in ANNOTATIONS else () for shard in written for place in shard.annotations]
    with open(partial / SAMPLES, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns_of(task))
        for entry, (name, offset, length), annotation in zip(entries, places, annotations):
            sample, seen = entry.sample, entry.seen
            labels, labelled = SEPARATOR.join(sample.labels), int(sample.labelled)
            rows.writerow(
                [
                    *(entry.key, name, offset, length, seen.format, labels, labelled, sample.split),
                    *(sample.group, seen.width, seen.height, seen.pixel_hash, sample.path, *annotation),
                ]
            )
    with open(partial / REJECTED, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "reason"])
        rows.writerows(facts.rejected)
    with open(partial / COPIES, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, report.COPIES_COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(copies)


def _meta(
    facts: report.Facts, samples: list[Sample], written: list[Shard], partial: Path, options: ShardOptions
) -> dict[str, Any]:
    """The content of ``index.json``."""
    shards = [
        {
            "name": shard.name,
            "split": shard.name.rsplit("-", 1)[0],
            "samples": len(shard.places),
            "bytes": shard.bytes,
            "sha256": shard.sha256,
        }
        for shard in written
    ]
    tables = (SAMPLES, REJECTED, COPIES, REPORT)
    known = [one for one in facts.measured if one]
    outlined = all(one.outlined == sum(one.counts.values()) for one in known)
    decided = asdict(options)
    del decided["processes"]  # changes nothing
    if not options.exclude:
        del decided["exclude"]
    if not options.only_test:
        del decided["only_test"]
    del decided["windows"]  # they are the index's `intensity`
    del decided["unlabelled"]  # paths of this machine; the images count in the fingerprint
    return {
        "format_version": FORMAT_VERSION,
        "task": facts.listing.task,
        "classes": facts.listing.classes,
        **({"outlined": outlined} if facts.listing.task == "detection" else {}),
        "samples": len(facts.samples),
        "counts": report.counts(facts.listing.classes, facts.samples),
        "intensity": {kind: list(window) for kind, window in sorted(facts.windows.items())},
        "shards": shards,
        "files": {name: hashlib.sha256((partial / name).read_bytes()).hexdigest() for name in tables},
        "source": {
            "samples": len(samples),
            "rejected": len(facts.rejected),
            "fingerprint": _source_fingerprint(samples, facts),
        },
        "options": decided,
    }


def _source_fingerprint(samples: list[Sample], facts: report.Facts) -> str:
    """SHA-256 over every sample's path, labels, split and group, and the content of the files in use.

    With annotations: labels as the source lists them (none), and the content of the annotations.
    """
    content = {sample.path: [one.sha256] for sample, one in zip(facts.samples, facts.seen)}
    for sample, measured in zip(facts.samples, facts.measured):
        content[sample.path] += [measured.content] if measured else []
    digest = hashlib.sha256()
    for sample in samples:
        line = [sample.path, sample.labels, sample.labelled, sample.split, sample.group]
        digest.update(json.dumps([*line, *content.get(sample.path, [None])]).encode())
    return digest.hexdigest()
