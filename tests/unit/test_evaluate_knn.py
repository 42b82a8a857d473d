from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.evaluate import knn
from pipeline.evaluate.knn import knn_predict
from pipeline.evaluate.problem import Problem, Split
from pipeline.specs import FinetuneSettings


def test_vote_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(9, 4)), rng.normal(size=(3, 4))
    targets = rng.integers(0, 3, 9)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    similarity = unit(queries) @ unit(bank).T
    expected = np.zeros((3, 3))
    for row, values in enumerate(similarity):
        for neighbour in np.argsort(-values)[:4]:
            expected[row, targets[neighbour]] += np.exp(values[neighbour] / 0.1)
    expected /= expected.sum(axis=1, keepdims=True)
    found = knn_predict(
        torch.tensor(bank),
        torch.tensor(targets),
        torch.tensor(queries),
        k=4,
        num_classes=3,
        temperature=0.1,
        chunk=2,
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_k_is_capped_at_the_training_samples() -> None:
    bank = torch.eye(3)
    found = knn_predict(bank, torch.tensor([0, 1, 2]), bank, k=200, num_classes=5)
    assert found.shape == (3, 5)
    assert found.argmax(1).tolist() == [0, 1, 2]
    assert found.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_length_of_a_feature_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    bank, queries = torch.randn(20, 6, generator=generator), torch.randn(5, 6, generator=generator)
    targets = torch.arange(20) % 4
    scaled = bank * torch.rand(20, 1, generator=generator).add(0.5)
    first = knn_predict(bank, targets, queries, k=5, num_classes=4)
    torch.testing.assert_close(first, knn_predict(scaled, targets, 3 * queries, k=5, num_classes=4))


def test_multilabel_gives_shares_of_neighbours() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    found = knn_predict(bank, targets, torch.tensor([[2.0, 0.0]]), k=2, num_classes=2)
    assert found[0].tolist() == pytest.approx([1.0, 0.5])


def test_constant_part_and_scale_of_a_feature_do_not_matter_to_the_protocol(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(2)
    targets = torch.arange(60) % 3
    own = torch.randn(60, 4, generator=generator) + 2 * torch.eye(4)[targets]
    every = {"train": np.arange(20)}
    index = SimpleNamespace(task="multiclass", classes=["a", "b", "c"], rows=every.__getitem__)
    splits = [Split(np.arange(i, i + 20), targets[i : i + 20]) for i in (0, 20, 40)]
    train, val, test = splits
    problem = Problem(Path(), index, train, val, test, FinetuneSettings(knn_k=5), 0, torch.device("cpu"))  # type: ignore[arg-type]

    def found(features: torch.Tensor) -> np.ndarray:
        monkeypatch.setattr(knn, "features_of", lambda problem, split: features[split.rows])
        return knn.run(problem).arrays["probabilities"]

    moved = own * torch.tensor([1.0, 5.0, 0.2, 1.0]) + torch.tensor([30.0, 0.0, 0.0, -50.0])
    np.testing.assert_allclose(found(moved), found(own), atol=1e-3)
    assert knn.run(problem).test["accuracy"] > 0.8


@pytest.mark.parametrize("width", [5, 64, 200])
def test_a_vote_has_the_same_bits_in_whatever_company(width: int) -> None:
    """Also where training images lie twice, with other labels, right at the last of the k."""
    generator = torch.Generator().manual_seed(width)
    bank = torch.randn(500, width, generator=generator)
    bank = torch.cat([bank, bank])
    targets = torch.randint(0, 3, (1000,), generator=generator)
    queries = torch.randn(700, width, generator=generator)
    every = knn_predict(bank, targets, queries, k=7, num_classes=3)
    alone = [knn_predict(bank, targets, one[None], k=7, num_classes=3) for one in queries[:40]]
    assert torch.equal(torch.cat(alone), every[:40])
    for start, stop in ((0, 1), (3, 300), (100, 433), (5, 700)):
        some = knn_predict(bank, targets, queries[start:stop], k=7, num_classes=3)
        assert torch.equal(some, every[start:stop])


def test_the_way_that_neighbours_are_found_changes_no_bit(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(6000, 32, generator=generator)
    targets = torch.randint(0, 3, (6000,), generator=generator)
    queries = torch.randn(300, 32, generator=generator)
    found = []
    for rounded in (False, True):
        monkeypatch.setattr("pipeline.evaluate.neighbours.worthwhile", lambda *_, way=rounded: way)
        found.append(knn_predict(bank, targets, queries, k=5, num_classes=3))
    assert torch.equal(*found)
