"""Random initial weights that depend on a seed alone, and leave the caller's random state as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, purpose: str = "") -> Iterator[None]:
    """Inside, torch's CPU generator starts from (seed, purpose); afterwards it is as it was.

    Two purposes with one seed draw independent numbers. Networks are built on the CPU, so the CUDA generators
    are left alone.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield
