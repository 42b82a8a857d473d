"""Two ranks with half a batch each optimise what one process does with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from pipeline.methods.base import Progress
from pipeline.methods.load import load_method
from pipeline.methods.masking import MaskedPatches
from pipeline.methods.registry import METHODS, resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

SPECS = {
    "cnn": Backbone(name="test_resnet"),
    "vit": Backbone(
        name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    ),
}
SMALL = {
    "hidden": 16,
    "out_dim": 16,
    "bottleneck": 8,
    "projector_hidden": 16,
    "projector_dim": 8,
    "pretext_hidden": [16, 8],
    "patch_out_dim": 16,
    "patch_chunk": 7,
}
NAMES = [name for name, info in METHODS.items() if info.steps == "train"]
STEP = Progress(step=1, steps=4, epoch=2.0, epochs=4.0)


def make(name):
    archs = METHODS[name].archs if METHODS[name].joint else METHODS[name].archs[-1:]
    specs = {arch: METHODS[name].with_args(arch, SPECS[arch]) for arch in archs}
    nets = {arch: create_backbone(spec, 32, seed=0, arch=arch) for arch, spec in specs.items()}
    known = METHODS[name].options.model_fields
    crops = {} if resolve_options(name).get("views") == 1 else {"n_local": 1}  # need two whole ones
    options = resolve_options(name, {key: v for key, v in (SMALL | crops).items() if key in known})
    method = load_method(name)(nets, options, image_size=32, seed=0)
    for part in method.modules():
        if isinstance(part, MaskedPatches):  # each rank draws its own masks
            part.draw = every_third
    return method


def every_third(count, grid):
    """The same mask for every image."""
    return (torch.arange(grid[0] * grid[1]) % 3 == 0).repeat(count, 1)


def whole_batch(method):
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(8, 3, v.size, v.size, generator=draw) for v in method.views]


def gradients(method):
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def one_step(name, method, wrapped, views):
    """Loss, gradients, and buffers after the step. Evaluation mode: batch normalisation is not under test."""
    method.eval()
    loss = wrapped(views, STEP)["loss"]
    loss.backward()
    found = gradients(method)
    method.after_step(STEP)
    return loss.item(), found, {key: value.clone() for key, value in method.named_buffers()}


def train_two_steps(method, wrapped, views):
    method.train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(views, STEP)["loss"].backward()
        optimizer.step()
        method.after_step(STEP)
    return [p.detach().clone() for p in method.parameters()]


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name in NAMES:
        method = make(name)
        wrapped = DistributedDataParallel(method, static_graph=True)
        half = [v.chunk(2)[rank] for v in whole_batch(method)]
        results[name] = (*one_step(name, method, wrapped, half), train_two_steps(method, wrapped, half))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_whole_batch(ranks, name):
    method = make(name)
    loss, expected, buffers = one_step(name, method, method, whole_batch(method))
    mean_loss = sum(rank[name][0] for rank in ranks) / 2
    assert mean_loss == pytest.approx(loss, rel=1e-5)
    for rank in ranks:
        _, found, found_buffers, _ = rank[name]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
        for key, value in buffers.items():  # dino's centre among them
            torch.testing.assert_close(found_buffers[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_stay_equal_teachers_included(ranks, name):
    first, second = (rank[name][3] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
