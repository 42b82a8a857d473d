"""Sampling: exact epochs, the same global batches on any world size, from any step."""

import pytest
import torch

from pipeline.data.sampler import EpochSampler
from pipeline.errors import UserError


def positions(
    step: int, *, n: int, batch_size: int, world_size: int = 1, accumulate: int = 1
) -> torch.Tensor:
    parts = []
    for rank in range(world_size):
        sampler = EpochSampler(
            n, batch_size=batch_size, rank=rank, world_size=world_size, accumulate=accumulate, seed=4
        )
        parts += [share.positions for share in sampler.shares(step)]
    return torch.cat(parts)


@pytest.mark.parametrize(("n", "batch_size"), [(24, 8), (23, 8), (5, 8), (1, 4)])
def test_every_image_is_seen_exactly_once_an_epoch(n, batch_size):
    epochs = 8
    stream = torch.cat([positions(s, n=n, batch_size=batch_size) for s in range(epochs * n // batch_size)])
    whole = stream[: len(stream) // n * n].reshape(-1, n)
    assert len(whole) >= 1
    for epoch in whole:
        assert torch.equal(epoch.sort().values, torch.arange(n))


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_the_global_batch_is_the_same_on_any_world_size(world_size, accumulate):
    for step in (0, 3, 17):
        alone = positions(step, n=23, batch_size=8)
        together = positions(step, n=23, batch_size=8, world_size=world_size, accumulate=accumulate)
        assert torch.equal(alone, together)


def test_a_step_is_the_same_whether_the_steps_before_it_were_taken_or_not():
    through = EpochSampler(10, batch_size=4, seed=1)
    for step in range(40):
        through.shares(step)
    resumed = EpochSampler(10, batch_size=4, seed=1)
    assert torch.equal(through.shares(40)[0].positions, resumed.shares(40)[0].positions)


def test_counters_name_epoch_and_image():
    sampler = EpochSampler(10, batch_size=4, seed=1)
    counters = torch.cat([sampler.shares(s)[0].counters for s in range(5)])
    assert torch.equal(counters.sort().values, torch.arange(20))


def test_epochs_differ_and_seeds_differ():
    first, other = EpochSampler(50, batch_size=50, seed=1), EpochSampler(50, batch_size=50, seed=2)
    assert not torch.equal(first.shares(0)[0].positions, first.shares(1)[0].positions)
    assert not torch.equal(first.shares(0)[0].positions, other.shares(0)[0].positions)


def test_steps_are_those_of_the_epochs():
    assert EpochSampler(1257, batch_size=64).steps(10) == 196
    assert EpochSampler(3, batch_size=64).steps(1) == 1


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"batch_size 10 .* multiple of 4"):
        EpochSampler(100, batch_size=10, world_size=2, accumulate=2)
    with pytest.raises(UserError, match="no images"):
        EpochSampler(0, batch_size=10)
