"""On a GPU: the draws of a CPU, and a training that resumes."""

import pytest
import torch

from pipeline.data.augment import Augment
from pipeline.data.draws import sample_keys
from pipeline.data.recipes import RECIPES
from pipeline.train.boundary import Boundary
from pipeline.train.distributed import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_view_is_the_same_on_both_devices_and_in_any_batch(recipe):
    images = torch.randint(0, 256, (9, 3, 40, 40), dtype=torch.uint8)
    keys = sample_keys(torch.arange(9), seed=0)
    augment = Augment(recipe, 32)
    together = augment(images.cuda(), keys)
    # Solarising flips at a threshold, where the last bit of rounding decides.
    assert ((together.cpu() - augment(images, keys)).abs() < 1e-3).float().mean() > 0.999
    alone = torch.cat([augment(images[i : i + 1].cuda(), keys[i : i + 1]) for i in range(9)])
    assert torch.equal(together, alone)


def test_flags_come_one_step_late_and_settle_reads_the_newest():
    boundary = Boundary(World(device=torch.device("cuda", 0)))
    fine, broken = torch.tensor(1.0, device="cuda"), torch.tensor(float("nan"), device="cuda")
    assert boundary.exchange(fine, step=0, stop=True, save=False).stop is False
    late = boundary.exchange(broken, step=1, stop=False, save=False)
    assert late.stop and late.broken is None
    assert boundary.settle().broken == (0, 1)
