"""The scattering transform: wavelet moduli of an image, smoothed and down-sampled; nothing in it is trained.

Mallat 2012, arXiv 1101.2286; Bruna and Mallat 2013, arXiv 1203.1513. Order 0 is the image smoothed by a
Gaussian φ; order 1 the smoothed moduli |x ∗ ψ| over J scales and L orientations; order 2 those of the moduli
themselves, with a ψ of a coarser scale. Filters, padding and the order of the channels are those of kymatio
0.3 (arXiv 1812.11214), with which the published nets were trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError

_PI = 3.1415  # as kymatio rounds it: its low-pass filter adds up to 1.00003
_REACH = 7  # standard deviations from its centre a Gaussian is no longer seen in float32
# Bytes of an intermediate result: what fits into a core's cache, or keeps a GPU busy.
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 29}


class Scattering(nn.Module):
    """Second-order scattering of each colour channel.

    It has neither parameters nor buffers: the filters for a size and device are made when they are first
    needed. It computes in float32 whatever autocast says, and no gradient flows back to the images.

    Args:
        J: scales; the output is 2^J times smaller than the image.
        L: orientations over half a turn.

    Raises:
        ValueError: J or L is below 1.
    """

    def __init__(self, J: int = 2, L: int = 16) -> None:
        super().__init__()
        if J < 1 or L < 1:
            raise ValueError(f"scattering needs J and L of at least 1, got J {J} and L {L}")
        self.J, self.L = J, L

    @property
    def channels(self) -> int:
        """Coefficients K of one pixel and colour: 1 + J·L + L²·J·(J − 1)/2."""
        return 1 + self.J * self.L + self.L**2 * self.J * (self.J - 1) // 2

    def extra_repr(self) -> str:
        return f"J={self.J}, L={self.L}"

    @torch.compiler.disable
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) → (B, C·K, ⌊H/2^J⌋, ⌊W/2^J⌋) float32, one colour after the other.

        Within a colour: order 0; order 1 by scale and orientation; order 2 by scale and orientation of the
        first wavelet, then of the second.

        Raises:
            UserError: the images have a side below 2^J.
        """
        height, width = images.shape[2:]
        if min(height, width) < 2**self.J:
            raise UserError(
                f"scattering with J {self.J} needs images of {2**self.J} pixels or more,"
                f" got {height} x {width}"
            )
        if images.is_meta:  # shapes alone, and no autocast to switch off
            shape = len(images), images.shape[1] * self.channels, height >> self.J, width >> self.J
            return images.new_empty(shape, dtype=torch.float32)
        with torch.autocast(images.device.type, enabled=False), _exact_products():
            bank = _bank(height, width, self.J, self.L, images.device)
            planes = images.float().flatten(0, 1)[:, bank.rows][:, :, bank.columns]
            out = planes.new_empty(len(planes), self.channels, height >> self.J, width >> self.J)
            limit = _CHUNK.get(images.device.type, _CHUNK["cuda"])
            count = max(1, limit // (self.L * planes[0].numel() * torch.complex64.itemsize))
            for some, coefficients in zip(planes.split(count), out.split(count)):
                self._scatter(some, bank, coefficients)
        return out.unflatten(0, (len(images), -1)).flatten(1, 2)

    def _scatter(self, planes: Tensor, bank: _Bank, out: Tensor) -> None:
        """planes: (R, M, N), padded; fills out: (R, K, h, w)."""
        J, L = self.J, self.L
        out[:, 0] = bank.smooth(planes, 0)
        first, second = out[:, 1:].split([J * L, self.channels - 1 - J * L], dim=1)
        spectra = torch.fft.fft2(planes)
        for j in range(J):
            moduli = bank.moduli(spectra, j, 0)
            first[:, j * L : (j + 1) * L] = bank.smooth(moduli, j)
            coarser = range(j + 1, J)
            mine, second = second.tensor_split([len(coarser) * L**2], dim=1)
            for orientation in range(L if coarser else 0):
                again = torch.fft.fft2(moduli[:, orientation])
                for place, scale in enumerate(coarser, start=orientation * len(coarser)):
                    finer = bank.moduli(again, scale, j)
                    mine[:, place * L : (place + 1) * L] = bank.smooth(finer, scale)


@dataclass(frozen=True)
class _Bank:
    """The filters for images of one size, padded to (M, N), on one device.

    A level is how many times the grid has been halved.

    Attributes:
        rows, columns: (M,) and (N,) int64, the pixel that each place of the padded image shows.
        psi: by scale and level, (L, M', 2·N') float32: the Fourier transform of each wavelet, which is real,
            every value twice, for the real and the imaginary part that it multiplies; on a GPU (L, M', N')
            complex64.
        phi: by level, (h, M') and (N', w) float32: smoothing, down-sampling and cutting off the margin.
    """

    rows: Tensor
    columns: Tensor
    psi: dict[tuple[int, int], Tensor]
    phi: list[tuple[Tensor, Tensor]]

    def smooth(self, maps: Tensor, level: int) -> Tensor:
        """maps: (..., M', N') at a level → (..., h, w)"""
        down, across = self.phi[level]
        return down @ (maps @ across)

    def moduli(self, spectra: Tensor, scale: int, level: int) -> Tensor:
        """|x ∗ ψ| for all orientations of a scale, at the level of that scale.

        spectra: (R, M', N') complex, of maps at ``level`` → (R, L, M'', N'') float32
        """
        filters = self.psi[scale, level]
        shrink = 2 ** (scale - level)
        if spectra.is_cuda:
            return torch.fft.ifft2(_folded_at_once(spectra.unsqueeze(1), filters, shrink)).abs()
        values = torch.view_as_real(spectra).flatten(-2).unsqueeze(1)
        total: Tensor | None = None
        for part in _parts(filters, shrink):
            if total is None:
                total = values[part] * filters[part]
            else:
                total.addcmul_(values[part], filters[part])
        assert total is not None
        waves = torch.fft.ifft2(torch.view_as_complex(total.unflatten(-1, (-1, 2))))
        squares = torch.view_as_real(waves).square_()
        return (squares[..., 0] + squares[..., 1]).sqrt_()


def _parts(filters: Tensor, shrink: int) -> Iterator[tuple[Any, slice, slice]]:
    """The parts of a spectrum that add up where every so many pixels are taken."""
    height, width = filters.shape[1] // shrink, filters.shape[2] // shrink
    for row in range(shrink):
        for column in range(shrink):
            yield (
                ...,
                slice(row * height, (row + 1) * height),
                slice(column * width, (column + 1) * width),
            )


def _folded_at_once(values: Tensor, filters: Tensor, shrink: int) -> Tensor:
    """The products' sum over their parts on a GPU: four parts in one kernel.

    values: (R, 1, M', N') complex, filters: (L, M', N') complex → (R, L, M'/shrink, N'/shrink) complex
    """
    if shrink == 1:
        return values * filters
    parts = list(_parts(filters, shrink))
    fold, total = _fold_kernel(), None
    for four in zip(*[iter(parts)] * 4):
        found = fold(*(values[part] for part in four), *(filters[part] for part in four))
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def _fold_plainly(*factors: Tensor) -> Tensor:
    """a·p + b·q + c·r + d·s of (a, b, c, d, p, q, r, s)."""
    total = factors[0] * factors[4]
    for one, other in zip(factors[1:4], factors[5:]):
        total.addcmul_(one, other)
    return total


@functools.cache
def _fold_kernel() -> Callable[..., Tensor]:
    """:func:`_fold_plainly` in one kernel; itself where PyTorch cannot compile one: that is a beta."""
    text = (
        "template <typename T> T fold(T a, T b, T c, T d, T p, T q, T r, T s)"
        " { return a * p + b * q + c * r + d * s; }"
    )
    try:
        fold = torch.cuda.jiterator._create_jit_fn(text)
        fold(*torch.ones(8, 1, dtype=torch.complex64, device="cuda"))
    except Exception:  # whatever it raises: nothing is lost but time
        return _fold_plainly
    return fold


@functools.lru_cache(maxsize=8)
def _bank(height: int, width: int, J: int, L: int, device: torch.device) -> _Bank:
    step = 2**J
    M, N = ((side // step + 2) * step for side in (height, width))
    angles = [(int(L / 2 - 1) - number) * np.pi / L for number in range(L)]
    psi: dict[tuple[int, int], Tensor] = {}
    for scale in range(J):
        wavelets = np.stack([_wavelet(M, N, scale, angle, slant=4 / L) for angle in angles])
        for level in range(scale + 1):
            filters = _halved(_halved(wavelets, level, axis=1), level, axis=2)
            filters = filters / 4 ** (scale - level)  # the mean over the parts that are added up
            wave = _tensor(filters, device)
            psi[scale, level] = wave.to(torch.complex64) if wave.is_cuda else wave.repeat_interleave(2, dim=2)
    phi = [
        (_tensor(_smoothing(M, J, level), device), _tensor(_smoothing(N, J, level).T, device))
        for level in range(J)
    ]
    rows, columns = (torch.from_numpy(_mirror(*sides)).to(device) for sides in ((height, M), (width, N)))
    return _Bank(rows, columns, psi, phi)


def _wavelet(M: int, N: int, scale: int, angle: float, *, slant: float) -> np.ndarray:
    """(M, N) float64: the Fourier transform of a Morlet wavelet g(u)·(exp(iξ·u) − κ) of mean 0.

    g is a Gaussian of standard deviation σ = 0.8·2^scale along ``angle`` and σ/slant across it; |ξ| = 3π/4 /
    2^scale.
    """
    sigma, frequency = 0.8 * 2**scale, 0.75 * np.pi / 2**scale
    y, x = (_places(side, sigma / min(slant, 1)) for side in (M, N))
    along = y[:, None] * np.cos(angle) + x * np.sin(angle)
    across = x * np.cos(angle) - y[:, None] * np.sin(angle)
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = envelope * np.exp(1j * frequency * along)
    wave -= wave.sum() / envelope.sum() * envelope
    periodic = np.zeros((M, N), dtype=complex)
    np.add.at(periodic, (y[:, None] % M, x % N), wave * slant / (2 * _PI * sigma**2))
    return np.fft.fft2(periodic).real


def _smoothing(side: int, J: int, level: int) -> np.ndarray:
    """(h, side / 2^level) float64: φ, of standard deviation 0.8·2^(J−1), about every 2^J-th pixel.

    One side of it: the Gaussian of a plane is that along rows times that along columns. The first and the
    last place, in the margin, are left out.
    """
    sigma = 0.8 * 2 ** (J - 1)
    x = _places(side, sigma)
    periodic = np.zeros(side)
    np.add.at(periodic, x % side, np.exp(-(x**2) / (2 * sigma**2)) / (np.sqrt(2 * _PI) * sigma))
    kernel = np.fft.ifft(_halved(np.fft.fft(periodic), level, axis=0)).real
    length = len(kernel)
    centres = np.arange(length)[:: 2 ** (J - level)][1:-1]
    return kernel[(centres[:, None] - np.arange(length)) % length]


def _places(side: int, sigma: float) -> np.ndarray:
    """Where a Gaussian about 0 is evaluated before it is wrapped round; kymatio goes no further."""
    reach = int(np.ceil(_REACH * sigma))
    return np.arange(max(-2 * side, -reach), min(3 * side, reach + 1))


def _halved(spectrum: np.ndarray, level: int, *, axis: int) -> np.ndarray:
    """A spectrum's low frequencies, for a grid halved so many times."""
    if not level:
        return spectrum
    half = spectrum.shape[axis] >> level + 1
    low, _, high = np.split(spectrum, [half, -half], axis)
    return np.concatenate([low, high], axis)


def _mirror(side: int, padded: int) -> np.ndarray:
    """(padded,) int64: the pixel at each place of an image that is mirrored about its outermost pixels."""
    period = max(1, 2 * side - 2)
    place = (np.arange(padded) - (padded - side) // 2) % period
    return np.minimum(place, period - place)


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Matrix products in full float32, where the training allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
