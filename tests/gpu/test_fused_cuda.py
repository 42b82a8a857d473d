"""On a GPU: fused kernels make the views of PyTorch's operations, in few launches, and wait for nothing."""

import warnings

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pipeline.data.augment import Augment
from pipeline.data.draws import sample_keys
from pipeline.data.fused import Fused
from pipeline.data.recipes import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FUSED = sorted(set(RECIPES) - {"none"})


def noise_and_smooth_images(count: int, size: int) -> torch.Tensor:
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[1::2] = torch.nn.functional.avg_pool2d(images[1::2], 7, 1, 3)
    return (images * 255).round().to(torch.uint8).cuda()


@pytest.fixture(autouse=True)
def _a_fallback_is_an_error():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="augmentation by single operations")
        yield


@pytest.mark.parametrize("recipe", FUSED)
@pytest.mark.parametrize(("source", "size"), [(224, 224), (224, 96), (40, 32), (33, 75)])
def test_views_are_those_of_single_operations(recipe, source, size, monkeypatch):
    images, keys = noise_and_smooth_images(24, source), sample_keys(torch.arange(24), seed=0)
    fused = Augment(recipe, size)(images, keys)
    assert fused.min() >= 0 and fused.max() <= 1
    monkeypatch.setattr(Fused, "takes", lambda self, images: False)
    assert (fused - Augment(recipe, size)(images, keys)).abs().max() < 2e-4  # a twentieth of a level


@pytest.mark.parametrize("recipe", FUSED)
@pytest.mark.parametrize("size", [17, 64])
def test_a_view_does_not_depend_on_the_batch_or_where_it_lies(recipe, size):
    images, keys = noise_and_smooth_images(13, 35), sample_keys(torch.arange(13), seed=5)
    augment = Augment(recipe, size)
    together = augment(images, keys)
    alone = torch.cat([augment(images[i : i + 1], keys[i : i + 1]) for i in range(13)])  # any alignment
    assert torch.equal(together, alone)
    assert torch.equal(together, augment(images.flip(0), keys.flip(0)).flip(0))
    assert torch.equal(together[:5], augment(images[:5], keys[:5])), "a last batch"


@pytest.mark.parametrize("recipe", FUSED)
def test_a_view_takes_one_copy_and_few_kernels_and_waits_for_nothing(recipe):
    images, keys, augment = (
        noise_and_smooth_images(64, 64),
        sample_keys(torch.arange(64), seed=0),
        Augment(recipe, 64),
    )
    augment(images, keys)  # compiled
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        torch.cuda.set_sync_debug_mode("error")
        try:
            augment(images, keys)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert 1 <= sum(event.device_type == DeviceType.CUDA for event in trace.events()) <= 8
