"""Altered copies: mirrored, turned by quarter turns, cropped a little, scaled, recompressed.

Every image is compared by a grey thumbnail of 64 x 64 pixels, in three steps. *Candidates*: descriptors of
8 x 8 cells, whitened over the set (what all X-rays have in common says nothing), of every image in eight
orientations and some windows against every whole image; each image keeps its nearest. *Registration*: window
and scale along each axis are refined on thumbnails of 16, 32 and 64 pixels (Lucas & Kanade, 1981).
*Decision*: the correlation of the detail, which is what a blur takes away. In sets of one kind the coarse
shapes of different images correlate by .98 and their detail by .1 to .6; the detail of copies by .8 or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 64  # of a thumbnail, in pixels
CELLS = 8  # a side of a descriptor
NEAREST = 12  # candidates of each image
REGISTERED = 4  # of them, on thumbnails of 32 pixels
MIN_DETAIL = 0.75  # correlation of the detail of copies, on thumbnails of 64 pixels
FEW_PIXELS = 40  # the short side below which images have no more detail than thumbnails of 32 pixels
MIN_DETAIL_FEW = 0.8  # there
TINY = 20  # the short side below which different images may hardly differ
MIN_DETAIL_TINY = 0.99  # there
LEAST_DETAIL = 0.3  # grey levels; finer detail is the noise of the coding
MAX_COLOUR = 32.0  # levels by which the means of R - G and B - G may differ
MANY = 20_000  # images above which crops are not searched for: the time grows with the square
BLOCK = 1024  # images compared with all others at a time
CHUNK = 128  # pairs registered at a time: they stay in a core's cache
DAMPING = 0.03  # of Gauss-Newton steps, of the mean curvature
NOISE = 0.01  # of the variance, added to each dimension of the descriptors before whitening

Window = tuple[float, float, float]  # of both sides the share kept, and what is cut off left and at the top
WHOLE: tuple[Window, ...] = ((1.0, 0.0, 0.0),)
WINDOWS: tuple[Window, ...] = (
    *(*WHOLE, (0.95, 0.025, 0.025), (0.84, 0.08, 0.08)),
    *((0.9, x, y) for x in (0.02, 0.08) for y in (0.02, 0.08)),
    *((0.85, x, y) for x in (0.03, 0.12) for y in (0.03, 0.12)),
)


@dataclass(frozen=True, order=True)
class Pair:
    """Two images that show the same; ``correlation`` of their detail once one lies upon the other."""

    first: int
    second: int
    correlation: float


def find(thumbnails: np.ndarray, *, sides: np.ndarray, colours: np.ndarray) -> list[Pair]:
    """Pairs of images of which one is an altered copy of the other.

    Found are copies mirrored, turned by quarter turns, cropped to no less than about 82 % of each side (95 %
    in sets of more than 20,000 images), scaled, recompressed, brightened, or several of these at once. Each
    image is compared with the 12 that resemble it most, so that of many copies of one picture not every pair
    is there, but a chain of pairs between any two.

    Args:
        thumbnails: (N, 64, 64) uint8, grey.
        sides: (N,) the short side of each image in pixels.
        colours: (N, 2) means of R - G and B - G in levels of 8 bits; NaN fits every colour.

    Returns:
        The pairs, first < second, in order of their positions.
    """
    levels = {SIDE: thumbnails.astype(np.float32)}
    for side in (32, 16):
        levels[side] = _shrink(levels[2 * side], side)
    chosen = np.flatnonzero(_detail(levels[32], 3).std((1, 2)) >= LEAST_DETAIL)
    if len(chosen) < 2:
        return []
    levels = {side: images[chosen] for side, images in levels.items()}
    pairs = _candidates(levels[32], WINDOWS if len(chosen) <= MANY else WHOLE)
    far = np.abs(colours[chosen][pairs.rows] - colours[chosen][pairs.columns]).max(1)
    pairs, score = _register(pairs.take(~(far > MAX_COLOUR)), levels[16], steps=3, blurs=3)
    pairs = pairs.take(_best(pairs.rows, score) & (score > 0.3))
    pairs, score = _register(pairs, levels[32], steps=4, blurs=3)
    short = np.minimum(sides[chosen][pairs.rows], sides[chosen][pairs.columns])
    few = short < FEW_PIXELS
    least = np.where(short < TINY, MIN_DETAIL_TINY, MIN_DETAIL_FEW)
    found = _listed(pairs.take(few), score[few], least[few])
    pairs, score = _register(pairs.take(~few & (score > 0.6)), levels[SIDE], steps=2, blurs=4)
    found += _listed(pairs, score, np.full(len(score), MIN_DETAIL))
    best: dict[tuple[int, int], float] = {}
    for first, second, correlation in found:
        pair = int(chosen[first]), int(chosen[second])
        best[pair] = max(correlation, best.get(pair, -1.0))
    return [Pair(*pair, round(correlation, 4)) for pair, correlation in sorted(best.items())]


@dataclass(frozen=True)
class _Pairs:
    """Image ``rows`` in the orientation ``turns``, and ``columns``, which may show a window of it.

    ``turns``: bit 0 mirrors left and right, bit 1 top and bottom, after bit 2 has swapped the axes.
    ``windows`` (P, 4): width and left, height and top, in sides of the oriented image.
    """

    rows: np.ndarray
    columns: np.ndarray
    turns: np.ndarray
    windows: np.ndarray

    def take(self, chosen: np.ndarray) -> _Pairs:
        return _Pairs(self.rows[chosen], self.columns[chosen], self.turns[chosen], self.windows[chosen])


def _candidates(images: np.ndarray, windows: Sequence[Window]) -> _Pairs:
    """For every image (N, 32, 32) the others that are nearest to it in any orientation and window."""
    count = len(images)
    whole = _unit(_shrink(images, CELLS))
    mean = whole.mean(0)
    whiten = _whitening(whole - mean)
    columns = _directions(whole, mean, whiten)
    keep = min(NEAREST, count - 1)
    rows, others, hypotheses = [], [], []
    for start in range(0, count, BLOCK):
        block = images[start : start + BLOCK]
        best = np.full((len(block), count), -2.0, np.float32)
        which = np.zeros((len(block), count), np.int16)
        for place, (share, left, top) in enumerate(windows):
            down, across = (_weights(np.array([share]), np.array([begin]), 32)[0] for begin in (top, left))
            cells = _shrink(down @ block @ across.T, CELLS)
            for turn in range(8):
                score = _directions(_unit(_oriented(cells, turn)), mean, whiten) @ columns.T
                better = score > best
                np.copyto(best, score, where=better)
                which[better] = place * 8 + turn
        best[np.arange(len(block)), np.arange(start, start + len(block))] = -3.0  # itself
        nearest = np.argpartition(-best, keep - 1, axis=1)[:, :keep]
        rows.append(np.repeat(np.arange(start, start + len(block)), keep))
        others.append(nearest.ravel())
        hypotheses.append(np.take_along_axis(which, nearest, 1).ravel())
    hypothesis = np.concatenate(hypotheses)
    turns = hypothesis % 8
    shares, lefts, tops = np.array(windows)[hypothesis // 8].T
    swapped = (turns & 4) > 0
    lefts, tops = np.where(swapped, tops, lefts), np.where(swapped, lefts, tops)
    lefts = np.where(turns & 1, 1 - shares - lefts, lefts)
    tops = np.where(turns & 2, 1 - shares - tops, tops)
    begun = np.stack([shares, lefts, shares, tops], 1)
    return _Pairs(np.concatenate(rows), np.concatenate(others), turns, begun)


def _whitening(centred: np.ndarray) -> np.ndarray:
    """(D, D) that makes the covariance of (N, D) the identity, but for what is hardly more than noise."""
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    variances = np.maximum(variances, 0)
    return (axes / np.sqrt(variances + NOISE * variances.sum() / len(variances))).astype(np.float32)


def _directions(descriptors: np.ndarray, mean: np.ndarray, whiten: np.ndarray) -> np.ndarray:
    """(N, D) whitened, of length 1."""
    white = (descriptors - mean) @ whiten
    return white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-9)


def _register(pairs: _Pairs, images: np.ndarray, steps: int, blurs: int) -> tuple[_Pairs, np.ndarray]:
    """Refine the windows of pairs.

    Args:
        pairs: P of them.
        images: (N, S, S) thumbnails.
        steps: of the Gauss-Newton method.
        blurs: what so many take away is detail.

    Returns:
        The pairs with other windows, and (P,) the correlation of their detail.
    """
    windows, scores = [np.empty((0, 4))], [np.empty(0)]
    for start in range(0, len(pairs.rows), CHUNK):
        part = pairs.take(np.arange(start, min(start + CHUNK, len(pairs.rows))))
        source = images[part.rows]
        for turn in range(1, 8):
            mine = part.turns == turn
            source[mine] = _oriented(source[mine], turn)
        target = _standardised(images[part.columns])
        refined = _refined(source, target, part.windows, steps)
        detail = _detail(target, blurs)
        before, after = (
            _correlation(_detail(_shown(source, window), blurs), detail) for window in (part.windows, refined)
        )
        windows.append(np.where((after >= before)[:, None], refined, part.windows))  # steps may go astray
        scores.append(np.maximum(after, before))
    return _Pairs(pairs.rows, pairs.columns, pairs.turns, np.concatenate(windows)), np.concatenate(scores)


def _refined(source: np.ndarray, target: np.ndarray, windows: np.ndarray, steps: int) -> np.ndarray:
    """Windows (P, 4) of the source (P, S, S) that fit the target (P, S, S), standardised."""
    side = target.shape[1]
    down, across = np.gradient(_blurred(target), axis=(1, 2))
    place = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5)[None]
    slopes = side * np.stack([across * place, across, down * place.T, down], 1).reshape(len(target), 4, -1)
    normal = slopes @ slopes.transpose(0, 2, 1)
    normal += np.eye(4) * (DAMPING * np.trace(normal, axis1=1, axis2=2)[:, None, None] / 4 + 1e-6)
    inverse = np.linalg.inv(normal)
    for _ in range(steps):
        change = (target - _shown(source, windows)).reshape(len(target), -1, 1)
        step = np.clip((inverse @ (slopes @ change))[:, :, 0], -0.06, 0.06)
        step[:, [1, 3]] -= step[:, [0, 2]] / 2  # the slopes are about the middle, a window begins at its edge
        windows = np.clip(windows + step, (0.72, -0.08, 0.72, -0.08), (1.1, 0.3, 1.1, 0.3))
    return windows


def _shown(source: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The windows of (P, S, S), as large as the whole, standardised."""
    side = source.shape[1]
    across = _weights(windows[:, 0], windows[:, 1], side)
    down = _weights(windows[:, 2], windows[:, 3], side)
    return _standardised(down @ source @ across.transpose(0, 2, 1))


