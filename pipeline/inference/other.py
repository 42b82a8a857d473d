"""Another data set as a test set for models that were trained on a first one. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shards import codec, patients
from shards.annotate import Entry
from shards.dicom import is_dicom
from shards.errors import InputError, listed, nearest
from shards.gather import matches, sample_key
from shards.index import Index
from shards.kinds import HEAD
from shards.names import canonical
from shards.sources import Listing, Sample, Source

EVERY = "every labelled image"


@dataclass
class OtherSource:
    """The labelled images of a source, of its test split where it gives one, in the classes of a training.

    Attributes:
        source: the other data set.
        name: what messages call it.
        like: the training's data set, whose classes the images get, by name.
        without: patterns of paths or file names that are left out.
        taken: after :meth:`listing`, which of its images these are, in words.
        scored: after :meth:`listing`, the classes that the other data set knows, in the training's order.
        notes: after :meth:`listing`, what the user should know.
    """

    source: Source
    name: str
    like: Index
    without: Sequence[str] = ()
    taken: str = ""
    scored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> Path | None:
        return self.source.base

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """What is to be predicted.

        Raises:
            InputError: what the source refuses; labels of another kind, a class that the models do not know,
                no labelled image.
        """
        listing = self.source.listing(exclude=exclude)
        self._check_classes(listing)
        labelled = [sample for sample in self._included(listing) if sample.labelled]
        splits = {sample.split for sample in labelled} - {""}
        if "test" in splits:
            chosen = [sample for sample in labelled if sample.split == "test"]
            self.taken = f"its test split, {len(chosen)} of {len(labelled)} labelled images"
        else:
            chosen = labelled
            given = f" (its splits are {', '.join(sorted(splits))}, none is test)" if splits else ""
            self.taken = f"{EVERY}{given}, {len(chosen)} images"
        if not chosen:
            raise InputError(f"{self.name} has no labelled image")
        self.scored = [name for name in self.like.classes if name in listing.classes]
        self.notes = self._absent(chosen)
        return replace(listing, classes=self.like.classes, samples=_of_patients(chosen))

    def _included(self, listing: Listing) -> list[Sample]:
        """The samples that no pattern leaves out."""
        samples = listing.samples
        for pattern in self.without:
            kept = [one for one in samples if not matches(one.path, pattern)]
            if len(kept) == len(samples):
                raise InputError(f"exclude: {pattern!r} matches no image of {self.name}")
            samples = kept
        return samples

    def _check_classes(self, listing: Listing) -> None:
        known = self.like.classes
        if listing.task != self.like.task:
            raise InputError(
                f"the labels of {self.name} are {listing.task}, those that the models learned"
                f" {self.like.task}"
            )
        unknown = [name for name in listing.classes if name not in known]
        if unknown:
            spelled = {canonical(name): name for name in known}
            alike = spelled.get(canonical(unknown[0]))
            missing = [name for name in known if name not in listing.classes]
            hint = f", did you mean '{alike}'?" if alike else nearest(unknown[0], missing)
            raise InputError(
                f"{self.name} has classes that the models do not know: {listed(unknown)}{hint}"
                f" (known: {listed(known)}); classes are matched by name"
            )

    def _absent(self, samples: Sequence[Sample]) -> list[str]:
        present = {label for sample in samples for label in sample.labels}
        absent = [name for name in self.like.classes if name not in present]
        if not absent:
            return []
        if self.like.task == "multilabel":
            unsaid = [name for name in absent if name not in self.scored]
            said = [name for name in absent if name in self.scored]
            lines = []
            if unsaid:
                lines.append(f"{self.name} says nothing of {listed(unsaid)}, left out of every metric")
            if said:
                lines.append(f"{self.name} has no image with {listed(said)}, left out of means over classes")
            return lines
        return [
            f"{self.name} has no image of {listed(absent)}: left out of means over classes, but wrong where"
            " predicted"
        ]


def _of_patients(samples: list[Sample]) -> list[Sample]:
    """The samples, in groups by the PatientID of DICOM files where the source gives no groups."""
    if any(sample.group for sample in samples):
        return samples
    entries = []
    for sample in samples:
        if not _is_dicom(sample):
            continue
        try:
            seen = codec.inspect(sample.read(), rules=codec.Rules())
        except (OSError, codec.Unreadable):
            continue  # the writer says so
        told = replace(sample, split="test")
        entries.append(Entry(told, seen, sample_key(sample.path), None))
    if not entries:
        return samples
    told_entries, _ = patients.tell(entries)
    groups = {entry.sample.path: entry.sample.group for entry in told_entries}
    return [replace(sample, group=groups.get(sample.path, "")) for sample in samples]


def _is_dicom(sample: Sample) -> bool:
    """Whether a file begins as a DICOM file does; one that cannot be read does not."""
    if sample.location is None:
        return False
    try:
        with sample.location.open("rb") as file:
            return is_dicom(file.read(HEAD))
    except OSError:
        return False
