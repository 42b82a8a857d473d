"""Ranks and accumulation change how a step is computed, not what it computes."""

import pytest
import torch
from pretrain_cases import make_loop, on_ranks, settings, weights, write_shards

from pipeline.train.logs import read_log
from pipeline.train.syncbn import CpuSyncBatchNorm

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def losses(folder):
    return [line["loss"] for line in read_log(folder, "step")]


def _train(world, method, archs, shards, folder, training):
    loop = make_loop(method, shards, folder, training=training, world=world, archs=archs)
    for part in loop.method.modules():  # random numbers differ between ranks: leave only arithmetic
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.0
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    trained = loop.run()
    torch.save(weights(trained), folder / f"weights-{world.rank}.pt")


def _normalise(world, folder, affine):
    norm = torch.nn.BatchNorm2d(5, affine=affine)
    if affine:
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    synchronised = CpuSyncBatchNorm(norm)
    x, asked = torch.load(folder / "given.pt")
    x = x.chunk(world.world_size)[world.rank].contiguous(memory_format=torch.channels_last).requires_grad_()
    out = synchronised(x)
    (out * asked.chunk(world.world_size)[world.rank]).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "mean": synchronised.running_mean}
    found |= {"var": synchronised.running_var}
    if affine:
        found |= {"weight": synchronised.weight.grad, "bias": synchronised.bias.grad}
    torch.save(found, folder / f"found-{world.rank}.pt")


@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_over_two_ranks_is_that_of_the_whole_batch(affine, tmp_path):
    torch.manual_seed(0)
    shift = torch.arange(8.0).view(-1, 1, 1, 1)  # the halves have means of their own
    x, asked = torch.randn(8, 5, 3, 4) * 2 + 30 + shift, torch.randn(8, 5, 3, 4)
    torch.save((x, asked), tmp_path / "given.pt")
    on_ranks(2, _normalise, tmp_path, affine)
    one, two = (torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1))

    norm = torch.nn.BatchNorm2d(5, affine=affine).double()
    if affine:
        norm.weight.data = torch.nn.init.uniform_(
            torch.empty(5), generator=torch.Generator().manual_seed(1)
        ).double()
    whole = x.double().requires_grad_()
    out = norm(whole)
    (out * asked.double()).sum().backward()
    expected = {"out": out.detach(), "x": whole.grad}
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat([one[name], two[name]]), value.float(), rtol=1e-4, atol=1e-5)
    for name, value in (("mean", norm.running_mean), ("var", norm.running_var)):
        torch.testing.assert_close(one[name], value.float())
        assert torch.equal(one[name], two[name])
    for name in ("weight", "bias") if affine else ():
        total = one[name] + two[name]  # DDP's mean, times the ranks
        torch.testing.assert_close(total, getattr(norm, name).grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "archs"), [("simclr", ("cnn",)), ("scatsimclr", ("cnn",)), ("cass_vc", ("cnn", "vit"))]
)
def test_two_ranks_give_the_losses_of_one(method, archs, shards, tmp_path):
    training = settings(epochs=3, lr=1e-3, optimizer="sgd", checkpoint_steps=None)
    on_ranks(1, _train, method, archs, shards, tmp_path / "one", training)
    on_ranks(2, _train, method, archs, shards, tmp_path / "two", training)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 8 and one == pytest.approx(two, rel=1e-4)
    first, second = (torch.load(tmp_path / "two" / f"weights-{rank}.pt") for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_accumulation_gives_the_losses_of_a_whole_batch_where_samples_are_independent(shards, tmp_path):
    found = {}
    for accumulate in (1, 2):
        training = settings(epochs=3, accumulate=accumulate, optimizer="sgd", checkpoint_steps=None)
        loop = make_loop("dino", shards, tmp_path / str(accumulate), training=training, archs=("vit",))
        for part in loop.method.modules():
            if hasattr(part, "drop_prob"):
                part.drop_prob = 0.0
        loop.run()
        found[accumulate] = losses(tmp_path / str(accumulate))
    assert found[1] == pytest.approx(found[2], rel=2e-3)


def _train_traced(world, *given):
    """With compiled nets, traced as for a compiler and then run as they are: that needs no compiler."""
    compile_ = torch.compile
    torch.compile = lambda function, *, dynamic, mode: compile_(function, backend="eager", dynamic=dynamic)
    _train(world, *given)


@pytest.mark.slow
def test_two_ranks_compile(shards, tmp_path):
    found = []
    for train, compiled in ((_train, False), (_train_traced, True)):
        training = settings(epochs=2, checkpoint_steps=None, compile=compiled)
        folder = tmp_path / str(compiled)
        on_ranks(2, train, "cass_vc", ("cnn", "vit"), shards, folder, training)
        found.append(torch.load(folder / "weights-0.pt"))
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


@pytest.mark.slow
def test_two_ranks_accumulate(shards, tmp_path):
    training = settings(epochs=3, accumulate=2, checkpoint_steps=None)
    on_ranks(2, _train, "dino", ("vit",), shards, tmp_path, training)
    assert len(losses(tmp_path)) == 8
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name
