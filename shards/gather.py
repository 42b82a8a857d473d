"""The first pass: list all samples, decode every image, set unreadable ones apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from shards import codec, parallel
from shards.annotate import Entry, Measured, measure
from shards.errors import InputError
from shards.options import ShardOptions
from shards.sources import Listing, Sample, Source, existing_folder, unlabelled_samples

Progress = Callable[[int, int, str], None]  # done, total, what is being done


def all_samples(source: Source, options: ShardOptions) -> tuple[Listing, list[Sample]]:
    """What the source lists, and all samples by path, the extra unlabelled ones among them.

    Raises:
        InputError: whatever the source raises; two samples with one key.
    """
    extra = [existing_folder((source.base or Path()) / path) for path in options.unlabelled]
    listing = source.listing(exclude=extra)
    samples = sorted(listing.samples + unlabelled_samples(extra), key=lambda sample: sample.path)
    keys: dict[str, str] = {}
    for sample in samples:
        key = sample_key(sample.path)
        if key in keys:
            raise InputError(f"'{keys[key]}' and '{sample.path}' have one key, '{key}': rename one")
        keys[key] = sample.path
    return listing, samples


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
