"""What a process that trains asks of its CPU and its allocator, before it makes its first tensor."""

from __future__ import annotations

import ctypes

import torch

# of glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def set_up_cpu(threads: int) -> None:
    """Set the threads of torch's operations, and avoid what makes them slow.

    Collapsing nets make denormals, and these make a CPU crawl. Memory that is freed is kept for the next
    tensor, as far as the C library is glibc: it would give a large tensor's pages back to the system, which
    clears each page anew, and a step of small nets makes and frees 90 MB of them (benchmarks/NOTES.md).
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
