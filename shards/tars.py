"""Tar files with the same bytes for the same samples: plain USTAR, no times, no owners."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards import codec
from shards.annotate import Stored
from shards.errors import InputError
from shards.files import open_regular
from shards.sources import Sample

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One sample on its way into a shard: where it comes from, its names, and what it must still be."""

    key: str
    sample: Sample
    format: str  # suffix of the image in the tar
    original: bool  # the file's bytes are stored as they are
    sha256: str  # of the file when it was inspected
    annotation: Stored | None = None


@dataclass(frozen=True)
class Shard:
    """A written tar.

    Attributes:
        places: offset and length of each sample's image, in bytes.
        annotations: of its annotation; 0 and 0 where it has none.
    """

    name: str
    sha256: str
    bytes: int
    places: list[tuple[int, int]]
    annotations: list[tuple[int, int]]


def write_shard(path: Path, members: Sequence[Member], *, rules: codec.Rules) -> Shard:
    """Write one tar of KEY.jpg (or png, webp), an annotation and KEY.json a sample, in the order given.

    Raises:
        InputError: a file that is not what it was when it was inspected.
        OSError: the tar cannot be written.
    """
    digest = hashlib.sha256()
    position = 0
    places, annotations = [], []
    with open(path, "wb") as file:

        def put(data: bytes) -> None:
            nonlocal position
            file.write(data)
            digest.update(data)
            position += len(data)

        def put_file(name: str, data: bytes) -> tuple[int, int]:
            put(_header(name, len(data)))
            place = position, len(data)
            put(data)
            put(bytes(-len(data) % BLOCK))
            return place

        for member in members:
            places.append(put_file(f"{member.key}.{member.format}", _payload(member, rules)))
            annotations.append((0, 0))
            if member.annotation is not None:
                name = f"{member.key}.{member.annotation.suffix}"
                annotations[-1] = put_file(name, member.annotation.encode())
            put_file(f"{member.key}.json", _description(member))
        put(bytes(2 * BLOCK))
        file.flush()
        os.fsync(file.fileno())
    return Shard(path.name, digest.hexdigest(), position, places, annotations)


def read_header(block: bytes, where: str) -> tuple[str, int]:
    """Name and size of the file that a header of :func:`write_shard` announces.

    Args:
        block: 512 bytes.
        where: what errors call the tar.

    Raises:
        InputError: no header, or one of anything but a plain file: a link, a device, a sparse file, an
            extended header.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise InputError(f"{where} is damaged: {error}") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
        raise InputError(f"{where} holds '{info.name}', which is no plain file")
    return info.name, info.size


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of every file in a tar, in order.

    Raises:
        InputError: anything that :func:`write_shard` does not write.
        OSError: the tar cannot be read.
    """
    with open_regular(path) as file:
        end = os.fstat(file.fileno()).st_size
        position = 0
        while any(block := file.read(BLOCK)):
            name, size = read_header(block, path.name)
            position += BLOCK
            if size > end - position:
                raise InputError(f"{path.name} ends within '{name}', which would have {size} bytes")
            yield name, position, size
            position += size + -size % BLOCK
            file.seek(position)
        if position + 2 * BLOCK != end:
            raise InputError(f"{path.name} has {end} bytes, but its files end at {position}")


def _payload(member: Member, rules: codec.Rules) -> bytes:
    try:
        data = member.sample.read()
    except OSError as error:
        raise InputError(f"{member.sample.path} went away while it was sharded: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != member.sha256:
        raise InputError(f"{member.sample.path} changed while it was sharded")
    return data if member.original else codec.encode(data, rules=rules)


def _description(member: Member) -> bytes:
    sample = member.sample
    content = {
        "labels": list(sample.labels) if sample.labelled else None,
        "split": sample.split,
        "group": sample.group,
        "path": sample.path,
    }
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner names empty
    info.size = size
    info.mode = 0o644
    return info.tobuf(format=tarfile.USTAR_FORMAT)
