"""Where images and labels come from: the contract of all sources, and class folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from shards.boxes import Instances
from shards.codec import SUFFIXES
from shards.errors import InputError, listed, nearest
from shards.files import open_regular, read_regular
from shards.kinds import HEAD, kind_of
from shards.masks import MaskFile, MaskValues

Task = Literal["multiclass", "multilabel", "segmentation", "detection"]
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# What storages, systems and viewers leave between a user's files.
SYSTEM_FOLDERS = frozenset(
    {"@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
    | {"RECYCLER", "@Recycle", "@Recently-Snapshot", ".ipynb_checkpoints", "__MACOSX", "Network Trash Folder"}
)
NAMED_IMAGES = SUFFIXES | {".tga"}  # which only its name tells: it is rejected, with the reason
UNLABELLED_NAMES = frozenset({"unlabelled", "unlabeled", "unlabel", "nolabel", "nolabels", "withoutlabels"})
NO_IMAGES = frozenset({".csv", ".tsv", ".txt", ".json", ".xml", ".yaml", ".md", ".py", ".zip", ".db", ".ini"})
NO_IMAGE_NAMES = frozenset({"Thumbs.db", "desktop.ini", "DICOMDIR"})
ANNOTATIONS = {"segmentation": "mask.png", "detection": "boxes.json"}  # task → suffix in a tar
SEPARATOR = "|"  # between the labels of a sample in samples.csv


@dataclass(frozen=True)
class Sample:
    """One image as a source names it.

    Attributes:
        path: unique name with forward slashes, the same on every machine: the path below the root.
        location: the file, or None where ``data`` holds the bytes.
        labels: names of its classes; none for a multi-label sample in which nothing was found. With an
            annotation the writer fills them in: what occurs in it.
        labelled: whether anything is known about its classes.
        split: train, val or test, or "" where the source does not say.
        group: what must not be in two splits (a patient), or "" for the image itself.
        data: the file's bytes, for images that are no file.
        annotation: its mask (segmentation) or objects (detection), where it is labelled.
    """

    path: str
    location: Path | None
    labels: tuple[str, ...] = ()
    labelled: bool = True
    split: str = ""
    group: str = ""
    data: bytes | None = None
    annotation: MaskFile | Instances | None = None

    def read(self) -> bytes:
        """The bytes of the image file. Raises OSError."""
        if self.data is not None:
            return self.data
        assert self.location is not None
        return read_regular(self.location)


@dataclass
class Listing:
    """All samples of a source, sorted by path.

    Attributes:
        task: multiclass (one label a sample), multilabel, segmentation or detection.
        classes: names of the classes in order; none yet where ``mask_values`` decides.
        samples: every sample, labelled or not.
        ignored: how many files were passed over, by suffix.
        notes: what the user should know, one line each.
        mask_values: for segmentation, which value is which class.
    """

    task: Task
    classes: list[str]
    samples: list[Sample]
    ignored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mask_values: MaskValues | None = None


class Source(Protocol):
    """Anything that can list its samples."""

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """All samples, but for the folders in ``exclude``."""
        ...

    @property
    def base(self) -> Path | None:
        """The folder that relative paths are below, if there is one."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """One folder a class, at any depth of files below, with or without split folders above the classes.

    Split folders may be called train, training, val, valid, validation, dev, test or testing.

    Attributes:
        root: the folder.
        classes: names and order of the classes; those found, sorted, where None.
    """

    root: str | Path
    classes: Sequence[str] | None = None

    @property
    def base(self) -> Path | None:
        return Path(self.root)

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """All images below the class folders.

        Raises:
            InputError: missing root, no class folder, a class folder without images or not among ``classes``,
                one of ``classes`` without a folder.
        """
        root = existing_folder(self.root)
        excluded = {path.resolve() for path in exclude}
        folders = _folders(root, excluded)
        split_folders = [path for path in folders if path.name.lower() in SPLIT_NAMES]
        notes: list[str] = []
        if split_folders and not _are_splits(split_folders, folders):
            names = listed(path.name for path in split_folders)
            notes.append(
                f"{names} beside other folders and without a train folder: taken for classes, not splits"
            )
            split_folders = []
        tops: list[tuple[str, Path]] = [("", root)]
        if split_folders:
            tops = _split_tops(split_folders)
            beside = [path.name for path in folders if path not in split_folders]
            if beside:
                notes.append(f"folders beside {split_folders[0].name}/ were not read: {listed(beside)}")
        samples: list[Sample] = []
        ignored: Counter[str] = Counter()
        found: set[str] = set()
        for top in dict.fromkeys([root, *(top for _, top in tops)]):
            loose = [path.name for path in sorted(top.iterdir()) if path.is_file() and is_image(path)]
            if loose:
                notes.append(
                    f"{len(loose)} images lie in no class folder and were not read, e.g. {top / loose[0]}"
                )
        for split, top in tops:
            for folder in _folders(top, excluded):
                label = text(folder.name)
                images = [path for path in walk(folder, ignored) if not below(path, excluded)]
                if not images:
                    raise InputError(f"class folder {folder} holds no image (expected {_suffixes()})")
                _check_label(label, self.classes, text(images[0].relative_to(root).as_posix()))
                found.add(label)
                for path in images:
                    name = text(path.relative_to(root).as_posix())
                    samples.append(Sample(name, path, (label,), split=split))
        if not samples:
            raise InputError(
                f"{root} has no class folders with images (expected one folder a class, {_suffixes()})"
            )
        classes = list(self.classes) if self.classes is not None else sorted(found)
        check_classes(classes)
        for name in classes:
            if name not in found:
                raise InputError(f"class '{name}' has no folder in {root} (folders: {listed(sorted(found))})")
        if self.classes is None and len(classes) > 1:
            _refuse_unlabelled(classes)
        samples.sort(key=lambda sample: sample.path)
        return Listing("multiclass", classes, samples, dict(sorted(ignored.items())), notes)


def unlabelled_samples(folders: Sequence[Path], ignored: Counter[str] | None = None) -> list[Sample]:
    """Every image below some folders, without labels, for pretraining only (train split).

    Args:
        folders: at least one image in each.
        ignored: counts the files passed over, by suffix.

    Raises:
        InputError: a folder that does not exist, holds no image, or is named twice.
    """
    samples: list[Sample] = []
    ignored = Counter() if ignored is None else ignored
    names: Counter[str] = Counter()
    seen: set[Path] = set()
    for folder in folders:
        existing_folder(folder)
        if folder.resolve() in seen:
            raise InputError(f"unlabelled folder {folder} is named twice")
        seen.add(folder.resolve())
        name = text(folder.resolve().name)
        names[name] += 1
        prefix = f"unlabelled/{name}" if names[name] == 1 else f"unlabelled/{name}~{names[name]}"
        images = walk(folder, ignored)
        if not images:
            raise InputError(f"unlabelled folder {folder} holds no image (expected {_suffixes()})")
        for path in images:
            relative = text(path.relative_to(folder).as_posix())
            samples.append(Sample(f"{prefix}/{relative}", path, labelled=False, split="train"))
    return samples


def existing_folder(path: str | Path) -> Path:
    """The path, if it is a folder. Raises InputError."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, false too where the name is too long or out of reach
        raise InputError(
            f"{path} is a file, not a folder" if os.path.exists(path) else f"folder {path} does not exist"
        )
    return path


