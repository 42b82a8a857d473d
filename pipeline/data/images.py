"""Images as square uint8 tensors: decoded once and kept where they fit, or decoded ahead of their use.

Small sets are decoded once, in threads (Pillow and torch release the interpreter's lock), and kept on the
GPU or in memory, so that no step waits for a JPEG. Larger ones are decoded on demand, the coming batches
while the present one is used, or kept on disk (:mod:`pipeline.data.disk_cache`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from pipeline.data.disk_cache import DiskCache
from pipeline.data.squares import BLACK, PIXELS, Fill, Fit, square, square_mask
from shards import Decoded

if TYPE_CHECKING:
    from shards import Index

Positions = torch.Tensor | np.ndarray | Sequence[int]
Loader = Callable[[], Decoded]
Job = tuple[torch.Tensor, list[Future]]
GPU_SHARE = 0.25  # of the free GPU memory that a cache may take
RAM_SHARE = 0.4  # of the free memory of the node, over all of its ranks
AHEAD = 3  # batches decoded before they are asked for
CHUNK = 16  # images a thread decodes at a time


class ImageSet:
    """Some rows of a shard folder, as a sequence of images.

    Args:
        index: the shard folder.
        rows: (N,) row numbers into ``index.samples``.
        image_size: side of the squares in pixels.
        fit: how other shapes become square.
        fill: colour of the border that ``pad`` adds.
        cache: ``gpu`` (memory, where there is no GPU), ``ram``, ``none``; ``auto``: the first that fits;
            ``disk``: the node's, shared by its processes and kept for later ones.
        device: where batches are wanted.
        workers: threads that decode; 0: as many as torch computes with.
        masks: add each image's mask as a fourth channel.
        ranks_on_node: processes that share the node's memory, each with its own cache.
    """

    def __init__(
        self,
        index: Index,
        rows: np.ndarray,
        *,
        image_size: int,
        fit: Fit = "squash",
        fill: Fill = BLACK,
        cache: Literal["auto", "gpu", "ram", "disk", "none"] = "auto",
        device: torch.device | str = "cpu",
        workers: int = 0,
        masks: bool = False,
        ranks_on_node: int = 1,
    ) -> None:
        self.index = index
        self.rows = np.asarray(rows, dtype=np.int64)
        self.image_size = image_size
        self.fit: Fit = fit
        self.fill = fill
        self.masks = masks
        self.device = torch.device(device)
        self.cache = self._choose_cache(cache, ranks_on_node)
        self._pool = ThreadPoolExecutor(workers or torch.get_num_threads(), thread_name_prefix="decode")
        self._cached: torch.Tensor | None = None
        self._on_disk: DiskCache | None = None
        if self.cache == "disk":
            self._on_disk = self._open_on_disk()
            self._on_disk.fill(self.rows, self._decode)
        elif self.cache != "none":
            everything = self._decode(self.rows)
            self._cached = everything.to(self.device) if self.cache == "gpu" else everything
            self._pool.shutdown()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def channels(self) -> int:
        return 4 if self.masks else 3

    def batch(self, positions: Positions) -> torch.Tensor:
        """(B, 3, S, S) uint8 on the device, by positions in ``rows``; with masks (B, 4, S, S)."""
        where = torch.as_tensor(positions, dtype=torch.int64)
        if self._cached is None:
            return self._to_device(_finished(self._read(where)))
        if self.cache == "gpu":
            return self._cached.index_select(0, where.to(self.device, non_blocking=True))
        return self._to_device(self._cached.index_select(0, where))

    def batches(self, orders: Iterable[Positions]) -> Iterator[torch.Tensor]:
        """One batch for each set of positions; where nothing is cached, the coming ones are decoded ahead."""
        if self._cached is not None:
            return map(self.batch, orders)
        return self._ahead(map(self._read, orders))

    def decoded(self, batches: Iterable[Sequence[Loader]]) -> Iterator[torch.Tensor]:
        """Batches of images from anywhere, the coming ones decoded by threads while the present one is used.

        Only for a set without a cache. Loaders give images in mode RGB, with masks in RGBA.
        """
        return self._ahead(map(self._submit, batches))

    def _ahead(self, jobs: Iterable[Job]) -> Iterator[torch.Tensor]:
        pending: deque[Job] = deque()
        for job in jobs:
            pending.append(job)
            if len(pending) > AHEAD:
                yield self._to_device(_finished(pending.popleft()))
        while pending:
            yield self._to_device(_finished(pending.popleft()))

    def _open_on_disk(self) -> DiskCache:
        kind = {"shards": self.index.fingerprint, "fit": self.fit, "pixels": PIXELS}
        if self.fit == "pad":
            kind["fill"] = self.fill
        shape = (self.channels, self.image_size, self.image_size)
        return DiskCache(kind, rows=len(self.index), shape=shape)

    def _read(self, positions: Positions) -> Job:
        """Have the threads read from disk, or decode, what lies at these positions."""
        rows = self.rows[np.asarray(positions)]
        if self._on_disk is None:
            return self._submit(self._loaders(rows))
        pixels = self._on_disk.pixels

        def read(room: np.ndarray, part: slice) -> None:
            np.take(pixels, rows[part], axis=0, out=room, mode="clip")  # other modes go by way of a copy

        return self._in_parts(len(rows), read)

    def _loaders(self, rows: np.ndarray) -> list[Loader]:
        if self.masks:
            return [partial(self._decode_with_mask, row) for row in rows.tolist()]
        return [partial(self.index.decode_small, row, at_least=self.image_size) for row in rows.tolist()]

    def _decode_with_mask(self, row: int) -> Decoded:
        """An image whose alpha channel is its mask."""
        image, mask = self.index.decode(row), Image.fromarray(self.index.mask(row))
        return Decoded(Image.merge("RGBA", (*image.split(), mask)), *image.size)

    def _square(self, decoded: Decoded) -> np.ndarray:
        """(3, S, S), with masks (4, S, S)."""
        image, width, height = decoded
        if not self.masks:
            return square(image, self.image_size, self.fit, width=width, height=height, fill=self.fill)
        *colours, mask = image.split()
        pixels = square(Image.merge("RGB", colours), self.image_size, self.fit, fill=self.fill)
        return np.concatenate([pixels, square_mask(np.asarray(mask), self.image_size, self.fit)[None]])

    def _decode(self, rows: np.ndarray) -> torch.Tensor:
        return _finished(self._submit(self._loaders(rows)))

    def _submit(self, loaders: Sequence[Loader]) -> Job:
        """Have the threads decode images."""

        def decode(room: np.ndarray, part: slice) -> None:
            for place, loader in zip(room, loaders[part], strict=True):
                place[:] = self._square(loader())

        return self._in_parts(len(loaders), decode)

    def _in_parts(self, count: int, fill: Callable[[np.ndarray, slice], None]) -> Job:
        """Have the threads fill a (B, 3, S, S) tensor, with masks (B, 4, S, S), some images at a time.

        Args:
            count: B.
            fill: writes into the room for some images; the slice says which.
        """
        images = torch.empty((count, self.channels, self.image_size, self.image_size), dtype=torch.uint8)
        room = images.numpy()
        parts = [slice(first, first + CHUNK) for first in range(0, count, CHUNK)]
        return images, [self._pool.submit(fill, room[part], part) for part in parts]

    def _to_device(self, images: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return images
        return images.pin_memory().to(self.device, non_blocking=True)

    def _choose_cache(self, cache: str, ranks_on_node: int) -> str:
        wanted = len(self.rows) * self.channels * self.image_size**2
        on_gpu = self.device.type == "cuda"
        if cache == "gpu":
            return "gpu" if on_gpu else "ram"
        if cache != "auto":
            return cache
        if on_gpu and wanted <= GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return "gpu"
        return "ram" if wanted * ranks_on_node <= RAM_SHARE * available_memory() else "none"


def _finished(job: Job) -> torch.Tensor:
    images, parts = job
    for part in parts:
        part.result()
    return images


def available_memory() -> int:
    """Bytes this process may still take: what the node has free, within its control group's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8").split()
        free = int(meminfo[meminfo.index("MemAvailable:") + 1]) * 1024
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2]
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit = int((folder / "memory.max").read_text(encoding="utf-8"))  # "max": no limit, and no number
        free = min(free, limit - int((folder / "memory.current").read_text(encoding="utf-8")))
    except (OSError, ValueError, IndexError):
        pass
    return max(free, 0)
