"""What an evaluation protocol gets and gives: the contract between the fine-tune stage and the protocols.

A protocol is a function ``run(problem) -> Prediction``. It may look at the validation split as often as it
likes and predicts the test split once, at its end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.nets.export import Classifier
from pipeline.specs import FinetuneSettings
from shards import Index

Tick = Callable[[float, float, str], None]
SaveModel = Callable[[Path, Classifier, dict[str, Any]], None]  # folder, what the outputs mean, provenance


@dataclass(frozen=True)
class Split:
    """Labelled samples of one split.

    Attributes:
        rows: int64 (N,), row numbers of the index, ascending.
        targets: int64 (N,) or, for multi-label, float32 (N, K), on the CPU.
    """

    rows: np.ndarray
    targets: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Problem:
    """One backbone, one draw of labels, and how to learn from them.

    Attributes:
        backbone: folder of the exported net.
        seed: decides every draw (new classifier, order, augmentation, dropout).
        tick: ``tick(done, total, text)`` reports progress; it raises to stop the protocol between two steps.
    """

    backbone: Path
    index: Index
    train: Split
    val: Split
    test: Split
    settings: FinetuneSettings
    seed: int
    device: torch.device
    tick: Tick = lambda done, total, text: None

    @property
    def num_classes(self) -> int:
        return len(self.index.classes)

    @property
    def multilabel(self) -> bool:
        return self.index.task == "multilabel"

    def autocast(self) -> torch.autocast:
        """bf16 autocast where the settings ask for it; ``auto`` means on CUDA only."""
        precision = self.settings.precision
        wanted = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)

    def probabilities(self, logits: Tensor) -> np.ndarray:
        """Logits (N, K) to float32 (N, K): softmax over classes, or a sigmoid each for multi-label."""
        logits = logits.double()
        probabilities = logits.sigmoid() if self.multilabel else logits.softmax(dim=1)
        return probabilities.float().cpu().numpy()


@dataclass(frozen=True)
class Prediction:
    """What a protocol found.

    Attributes:
        val, test: metrics of the two splits.
        arrays: of the test split, in the order of its rows, what intervals are computed from; see
            docs/formats.md.
        best_epoch: epochs of training behind the chosen weights; 0 where nothing is trained by epochs.
        chosen: what else validation picked, such as the weight decay.
        log: one JSON object a line of ``log.jsonl``.
        images_seen: images that passed through the backbone in training.
        thresholds: a score a class above which it is taken to be there, by validation
            (:mod:`pipeline.evaluate.thresholds`); none where the most probable class is the answer.
        save: writes the model behind the predictions into a folder; None where there is none to keep.
    """

    val: dict[str, float]
    test: dict[str, float]
    arrays: dict[str, np.ndarray]
    best_epoch: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    images_seen: int = 0
    thresholds: list[float] = field(default_factory=list)
    save: SaveModel | None = None


Protocol = Callable[[Problem], Prediction]
Classify = Callable[[Problem, Split], np.ndarray]  # of an index, rows of it → probabilities float32 (N, K)


@contextlib.contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block and use deterministic kernels on CUDA; the caller's state stays."""
    cuda = device.type == "cuda"
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            torch.random.fork_rng(devices=[device] if cuda else []),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        if cuda:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