def _weights(shares: np.ndarray, begins: np.ndarray, side: int) -> np.ndarray:
    """(P, S, S) bilinear weights of the pixels of a line for those of its window."""
    middles = (np.arange(side) + 0.5) / side
    places = np.clip((begins[:, None] + shares[:, None] * middles) * side - 0.5, 0, side - 1)
    lower = np.minimum(places.astype(int), side - 2)
    weights = np.zeros((len(shares), side, side), np.float32)
    pair, pixel = np.ogrid[: len(shares), :side]
    weights[pair, pixel, lower] = 1 - (places - lower)
    weights[pair, pixel, lower + 1] = places - lower
    return weights


def _best(rows: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Which pairs are among the best of their row."""
    order = np.lexsort((-score, rows))
    rank = np.empty(len(rows), int)
    rank[order] = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order])
    return rank < REGISTERED


def _listed(pairs: _Pairs, score: np.ndarray, least: np.ndarray) -> list[tuple[int, int, float]]:
    pairs, score = pairs.take(score >= least), score[score >= least]
    rows = zip(pairs.rows.tolist(), pairs.columns.tolist(), score.tolist())
    return [(min(row, column), max(row, column), value) for row, column, value in rows]


def _oriented(images: np.ndarray, turn: int) -> np.ndarray:
    """(N, S, S) in one of the eight orientations, see :class:`_Pairs`."""
    images = images.transpose(0, 2, 1) if turn & 4 else images
    return images[:, :: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1]


def _shrink(images: np.ndarray, side: int) -> np.ndarray:
    """(N, S, S) → (N, side, side), means of squares."""
    step = images.shape[1] // side
    return images.reshape(len(images), side, step, side, step).mean((2, 4))


def _unit(images: np.ndarray) -> np.ndarray:
    """(N, S, S) → (N, S * S) of mean 0 and length 1."""
    flat = images.reshape(len(images), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _standardised(images: np.ndarray) -> np.ndarray:
    images = images - images.mean((1, 2), keepdims=True)
    return images / np.maximum(images.std((1, 2), keepdims=True), 1e-6)


def _blurred(images: np.ndarray, times: int = 1) -> np.ndarray:
    """(N, S, S) blurred so many times by 1/4, 1/2, 1/4 along both axes; the pixels at an edge count twice."""
    side = images.shape[1]
    once = 0.25 * (np.eye(side, k=-1) + 2 * np.eye(side) + np.eye(side, k=1))
    once[[0, -1], [0, -1]] += 0.25
    line = np.linalg.matrix_power(once, times).astype(np.float32)
    blurred: np.ndarray = line @ images @ line.T
    return blurred


def _detail(images: np.ndarray, blurs: int) -> np.ndarray:
    """What so many blurs take away."""
    return images - _blurred(images, blurs)


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P,) of (P, S, S) and (P, S, S)."""
    return (_unit(first) * _unit(second)).sum(1)
