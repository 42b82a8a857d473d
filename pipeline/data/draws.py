"""Random draws that are a function of a key alone.

Augmentation must not depend on which rank, batch or process an image happens to be in, and a resumed run must
draw what the undisturbed run would have drawn. So there is no generator with a state: a draw is
``uniform(key, stream)``, where the key names (seed, view, epoch, sample) and the stream names the parameter.

The mixing function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014). Draws are made on the CPU in float64, a few numbers an image, whatever device the images are on:
that keeps them equal on every device, and the host always knows which images an operation applies to.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_AHEAD = 32  # streams made at a time: a few large operations instead of many small ones


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64, wrapping round."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample_keys(counters: torch.Tensor, *, seed: int, view: int = 0) -> torch.Tensor:
    """One key an image for :class:`pipeline.data.augment.Augment`.

    Args:
        counters: (B,) int64; names the epoch and the sample, for example ``epoch * n + position``.
        seed: of the run.
        view: number of the view; views of one image with the same number are augmented alike.

    Returns:
        (B,) int64 on the CPU.
    """
    counted = counters.cpu().numpy().astype(np.uint64)
    with np.errstate(over="ignore"):
        base = _mix(np.array([seed % 2**64], dtype=np.uint64) * _GOLDEN + np.uint64(view + 1))
        keys = _mix(_mix(counted + _GOLDEN) + base)
    return torch.from_numpy(keys.view(np.int64))


class Draws:
    """The draws of one batch: streams are numbered in the order they are asked for.

    Args:
        keys: (B,) int64, one an image.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self._keys = keys.cpu().numpy().view(np.uint64)
        self._stream = 0
        self._ahead = np.empty((0, len(keys)))

    def __len__(self) -> int:
        return len(self._keys)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(B,) float64, uniform in [low, high)."""
        place = self._stream % _AHEAD
        if place == 0:
            streams = np.arange(self._stream + 1, self._stream + 1 + _AHEAD, dtype=np.uint64)[:, None]
            bits = _mix(self._keys + streams * _GOLDEN)
            self._ahead = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        self._stream += 1
        return low + (high - low) * self._ahead[place]

    def happens(self, probability: float) -> np.ndarray:
        """(B,) bool, true with this probability."""
        return self.uniform() < probability

    def order(self, length: int) -> np.ndarray:
        """(B, length) int64: a uniform permutation of ``range(length)`` an image."""
        return np.argsort(np.stack([self.uniform() for _ in range(length)], axis=1), axis=1, kind="stable")
