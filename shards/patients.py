"""Patients that a table does not name: by the PatientID of DICOM files, and by names of unlabelled files."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from shards.annotate import Entry
from shards.names import canonical

LONGEST = 4  # words of a group's name that are looked for in a path
NAMED = 0.9  # of the images with a group must have its name at one place of their paths
FEWEST = 3  # patients that PatientIDs must tell apart: one for each split
LARGEST = 0.5  # share of the images that one PatientID may have; more, and it is no patient's ("ANONYMOUS")
Place = tuple[int, int, int]  # of words in a path: which part from its end, first word, number of words
_WORD = re.compile(r"[^\W_]+")


def tell(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Give samples the group that can be told, and leave out unlabelled images of val and test patients.

    A DICOM file's PatientID is its group where the source gives no groups; its name here is a hash. Where
    the source does, an unlabelled image belongs to the group of its PatientID, or to that which its path
    names at the place where the other images' paths name theirs.

    Returns:
        The entries that are left; what the user should know.
    """
    entries = list(entries)
    if not any(entry.sample.group for entry in entries):
        entries, notes = _by_patient_id(entries)
    else:
        entries, notes = _unlabelled(entries), []
    entries, more = _without_evaluated(entries)
    return entries, notes + more


def _by_patient_id(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    counts = Counter(entry.seen.patient for entry in entries if entry.seen.patient)
    if len(counts) < FEWEST or max(counts.values()) > LARGEST * len(entries):
        return entries, []
    splits: dict[str, set[str]] = {}
    for entry in entries:
        if entry.seen.patient and (entry.sample.labelled or entry.sample.split in ("val", "test")):
            splits.setdefault(entry.seen.patient, set()).add(entry.sample.split)
    torn = [entry for entry in entries if len(splits.get(entry.seen.patient, ())) > 1]
    if torn:
        names = {entry.seen.patient for entry in torn}
        return entries, [
            f"{len(names)} DICOM patients (PatientID) have images in several of the given splits, such as"
            f" {torn[0].sample.path}: scores on them promise too much"
        ]
    told = [
        replace(entry, sample=replace(entry.sample, group=_hashed(entry.seen.patient)))
        if entry.seen.patient
        else entry
        for entry in entries
    ]
    return told, [
        f"{sum(counts.values())} images are of {len(counts)} patients by their DICOM PatientID: those of one"
        " patient stay in one split"
    ]


def _hashed(patient: str) -> str:
    return f"patient-{hashlib.sha256(patient.encode()).hexdigest()[:12]}"


def _unlabelled(entries: list[Entry]) -> list[Entry]:
    """Unlabelled entries without a group get that of the labelled ones of the same patient."""
    patients = {
        entry.seen.patient: entry.sample.group
        for entry in entries
        if entry.seen.patient and entry.sample.group
    }
    known = [entry.sample for entry in entries if entry.sample.group]
    groups = {canonical(sample.group): sample.group for sample in known}
    places = Counter(
        place
        for sample in known
        for place, phrase in _phrases(sample.path)
        if phrase == canonical(sample.group)
    )
    place, count = places.most_common(1)[0] if places else ((0, 0, 0), 0)
    if count < NAMED * len(known):
        groups = {}
    told = []
    for entry in entries:
        if not entry.sample.labelled and not entry.sample.group:
            named = groups.get(dict(_phrases(entry.sample.path)).get(place, ""), "") if groups else ""
            group = patients.get(entry.seen.patient) or named
            entry = replace(entry, sample=replace(entry.sample, group=group))
        told.append(entry)
    return told


def _phrases(path: str) -> Iterator[tuple[Place, str]]:
    """One to four neighbouring words of each part of a path, as :func:`canonical` spells them."""
    for part, name in enumerate(reversed((path.rpartition(".")[0] or path).split("/"))):
        words = list(_WORD.finditer(name))
        for first in range(len(words)):
            for last in range(first, min(first + LONGEST, len(words))):
                yield (
                    (part, first, last - first + 1),
                    canonical(name[words[first].start() : words[last].end()]),
                )


def _without_evaluated(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Unlabelled images for pretraining whose patient is in a given val or test split are left out."""
    evaluated = {
        canonical(entry.sample.group)
        for entry in entries
        if entry.sample.group and entry.sample.split in ("val", "test")
    }
    out = {
        entry.key
        for entry in entries
        if entry.sample.group
        and not entry.sample.labelled
        and entry.sample.split not in ("val", "test")
        and canonical(entry.sample.group) in evaluated
    }
    if not out:
        return entries, []
    first = next(entry for entry in entries if entry.key in out)
    return [entry for entry in entries if entry.key not in out], [
        f"{len(out)} unlabelled images are left out: they are of patients of the val or test split, such as"
        f" {first.sample.path}"
    ]