def check_classes(classes: Sequence[str]) -> None:
    """Class names must be distinct, not empty and without the separator of samples.csv. Raises InputError."""
    for name, times in Counter(classes).items():
        if times > 1:
            raise InputError(f"class '{name}' is named twice")
        if not name or SEPARATOR in name:
            raise InputError(f"class name '{name}' is empty or holds '{SEPARATOR}'")


def object_classes(
    samples: Sequence[Sample], given: Sequence[str] | None, order: Sequence[str] = ()
) -> list[str]:
    """Classes of a detection set: those given, else those that occur, in ``order`` and then sorted.

    Raises:
        InputError: a class that is not among the given ones, one without any object, a name that cannot be.
    """
    where: dict[str, str] = {}
    for sample in samples:
        if isinstance(sample.annotation, Instances):
            for one in sample.annotation.found:
                where.setdefault(one.label, sample.annotation.where)
    if not where:
        raise InputError("no annotation holds any object")
    classes = list(given) if given is not None else [name for name in order if name in where]
    classes += [] if given is not None else sorted(set(where) - set(order))
    check_classes(classes)
    for name in sorted(set(where) - set(classes)):
        raise InputError(
            f"class '{name}' of {where[name]} is not in the list of classes{nearest(name, classes)}"
            f" (expected {listed(classes)})"
        )
    for name in classes:
        if name not in where:
            raise InputError(f"class '{name}' has no object")
    return classes


