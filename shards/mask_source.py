"""Segmentation sets: a folder of images and a folder of masks with the same names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import InputError
from shards.layout import beside, gaps, pairs, parts, path_below
from shards.masks import SUFFIXES, MaskFile, MaskValues
from shards.sources import Listing, Sample, check_classes, existing_folder


@dataclass(frozen=True)
class MaskSource:
    """Images and masks of the same relative names, such as ``images/a/1.jpg`` and ``masks/a/1.png``.

    Split folders below both (``images/train``, ``masks/train``), or ``{split}`` in both paths, give splits.
    An image without a mask is unlabelled.

    Attributes:
        root: the folder that both are below.
        images, masks: the two folders. Masks are PNG, BMP or TIFF, 8-bit grey or with a palette.
        mask_suffix: what follows the image's name in the mask's, such as ``_mask``: then ``_mask_1`` … are
            further masks of the same image, which are merged. ``.png`` stands for masks of the image's name
            with that suffix, where images have others.
        mask_classes: class → value; a class for each value that occurs where None.
        mask_ignore: values of no class; None: 255, where the others are the values 0 to K-1.
    """

    root: str | Path
    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""
    mask_classes: Mapping[str, int] | None = None
    mask_ignore: Collection[int] | None = None

    @property
    def base(self) -> Path | None:
        return Path(self.root)

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """All images; their classes are known once the masks have been read.

        Raises:
            InputError: a missing folder, no image with a mask, or names of classes that cannot be.
        """
        root = existing_folder(self.root)
        values = mask_values(self.mask_classes, self.mask_ignore)
        samples: list[Sample] = []
        left: list[str] = []
        several = 0
        ignored: Counter[str] = Counter()
        passed: Counter[str] = Counter()
        given = parts(root, self.images, self.masks, key="masks")
        for part in given:
            if part.images.resolve() == part.annotations.resolve() and not self.mask_suffix:
                raise InputError(
                    f"images and masks are one folder, {part.images}: mask_suffix must tell them apart"
                )
            found = pairs(part, SUFFIXES, exclude, ignored, passed, ending=self.mask_suffix)
            left += [path_below(root, path) for path in found.left]
            for path, masks in found.found:
                files = [MaskFile(path_below(root, mask), mask) for mask in masks]
                file = replace(files[0], more=tuple(files[1:])) if files else None
                several += len(files) > 1
                name = path_below(root, path)
                samples.append(Sample(name, path, labelled=bool(files), split=part.split, annotation=file))
        without = [sample.path for sample in samples if not sample.labelled]
        if len(without) == len(samples):
            ending = self.mask_suffix if self.mask_suffix.startswith(".") else f"{self.mask_suffix}.png"
            example = f" (for {without[0]}, the same name with {ending})" if without else ""
            raise InputError(f"no image in {root / self.images} has a mask in {root / self.masks}{example}")
        samples.sort(key=lambda sample: sample.path)
        notes = [f"{several} images have several masks, which are merged"] if several else []
        notes += gaps("mask", without, left, passed) + beside(root, self.images, given, exclude)
        return Listing("segmentation", [], samples, dict(sorted(ignored.items())), notes, values)


def mask_values(named: Mapping[str, int] | None, ignored: Collection[int] | None) -> MaskValues:
    """Which value is which class. Raises InputError."""
    check_classes(list(named or ()))
    return MaskValues(named, ignored)
