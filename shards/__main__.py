"""Command line: ``python -m shards write SOURCE …``, ``verify …``, ``info …``."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from shards import (
    CocoSource,
    CsvSource,
    DigitPagesSource,
    DigitsSource,
    FolderSource,
    Index,
    InputError,
    MaskSource,
    ShardOptions,
    Source,
    VocSource,
    verify,
    write,
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="python -m shards", description="Write and check datasets of shards.")
    verbs = top.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("write", help="write a dataset").add_subparsers(dest="source", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("out", help="folder of the dataset")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--resize", type=int, help="longest allowed short side in pixels")
    common.add_argument("--duplicates", choices=("error", "drop", "keep"), default="error")
    common.add_argument("--near-duplicates", choices=("group", "drop", "warn"), default="group")
    common.add_argument("--max-rejected", type=float, default=0.05, help="share of unreadable images")
    common.add_argument("--shard-samples", type=int, default=1000, help="most samples a tar")
    common.add_argument("--unlabelled", nargs="+", default=[], metavar="FOLDER", help="for pretraining only")
    common.add_argument("--processes", type=int, help="default: one a CPU core")
    rooted = argparse.ArgumentParser(add_help=False)
    rooted.add_argument("root", help="folder with the images")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--classes", nargs="+", help="names and order; default: those found, sorted")
    masked = argparse.ArgumentParser(add_help=False)
    masked.add_argument("--mask-classes", nargs="+", type=named_value, metavar="NAME=VALUE")
    masked.add_argument("--mask-ignore", nargs="*", type=int, metavar="VALUE", help="values of no class")
    writing.add_parser("digits", parents=[common], help="scikit-learn's bundled digits")
    writing.add_parser("digit_pages", parents=[common], help="segmentation: pages of four of them")
    writing.add_parser("folder", parents=[rooted, named, common], help="one folder a class")
    table = writing.add_parser("csv", parents=[rooted, named, masked, common], help="one row an image")
    table.add_argument("--csv", default="labels.csv", help="below root, or absolute")
    table.add_argument("--path-column", default="path")
    table.add_argument("--label-columns", nargs="+", default=["label"], help="several: 0/1, multi-label")
    table.add_argument("--label-separator", help="between several labels in one column")
    table.add_argument("--split-column")
    table.add_argument("--group-column", help="patient, slide …: never in two splits")
    table.add_argument("--mask-column", help="paths of masks: segmentation")
    pairs = writing.add_parser(
        "masks", parents=[rooted, masked, common], help="segmentation: images and masks"
    )
    pairs.add_argument("--masks", default=MaskSource.masks, help="folder below root")
    pairs.add_argument("--mask-suffix", default="", help="after the image's name in the mask's")
    coco = writing.add_parser("coco", parents=[rooted, named, common], help="detection: a JSON file")
    voc = writing.add_parser("voc", parents=[rooted, named, common], help="detection: an XML file an image")
    for part, source, help in ((coco, CocoSource, "JSON file"), (voc, VocSource, "folder")):
        part.add_argument("--annotations", default=source.annotations, help=f"{help} below root")
    for part, default in ((pairs, MaskSource.images), (coco, CocoSource.images), (voc, VocSource.images)):
        part.add_argument("--images", default=default, help="folder below root; {split} stands for a split")
    for verb, text in (("verify", "hash every file again"), ("info", "say what a dataset holds")):
        verbs.add_parser(verb, help=text).add_argument("folder")
    return top


def source_of(args: argparse.Namespace) -> Source:
    """The source that the command line describes."""
    if args.source == "digits":
        return DigitsSource()
    if args.source == "digit_pages":
        return DigitPagesSource()
    if args.source == "folder":
        return FolderSource(args.root, classes=args.classes)
    if args.source in ("coco", "voc"):
        kind = CocoSource if args.source == "coco" else VocSource
        return kind(args.root, images=args.images, annotations=args.annotations, classes=args.classes)
    mask_classes = None if args.mask_classes is None else dict(args.mask_classes)
    if args.source == "masks":
        return MaskSource(
            args.root,
            images=args.images,
            masks=args.masks,
            mask_suffix=args.mask_suffix,
            mask_classes=mask_classes,
            mask_ignore=args.mask_ignore,
        )
    return CsvSource(
        args.root,
        csv=args.csv,
        path_column=args.path_column,
        label_columns=args.label_columns,
        label_separator=args.label_separator,
        split_column=args.split_column,
        group_column=args.group_column,
        classes=args.classes,
        mask_column=args.mask_column,
        mask_classes=mask_classes,
        mask_ignore=args.mask_ignore,
    )


def named_value(text: str) -> tuple[str, int]:
    """NAME=VALUE of a mask."""
    name, _, value = text.rpartition("=")
    return name, int(value)


def describe(index: Index) -> str:
    """A dataset in a few lines."""
    lines = [f"{index.folder}: {len(index)} samples, {index.task}, {len(index.classes)} classes"]
    for split, entry in index.meta["counts"].items():
        classes = ", ".join(f"{name} {count}" for name, count in entry["classes"].items())
        lines.append(f"  {split}: {entry['samples']} ({classes}; unlabelled {entry['unlabelled']})")
    return "\n".join(lines + [f"warning: {line}" for line in index.warnings])


def run(args: argparse.Namespace) -> int:
    """Do what was asked; the exit code."""
    if args.verb == "write":
        options = ShardOptions(
            seed=args.seed,
            resize=args.resize,
            duplicates=args.duplicates,
            near_duplicates=args.near_duplicates,
            max_rejected=args.max_rejected,
            shard_samples=args.shard_samples,
            unlabelled=args.unlabelled,
            processes=args.processes,
        )
        print(describe(write(source_of(args), args.out, options)))
    elif args.verb == "info":
        print(describe(Index.open(args.folder)))
    else:
        problems = verify(args.folder)
        print("\n".join(problems) or f"{args.folder} is sound")
        return 1 if problems else 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: well; 1: ``verify`` found problems; 2: wrong input, in one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # class names in a C locale, file names that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run(parser().parse_args(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
