"""Folders of images, and what lies beside them: masks or XML files of the same names, a JSON file a split."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shards.errors import InputError, listed
from shards.sources import SPLIT_NAMES, below, is_image, text, walk

SPLIT = "{split}"  # stands for a split's name in a folder or a file


@dataclass(frozen=True)
class Part:
    """The images of one split (or all of them, split ""), and where their annotations are, if they are."""

    split: str
    images: Path
    annotations: Path


def safe(path: str, what: str) -> PurePosixPath:
    """A path in its shortest spelling, if it stays below the folder it is relative to. Raises InputError."""
    clean = os.path.normpath(path.replace("\\", "/")) if path else ""
    if not clean or os.path.isabs(clean) or clean.split("/")[0] == ".." or "\0" in clean:
        raise InputError(f"{what} is '{path}', expected a path below the folder of the images or the root")
    return PurePosixPath(clean)


def parts(root: Path, images: str, annotations: str, *, key: str) -> list[Part]:
    """The splits that a source gives, by ``{split}`` in its paths or by split folders below them.

    One with images is given even if it has no annotations.

    Args:
        root: the folder that both paths are below.
        images: folder of the images.
        annotations: folder or file of the annotations.
        key: what errors call ``annotations``.

    Raises:
        InputError: a path that is not there or leads elsewhere, or two names of one split.
    """
    images, annotations = str(safe(images, "images")), str(safe(annotations, key))
    if SPLIT in annotations:
        return _by_name(root, images, annotations, key)
    if SPLIT in images:
        raise InputError(f"images is '{images}', but {key} '{annotations}' has no {SPLIT}")
    if not os.path.isdir(root / images):
        raise InputError(f"images: there is no folder {root / images}")
    if not os.path.exists(root / annotations):
        raise InputError(f"{key}: there is no {root / annotations}")
    folders = {path.name: path for path in sorted((root / images).iterdir()) if path.is_dir()}
    names = [name for name in folders if name.lower() in SPLIT_NAMES]
    if not names or os.path.isfile(root / annotations):
        return [Part("", root / images, root / annotations)]
    found = [Part(SPLIT_NAMES[name.lower()], folders[name], root / annotations / name) for name in names]
    for path in sorted((root / annotations).iterdir()):
        split = SPLIT_NAMES.get(path.name.lower())
        if split and path.is_dir() and split not in {part.split for part in found}:
            raise InputError(
                f"images: there is no folder {root / images / path.name}, though there is {path}"
            )
    return _distinct(found)


def _by_name(root: Path, images: str, annotations: str, key: str) -> list[Part]:
    """A part for each name of a split under which there are annotations, or a folder of images."""
    found = [
        Part(split, root / images.replace(SPLIT, spelled), root / annotations.replace(SPLIT, spelled))
        for name, split in SPLIT_NAMES.items()
        for spelled in (name, name.capitalize(), name.upper())
        if os.path.exists(root / annotations.replace(SPLIT, spelled))
        or (SPLIT in images and os.path.isdir(root / images.replace(SPLIT, spelled)))
    ]
    annotated = _distinct([part for part in found if os.path.exists(part.annotations)])
    if not annotated:
        raise InputError(
            f"{key}: there is no {root / annotations} (for {SPLIT}, one of {listed(SPLIT_NAMES)})"
        )
    for part in annotated:
        if not os.path.isdir(part.images):
            raise InputError(f"images: there is no folder {part.images}, though there is {part.annotations}")
    return found


def _distinct(found: list[Part]) -> list[Part]:
    first: dict[str, Part] = {}
    for part in found:
        if part.split in first:
            raise InputError(
                f"{first[part.split].annotations} and {part.annotations} are both the {part.split} split"
            )
        first[part.split] = part
    return found


def beside(root: Path, images: str, found: Sequence[Part], exclude: Sequence[Path]) -> list[str]:
    """A note on images that lie beside the folders of the splits, where no part has them.

    Args:
        root, images: as for :func:`parts`.
        found: what it returned.
        exclude: folders whose images do not count.

    Raises:
        InputError: a folder that cannot be read.
    """
    images = str(safe(images, "images"))
    if any(part.images == root / images for part in found):
        return []
    excluded = {path.resolve() for path in exclude}
    taken = excluded | {path.resolve() for part in found for path in (part.images, part.annotations)}
    lost: list[Path] = []
    pattern = images if SPLIT in images else f"{images}/{SPLIT}"
    for path in sorted(root.glob(glob.escape(pattern).replace(SPLIT, "*"))):
        holds_others = any(other.is_relative_to(path.resolve()) for other in taken)
        if path.is_dir() and not holds_others and not path.name.startswith((".", "__")):
            lost += (image for image in walk(path, Counter()) if not below(image, excluded))
        elif path.is_file() and is_image(path):
            lost.append(path)
    if not lost:
        return []
    example = path_below(root, lost[0])
    return [f"{len(lost)} images lie in no split's folder and were not read, e.g. {example}"]


@dataclass(frozen=True)
class Pairs:
    """Images of one part with the files that annotate each, mostly one; and the files that annotate none."""

    found: list[tuple[Path, list[Path]]]
    left: list[Path]


def pairs(
    part: Part,
    suffixes: Sequence[str],
    exclude: Sequence[Path],
    ignored: Counter[str],
    passed: Counter[str],
    *,
    ending: str = "",
) -> Pairs:
    """Match images and annotations by their relative paths without suffix.

    Args:
        part: where both are.
        suffixes: of annotation files, lower case; of two files for one image the one whose suffix is first.
        exclude: folders whose images do not count.
        ignored: counts other files among the images, by suffix.
        passed: counts other files among the annotations, by suffix, where they have a folder of their own.
        ending: what follows the image's name in the annotation's, such as ``_mask``; then ``_mask_1``,
            ``_mask_2`` … are further ones of the same image. Or, with a dot, the suffix of annotations, such
            as ``.png``, where images have others.

    Raises:
        InputError: a folder that cannot be read.
    """
    if ending.startswith("."):
        suffixes, ending = [ending.lower()], ""
    several = re.compile(rf"(.*{re.escape(ending)})[_-]?\d+", re.S)

    def annotates(path: Path) -> bool:
        ends = path.stem.endswith(ending) or several.fullmatch(path.stem)
        return path.suffix.lower() in suffixes and bool(ends) and path.name[0] != "."

    together = part.images.resolve() == part.annotations.resolve()
    other = Counter[str]() if together else passed
    files = walk(part.annotations, other, annotates) if part.annotations.is_dir() else []
    by_name: dict[Path, Path] = {}
    for path in sorted(files, key=lambda path: suffixes.index(path.suffix.lower())):
        by_name.setdefault(path.relative_to(part.annotations).with_suffix(""), path)
    excluded = {path.resolve() for path in exclude}
    if not together:
        excluded.add(part.annotations.resolve())
    found = []
    for path in walk(part.images, ignored):
        if not below(path, excluded) and not (together and annotates(path)):
            name = path.relative_to(part.images).with_suffix("")
            one = by_name.pop(name.with_name(name.name + ending), None)
            found.append((path, [] if one is None else [one]))
    if ending:
        images = {
            path.relative_to(part.images).with_suffix("").as_posix() + ending: files for path, files in found
        }
        for name in sorted(by_name):
            numbered = several.fullmatch(name.as_posix())
            if numbered and numbered[1] in images:
                images[numbered[1]].append(by_name.pop(name))
    return Pairs(found, sorted(by_name.values()))


def path_below(root: Path, path: Path) -> str:
    """How a file is called in the dataset: its path below the root."""
    return text(path.relative_to(root).as_posix())


def gaps(
    what: str, without: Sequence[str], left: Sequence[str] = (), passed: Mapping[str, int] | None = None
) -> list[str]:
    """What the user should know of images without annotation, of annotations without image and of files among
    the annotations that are none."""
    notes = []
    if without:
        notes.append(f"{len(without)} images have no {what}, e.g. {without[0]}: they are unlabelled")
    if left:
        notes.append(f"{len(left)} {what} files belong to no image, e.g. {left[0]}")
    if passed:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(passed.items()))
        notes.append(f"files among the annotations that were not read as {what} files: {kinds}")
    return notes
