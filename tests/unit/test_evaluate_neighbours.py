from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.evaluate import neighbours
from pipeline.evaluate.knn import knn_predict
from pipeline.evaluate.neighbours import Coarse, nearest, whole

K = 5
N = 2 * neighbours.SHARE * neighbours.BLOCK * K + 3  # the last block is not full
Found = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def coarse_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Products in bf16 on any CPU; whether each chunk was answered by way of them."""
    calls: list[bool] = []
    nearest_by_coarse = Coarse.nearest

    def counted(self: Coarse, queries: torch.Tensor, *, k: int) -> Found | None:
        found = nearest_by_coarse(self, queries, k=k)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(Coarse, "nearest", counted)
    monkeypatch.setattr(neighbours, "has_bf16_products", lambda: True)
    monkeypatch.setattr(neighbours, "QUERIES", 1)
    return calls


def unit(count: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def same(found: Found, expected: Found) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)
    gaps = -expected[0].diff(dim=1)
    clear = (gaps > 2e-6).all(dim=1)
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(found[1][clear], expected[1][clear])


def test_neighbours_are_those_of_the_float32_product(coarse_calls: list[bool]) -> None:
    bank, queries = unit(N), unit(90, seed=1)
    same(nearest(bank, queries, k=K, chunk=40), whole(bank, queries, k=K))
    assert coarse_calls == [True, True, True]


def test_neighbours_that_bf16_cannot_tell_apart_are_found(coarse_calls: list[bool]) -> None:
    """Forty vectors, whose products with a query differ by 2 · 10⁻⁵; bf16 is off by about 10⁻³."""
    queries, bank = unit(20, seed=1), unit(N)
    aside = unit(40, seed=2)
    aside = F.normalize(aside - (aside @ queries[:1].T) * queries[:1], dim=1)
    products = 0.9 - 2e-5 * torch.arange(40)[:, None]
    where = torch.randperm(N, generator=torch.Generator().manual_seed(3))[:40]
    bank[where] = products * queries[:1] + (1 - products.square()).sqrt() * aside
    rounded = (queries[:1].bfloat16() @ bank.bfloat16().T).topk(K, dim=1).indices
    assert set(rounded[0].tolist()) != set(where[:K].tolist()), "the test tests nothing"
    found = nearest(bank, queries, k=K, chunk=1024)
    assert found[1][0].tolist() == where[:K].tolist()
    same(found, whole(bank, queries, k=K))
    assert coarse_calls == [True]


def test_every_rounded_product_of_a_neighbour_reaches_its_limit() -> None:
    for width in (2, 64, 3000):
        bank, queries = unit(500, width), unit(50, width, seed=1)
        products = queries.bfloat16() @ bank.bfloat16().T
        limits = Coarse(bank).limits(queries, products.topk(K, dim=1).values[:, -1])
        _, places = whole(bank, queries, k=K)
        assert (products.gather(1, places) >= limits[:, None]).all()
        assert (products < limits[:, None]).any(), "they leave something out"


def test_limit_holds_where_all_errors_of_rounding_add_up() -> None:
    query = torch.full((1, 64), 0.125)
    bank = 0.125 * torch.tensor([1.0, -1.0]).repeat(2, 32)
    bank[0] *= 1 + torch.tensor([0.9, 1.1]).repeat(32) * neighbours.UNIT  # down to .125; on to -.1260
    bank[1, 0] -= 2.0**-7
    assert (query @ bank.T).argmax() == 0, "the first is nearer"
    rounded = query.bfloat16() @ bank.bfloat16().T
    assert rounded[0, 0] < 3 * rounded[0, 1], "and looks far worse"
    assert rounded[0, 0] >= Coarse(bank).limits(query, rounded[:, 1])


def test_queries_without_clear_neighbours_get_the_whole_product(coarse_calls: list[bool]) -> None:
    bank, queries = unit(N), unit(30, seed=1)
    queries[4] = 0
    queries[7] = torch.nan
    found, expected = nearest(bank, queries, k=K, chunk=1024), whole(bank, queries, k=K)
    rest = [row for row in range(30) if row not in (4, 7)]
    same((found[0][rest], found[1][rest]), (expected[0][rest], expected[1][rest]))
    assert (found[0][4] == 0).all() and found[0][7].isnan().all()
    assert coarse_calls == [True]


@pytest.mark.parametrize("spread", [1e-4, torch.nan])
def test_alike_features_are_not_looked_at_twice(coarse_calls: list[bool], spread: float) -> None:
    bank = F.normalize(torch.ones(N, 64) + spread * unit(N), dim=1)
    queries = F.normalize(torch.ones(90, 64) + 1e-4 * unit(90, seed=1), dim=1)
    found, expected = nearest(bank, queries, k=K, chunk=40), whole(bank, queries, k=K)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6, equal_nan=True)
    assert coarse_calls == [False], "the first chunk says that the others have too many candidates, too"


def test_few_vectors_or_another_cpu_get_the_whole_product(
    coarse_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = unit(30, seed=1)
    few = unit(N // 2)
    found, expected = nearest(few, queries, k=K, chunk=1024), whole(few, queries, k=K)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    monkeypatch.setattr(neighbours, "has_bf16_products", lambda: False)
    nearest(unit(N), queries, k=K, chunk=1024)
    assert not coarse_calls


def test_vote_of_nothing_is_empty() -> None:
    found = knn_predict(unit(N), torch.arange(N) % 3, torch.empty(0, 64), k=K, num_classes=3)
    assert found.shape == (0, 3) and found.dtype == torch.float32
