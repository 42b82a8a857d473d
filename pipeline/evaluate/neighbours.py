"""The nearest of many unit vectors, by products in bf16 where a CPU has those in hardware.

The product in bf16 is off by no more than a bound that is known. So it leaves few candidates, and their
products in float32 decide: the neighbours are those that the product of all in float32 finds, but for the
choice among equals.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = 16  # vectors of whose products the largest is looked at first
SHARE = 8  # a query with more than 1 / SHARE of all blocks above its limit gets the whole float32 product
QUERIES = 256  # fewer are answered before the bank is rounded
UNIT = 2.0**-8  # rounding to bf16: at most so much of a number


def nearest(bank: Tensor, queries: Tensor, *, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The ``k`` vectors of the bank with the largest products with each query.

    Args:
        bank: float32 (N, D), each of length 1, or 0.
        queries: float32 (M, D), the same.
        k: at most N.
        chunk: queries at a time, which bounds the memory at chunk × N numbers.

    Returns:
        Products (M, k), from the largest, and positions int64 (M, k). Where bf16 finds the candidates,
        products differ from those of the whole in their last bits, by the order of their sums; and so may the
        choice among vectors that are as near but for those bits.
    """
    coarse = Coarse(bank) if worthwhile(bank, queries, k) else None
    products, places = [queries.new_zeros(0, k)], [queries.new_zeros(0, k, dtype=torch.int64)]
    for some in queries.split(chunk):
        found = None if coarse is None else coarse.nearest(some, k=k)
        if found is None:
            coarse = None  # where most queries of a chunk have too many candidates, others will
            found = whole(bank, some, k=k)
        products.append(found[0])
        places.append(found[1])
    return torch.cat(products), torch.cat(places)


def whole(bank: Tensor, queries: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """:func:`nearest` by the float32 products of all."""
    return (queries @ bank.T).topk(k, dim=1)


def worthwhile(bank: Tensor, queries: Tensor, k: int) -> bool:
    """Whether bf16 is the faster way: on such CPUs, for many queries and many more blocks than neighbours."""
    many = len(queries) >= QUERIES and len(bank) >= 2 * SHARE * BLOCK * k
    return many and bank.device.type == "cpu" and has_bf16_products()


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 in hardware; torch that cannot say (older releases) counts as no."""
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


class Coarse:
    """A bank of unit vectors and its copy in bf16.

    For x and y rounded to x' and y', |x·y − x'·y'| ≤ |x − x'| |y| + |x'| |y − y'|. A sum of D products in
    float32 is off by D · 2⁻²³ at most, once in the rounded product and once in the one that it stands for.
    """

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank
        padding = bank.new_zeros(-len(bank) % BLOCK, bank.shape[1])
        self.rounded = torch.cat([bank.bfloat16(), padding.bfloat16()])
        self.residual = torch.stack([residuals(part).max() for part in bank.split(BLOCK**2)]).max()
        self.summing = bank.shape[1] * 2.0**-23

    def nearest(self, queries: Tensor, *, k: int) -> tuple[Tensor, Tensor] | None:
        """See :func:`nearest`; None where most queries have too many candidates, or are not numbers."""
        products = queries.bfloat16() @ self.rounded.T
        products[:, len(self.bank) :] = -torch.inf
        blocks = products.view(len(queries), BLOCK, -1)  # of every so manieth vector: faster than neighbours
        largest = blocks.amax(dim=1)
        limits = self.limits(queries, largest.topk(k, dim=1).values[:, -1])
        hits = largest >= limits[:, None]
        count = hits.sum(dim=1)
        few = (count >= k) & (count * SHARE <= largest.shape[1])
        if 2 * few.sum() <= len(queries):
            return None
        query, block = (hits & few[:, None]).nonzero(as_tuple=True)
        pair, row = (blocks[query, :, block] >= limits[query, None]).nonzero(as_tuple=True)
        place = row * largest.shape[1] + block[pair]
        best, places = queries.new_zeros(len(queries), k), query.new_zeros(len(queries), k)
        renumbered = few.cumsum(0)[query[pair]] - 1
        best[few], places[few] = self._best_pairs(queries[few], renumbered, place, k=k)
        best[~few], places[~few] = whole(self.bank, queries[~few], k=k)
        return best, places

    def limits(self, queries: Tensor, reached: Tensor) -> Tensor:
        """What the rounded products with the k nearest reach, bf16 (M,).

        Args:
            reached: bf16 (M,), what k of a query's rounded products reach.
        """
        lengths = 1 + 2 * UNIT  # of unit vectors, before and after their rounding
        off = lengths * (residuals(queries) + self.residual) + 2 * self.summing
        products = reached.float() - UNIT * reached.float().abs() - off  # k exact ones reach this
        rounded = products - off
        return (rounded - 2.1 * UNIT * rounded.abs()).bfloat16()  # they are rounded, and this is

    def _best_pairs(self, queries: Tensor, query: Tensor, place: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
        """The k largest float32 products of each query among its pairs with vectors.

        Args:
            query, place: int64 (P,).
        """
        order = (query * len(self.bank) + place).argsort()
        query, place = query[order], place[order]
        starts = torch.bincount(query, minlength=len(queries)).cumsum(0)
        starts = torch.cat([starts.new_zeros(1), starts])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # that such tensors are new
            pairs = torch.sparse_csr_tensor(
                starts, place, queries.new_zeros(len(place)), (len(queries), len(self.bank))
            )
            products = torch.sparse.sampled_addmm(pairs, queries, self.bank.T, beta=0.0).values()
        column = torch.arange(len(query)) - starts[query]
        table = products.new_full((len(queries), int(starts.diff().max())), -torch.inf)
        places = torch.zeros_like(table, dtype=torch.int64)
        table[query, column], places[query, column] = products, place
        best, chosen = table.topk(k, dim=1)
        return best, places.gather(1, chosen)


def residuals(vectors: Tensor) -> Tensor:
    """How far each is from itself in bf16, (M,)"""
    return (vectors - vectors.bfloat16()).norm(dim=1)
