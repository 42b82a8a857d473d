"""How a dataset is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shards.codec import Rules
from shards.errors import InputError
from shards.intensity import Kind, Window
from shards.sources import SPLITS

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


@dataclass(frozen=True)
class ShardOptions:
    """How a dataset is written. All but ``processes`` decides the bytes.

    Attributes:
        splits: shares that missing splits are made with; they add up to 1.
        seed: of the splits made and of the order of the samples.
        resize: longest allowed short side in pixels; larger images are scaled down.
        duplicates: what identical pixels in two splits are: an "error"; or "drop" all but those of test, else
            of val; or "keep" them.
        near_duplicates: what altered copies are (mirrored, turned, cropped a little, scaled, recompressed):
            "group" keeps them in one split where the writer makes the split, as if of one group; "drop" also
            leaves out the copies of two given splits but those of test, else of val; "warn" only tells of
            them. Unlabelled copies of images of a given val or test split are left out by "group" too.
        max_rejected: share of unreadable images above which nothing is written.
        shard_samples: most samples a tar.
        unlabelled: folders of images without labels for pretraining; relative ones are below the source's
            root (the working directory for digits).
        exclude: patterns such as ``*_mask.png``: images whose path or file name matches one are left out.
        intensity: (black, white) of all images of more than 8 bits a channel, in their own units; None: as
            :mod:`shards.intensity` finds them, and for DICOM files with a window as that says.
        windows: black and white by kind, as another dataset's index has them, in place of what is found.
        only_test: every sample goes to the test split, whatever the source says, and nothing else is asked of
            it: a set that others' models are tried on.
        processes: at most so many that read and write; None: one a CPU core. With more than 1, the calling
            script needs its `if __name__ == "__main__":`, as they begin by importing it.
    """

    splits: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    seed: int = 0
    resize: int | None = None
    duplicates: Literal["error", "drop", "keep"] = "error"
    near_duplicates: Literal["group", "drop", "warn"] = "group"
    max_rejected: float = 0.05
    shard_samples: int = 1000
    unlabelled: Sequence[str | Path] = ()
    exclude: Sequence[str] = ()
    intensity: Window | None = None
    windows: Mapping[Kind, Window] | None = None
    only_test: bool = False
    processes: int | None = 1

    def __post_init__(self) -> None:
        if set(self.splits) != set(SPLITS) or abs(sum(self.splits.values()) - 1) > 1e-6:
            raise InputError("splits must give train, val and test shares that add up to 1")
        if min(self.splits.values()) <= 0:
            raise InputError("every share in splits must be above 0")
        if self.duplicates not in ("error", "drop", "keep"):
            raise InputError(f"duplicates is '{self.duplicates}' (expected error, drop or keep)")
        if self.near_duplicates not in ("group", "drop", "warn"):
            raise InputError(f"near_duplicates is '{self.near_duplicates}' (expected group, drop or warn)")
        if not 0 <= self.max_rejected <= 1:
            raise InputError(f"max_rejected is {self.max_rejected} (expected 0 to 1)")
        for name, value in (("resize", self.resize), ("processes", self.processes)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value} (expected at least 1)")
        if self.intensity is not None and not self.intensity[0] < self.intensity[1]:
            raise InputError(f"intensity: black {self.intensity[0]} must be below white {self.intensity[1]}")
        if self.shard_samples < 1:
            raise InputError(f"shard_samples is {self.shard_samples} (expected at least 1)")

    @property
    def rules(self) -> Rules:
        """How images are decoded, but for windows that only a look at all of them tells."""
        return Rules(resize=self.resize, own_windows=self.intensity is None, windows=self.windows)
