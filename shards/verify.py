"""Is a dataset what its index says?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import InputError, printable
from shards.files import open_regular
from shards.index import ANNOTATION_COLUMNS, INDEX, SAMPLES, read_meta, read_samples
from shards.sources import ANNOTATIONS
from shards.tars import members

if TYPE_CHECKING:
    import pandas as pd


def verify(folder: str | Path) -> list[str]:
    """Hash every file of a dataset again and look up every sample in its tar.

    Returns:
        The problems, one line each; none if the dataset is sound.
    """
    folder = Path(folder)
    try:
        meta = read_meta(folder)
    except InputError as error:
        return [str(error)]
    problems: list[str] = []
    sound = set()
    expected = {shard["name"]: shard["sha256"] for shard in meta["shards"]} | meta["files"]
    for name, sha256 in expected.items():
        found = _sha256(folder / name)
        if found is None:
            problems.append(f"{name} is missing")
        elif found != sha256:
            problems.append(f"{name} was changed: its SHA-256 is {found[:12]}…, not {sha256[:12]}…")
        else:
            sound.add(name)
    unknown = {path.name for path in folder.glob("*.tar")} - set(expected)
    problems += [f"{name} is not in {INDEX}" for name in sorted(unknown)]
    if SAMPLES in sound:
        try:
            table = read_samples(folder / SAMPLES, meta)
        except InputError as error:
            return [*problems, str(error)]
        for shard in meta["shards"]:
            if shard["name"] in sound:
                part = table[table["shard"] == shard["name"]]
                problems += _check_places(folder / shard["name"], part, ANNOTATIONS.get(meta["task"]))
    return problems


def _check_places(path: Path, table: pd.DataFrame, annotation: str | None) -> list[str]:
    try:
        found = list(members(path))
    except (InputError, OSError) as error:
        return [printable(str(error))]
    problems = []
    places: dict[str, tuple[int, int]] = {}
    for name, offset, size in found:
        if name in places:
            problems.append(printable(f"{path.name} holds '{name}' more than once"))
        else:
            places[name] = (offset, size)
    for key, format, offset, length in zip(table["key"], table["format"], table["offset"], table["length"]):
        image, labels = places.pop(f"{key}.{format}", None), places.pop(f"{key}.json", None)
        if image != (offset, length) or labels is None:
            problems.append(f"{path.name} does not hold sample {key} where {SAMPLES} says")
    if annotation is not None:
        known = table[table["labelled"]]
        for key, *place in zip(known["key"], *(known[column] for column in ANNOTATION_COLUMNS)):
            if places.pop(f"{key}.{annotation}", None) != tuple(place):
                problems.append(f"{path.name} does not hold {key}.{annotation} where {SAMPLES} says")
    if places:
        problems.append(f"{path.name} holds {len(places)} files that {SAMPLES} does not know")
    return problems


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
