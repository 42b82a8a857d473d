"""What a process that trains asks of its CPU and its allocator, before it makes its first tensor."""

from __future__ import annotations

import ctypes

import torch

# of glibc's malloc.h, and bytes
_M_TRIM_THRESHOLD, MOST_KEPT = -1, 2**28
_M_MMAP_THRESHOLD, LARGEST_KEPT = -3, 2**25  # the largest that glibc allows


def set_up_cpu(threads: int) -> None:
    """Set the threads of torch's operations, and avoid what makes them slow.

    Collapsing nets make denormals, and these make a CPU crawl. Up to 256 MB that tensors leave, of at most
    32 MB each, are kept for the next ones, where the C library is glibc: it would give them back to the
    system, which clears each page anew, and a step of small nets makes and frees 90 MB (benchmarks/NOTES.md).
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, MOST_KEPT)
