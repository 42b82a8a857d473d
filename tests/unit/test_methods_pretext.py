"""Pretext tasks beside the contrast: right labels, in their time, and nothing of them where they are off."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data.feed import Batch
from pipeline.methods.base import Progress, View
from pipeline.methods.load import load_method
from pipeline.methods.losses import nt_xent
from pipeline.methods.pretext import Jigsaw, Rotation, distant_permutations, tiles
from pipeline.methods.registry import METHODS, resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone
from pipeline.train.views import Views

torch.set_num_threads(1)
SMALL = {"hidden": 32, "out_dim": 16, "pretext_hidden": [16, 8]}


def make(name="simclr", *, net="test_scatnet", **options):
    backbone = create_backbone(Backbone(name=net), 32, seed=3, arch="cnn")
    resolved = resolve_options(name, SMALL | options)
    return load_method(name)({"cnn": backbone}, resolved, image_size=32, seed=3).train()


def at(epoch, *, epochs=100.0):
    return Progress(step=int(epoch), steps=int(epochs), epoch=epoch, epochs=epochs)


def batch(method, n=6):
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, 32, 32, generator=draw) for _ in method.views]


class Means(nn.Module):
    """Stands for a backbone: the mean brightness of each cell of a grid."""

    def __init__(self, cells):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(cells)

    def features(self, images):
        return self.pool(images.mean(1, keepdim=True)).flatten(1)


def test_a_turned_view_is_the_turned_image_to_the_bit():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    counters = torch.arange(3)
    for recipe in ("none", "simclr"):
        plain = View(recipe, 24)
        for turn in range(4):
            turned = Views([View(recipe, 24, turn=turn)], seed=5)(Batch(images, counters))
            by_hand = Views([plain], seed=5)(Batch(torch.rot90(images, turn, (2, 3)), counters))
            assert torch.equal(turned[0], by_hand[0])


def test_rotation_is_asked_of_the_view_that_was_turned_so():
    method = make("scatsimclr")
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :16, :16] = 255  # the bright quarter moves anticlockwise with each turn
    views = [View("none", view.size, turn=view.turn) for view in method.views]
    made = Views(views, seed=0)(Batch(images, torch.arange(2)))
    task = Rotation(4).eval()
    task.head = nn.Linear(4, 4, bias=False)
    quarters = torch.tensor([0, 2, 3, 1])  # where it is after so many turns, row by row
    task.head.weight.data = 50 * nn.functional.one_hot(quarters, 4).float()
    loss, accuracy = task(Means(2), [made[0], *made[2:]])
    assert accuracy == 1 and loss < 1e-3


def test_tiles_are_the_image_row_by_row_each_at_full_size():
    image = torch.arange(9.0).reshape(3, 3).repeat_interleave(10, 0).repeat_interleave(10, 1)
    cut = tiles(nn.functional.pad(image, (1, 1, 1, 1), value=99).expand(2, 3, 32, 32))
    assert cut.shape == (2, 9, 3, 32, 32)
    assert torch.equal(cut, torch.arange(9.0).view(1, 9, 1, 1, 1).expand_as(cut))


def test_jigsaw_is_asked_for_the_order_that_the_tiles_were_put_in():
    task = Jigsaw(1, hidden=(8, 8), dropout=0.0, count=20)
    task.tile = nn.Identity()
    orders = task.permutations.float()
    task.head = nn.Linear(9, 20)  # distance to each order, where tile i has the value i
    task.head.weight.data, task.head.bias.data = 2 * orders, -orders.square().sum(1)
    image = torch.arange(9.0).reshape(3, 3).repeat_interleave(10, 0).repeat_interleave(10, 1)
    torch.manual_seed(0)
    loss, accuracy = task(Means(1), [image.expand(64, 3, 30, 30)])
    assert accuracy == 1 and loss < 0.1


def test_permutations_are_far_apart_and_always_the_same():
    chosen = distant_permutations(9, 35)
    assert chosen.shape == (35, 9) and (np.sort(chosen, axis=1) == np.arange(9)).all()
    apart = (chosen[:, None] != chosen[None]).sum(-1)
    assert apart[~np.eye(35, dtype=bool)].min() == 7
    assert apart[:9, :9][~np.eye(9, dtype=bool)].min() == 9  # no more than nine can differ everywhere
    few = distant_permutations(4, 7)
    for number in range(1, 7):  # each is as far from those before it as any permutation could be
        best = max(
            min(sum(a != b for a, b in zip(p, q)) for q in few[:number]) for p in permutations(range(4))
        )
        assert min((few[number] != before).sum() for before in few[:number]) == best
    assert (few == distant_permutations.__wrapped__(4, 7)).all() and (few[0] == range(4)).all()


@pytest.mark.parametrize(
    ("epochs", "changed", "start"),
    [
        (100, {}, 40),  # the paper's
        (1000, {}, 40),
        (5, {}, 2),
        (5, {"pretext_start_share": 0.0}, 0),
        (100, {"pretext_start_epochs": 10}, 10),
    ],
)
def test_its_weight_is_0_until_40_epochs_or_two_fifths_of_a_shorter_training(epochs, changed, start):
    method = make("scatsimclr", **changed)
    for epoch, active in ((0, start == 0), (start - 0.01, False), (start, True), (epochs, True)):
        if epoch < 0:
            continue
        views = batch(method)[: method.views_needed(at(epoch, epochs=epochs))]
        assert len(views) == (6 if active else 2)
        out = method(views, at(epoch, epochs=epochs))
        assert ("loss_pretext" in out) == active
        if active:
            expected = out["loss_contrast"] + 0.3 * out["loss_pretext"]
            torch.testing.assert_close(out["loss"].detach(), expected)


@pytest.mark.parametrize("kind", ["rotation", "jigsaw"])
def test_before_its_time_the_head_has_gradients_of_zero_and_is_not_worn_away(kind):
    method = make(pretext=kind, pretext_start_epochs=2)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01, weight_decay=0.1)
    for epoch, active in ((0.0, False), (1.0, False), (2.0, True)):
        before = [p.clone() for p in method.pretext.parameters()]
        optimizer.zero_grad()
        now = at(epoch)
        method(batch(method)[: method.views_needed(now)], now)["loss"].backward()
        grads = [p.grad for p in method.pretext.parameters()]
        assert all(g is not None for g in grads) and any(g.any() for g in grads) == active
        method.after_backward(now)
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, method.pretext.parameters())]
        assert all(moved) if active else not any(moved)


def test_with_weight_0_it_is_plain_simclr():
    views = batch(make("scatsimclr"))
    off, plain = make(pretext="rotation", pretext_weight=0), make()
    assert off.views_needed(at(99)) == 2
    loss = off(views[:2], at(99))["loss"]
    assert torch.equal(loss, plain(views[:2], at(99))["loss"])


def test_without_a_pretext_simclr_has_nothing_of_it():
    method = make()
    assert method.views == [View("simclr", 32)] * 2 and METHODS["simclr"].preset == {}
    assert {key.partition(".")[0] for key in method.state_dict()} == {"nets", "projector"}
    one, two = batch(method)
    out = method.eval()([one, two], at(99))
    assert set(out) == {"loss"}
    expected = nt_xent(*(method.embed(v)["cnn"] for v in (one, two)), temperature=0.5)
    torch.testing.assert_close(out["loss"], expected)


def test_the_heads_are_the_published_ones():
    assert [tuple(p.shape) for p in Rotation(2048).parameters() if p.ndim == 2] == [
        (512, 2048),
        (128, 512),
        (4, 128),
    ]
    assert [tuple(p.shape) for p in Jigsaw(2048).parameters() if p.ndim == 2] == [
        (512, 2048),
        (4096, 4608),
        (35, 4096),
    ]
    method = make("scatsimclr", hidden=2048, out_dim=128)
    assert not any(isinstance(part, nn.BatchNorm1d) for part in method.modules())
    assert METHODS["scatsimclr"].backbones["cnn"].name == "scatnet16"


def test_what_is_random_in_it_comes_from_torchs_generator_and_orders_are_in_the_checkpoint():
    method = make(pretext="jigsaw", pretext_start_share=0)
    views = batch(method)

    def loss(seed):
        torch.manual_seed(seed)
        return method(views, at(0))["loss_pretext"].item()

    assert loss(1) == loss(1) != loss(2)
    assert "pretext.permutations" in method.state_dict()


@pytest.mark.parametrize("kind", ["rotation", "jigsaw"])
def test_the_net_learns_it(kind):
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 32)  # brighter to the right and, more so, to the bottom
    images = ((0.3 * ramp + 0.6 * ramp[:, None]) * 255).to(torch.uint8).expand(8, 3, 32, 32)
    method = make(
        net="test_resnet", pretext=kind, pretext_start_share=0, pretext_weight=1.0, pretext_dropout=0.0,
        pretext_hidden=[32, 32], jigsaw_permutations=4,
    )  # fmt: skip
    made = Views([View("none", 32, turn=view.turn) for view in method.views], seed=0)
    views = [v + 0.05 * torch.rand_like(v) for v in made(Batch(images, torch.arange(8)))]
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        out = method(views, at(0))
        out["loss"].backward()
        optimizer.step()
    assert out["pretext_accuracy"] > 0.9