def is_image(path: Path) -> bool:
    """Whether the name says that this is an image, or, where it says nothing known, what it begins with.

    Kinds of images that are not decoded count too: they are rejected with the reason.
    """
    if path.name.startswith("."):
        return False
    if path.suffix.lower() in NAMED_IMAGES:
        return True
    if path.suffix.lower() in NO_IMAGES or path.name in NO_IMAGE_NAMES:
        return False
    try:
        with open_regular(path) as file:
            return bool(kind_of(file.read(HEAD)))
    except OSError:
        return False


def walk(folder: Path, ignored: Counter[str], wanted: Callable[[Path], bool] = is_image) -> list[Path]:
    """All images (or other files) below a folder, sorted; links are followed, hidden files passed over.

    Args:
        folder: where to begin.
        ignored: counts the files passed over, by suffix.
        wanted: whether a file counts.
    """
    return sorted(_walk(folder, ignored, wanted))


def _walk(top: Path, ignored: Counter[str], wanted: Callable[[Path], bool]) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()  # a link may lead to a folder again
    waiting = [top]  # no recursion: folders may be nested deeper than Python's stack
    while waiting:
        folder = waiting.pop()
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise InputError(f"folder {folder} cannot be read: {error.strerror}") from None
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                if entry.name in SYSTEM_FOLDERS or entry.name.startswith("__"):
                    ignored[f"{entry.name}/"] += 1
                elif not entry.name.startswith("."):
                    waiting.append(path)
            elif wanted(path):
                yield path
            else:
                ignored[path.suffix.lower() or path.name] += 1


def text(path: str) -> str:
    """A file name as UTF-8 has it, whatever the locale; bytes that are no UTF-8 as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _folders(top: Path, excluded: set[Path]) -> list[Path]:
    try:
        return sorted(
            path
            for path in top.iterdir()
            if path.is_dir()
            and not path.name.startswith((".", "__"))
            and path.name not in SYSTEM_FOLDERS
            and path.resolve() not in excluded
        )
    except OSError as error:
        raise InputError(f"folder {error.filename or top} cannot be read: {error.strerror}") from None


def below(path: Path, excluded: set[Path]) -> bool:
    """Whether a path is below one of some resolved folders."""
    return bool(excluded) and any(parent in excluded for parent in path.resolve().parents)


def _are_splits(named: Sequence[Path], folders: Sequence[Path]) -> bool:
    """Whether folders called as splits are: one of them is train's, or there are no others."""
    return len(named) == len(folders) or any(SPLIT_NAMES[path.name.lower()] == "train" for path in named)


def _split_tops(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    tops: dict[str, Path] = {}
    for folder in folders:
        split = SPLIT_NAMES[folder.name.lower()]
        if split in tops:
            raise InputError(f"folders {tops[split]} and {folder} are both the {split} split")
        tops[split] = folder
    return list(tops.items())


def _refuse_unlabelled(classes: Sequence[str]) -> None:
    """A folder whose name says that its images have no label is no class, unless ``classes`` names it."""
    for name in classes:
        if re.sub("[^a-z]", "", name.lower()) in UNLABELLED_NAMES:
            raise InputError(
                f"folder '{name}' beside the class folders would be a class: unlabelled: [{name}] takes its"
                f" images without labels; classes: [{', '.join(classes)}] takes it for a class"
            )


def _check_label(label: str, classes: Sequence[str] | None, path: str) -> None:
    if classes is not None and label not in classes:
        hint = nearest(label, classes)
        raise InputError(
            f"label '{label}' of {path} is not in the list of classes{hint} (expected {listed(classes)})"
        )


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))
