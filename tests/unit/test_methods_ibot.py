"""iBOT: what the student does not see, and what it is asked about it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import UserError
from pipeline.methods.base import Progress
from pipeline.methods.ibot import Ibot
from pipeline.methods.masking import block_masks
from pipeline.methods.registry import resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.nets.last_block import last_block
from pipeline.specs import Backbone

VIT = Backbone(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
)
SMALL = {"out_dim": 32, "hidden": 16, "bottleneck": 8, "n_local": 0, "patch_out_dim": 24}


def make(**given):
    net = create_backbone(VIT, 32, seed=0)
    method = Ibot({"vit": net}, resolve_options("ibot", SMALL | given), image_size=32, seed=0).eval()
    with torch.no_grad():  # zeros at the start, as black patches of a net that has learnt nothing
        method.patches.mask_token.normal_(generator=torch.Generator().manual_seed(0))
    return method


def views_of(method, n=3):
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(n, 3, v.size, v.size, generator=draw) for v in method.views]


def at(step, *, steps=10, epochs=2.0):
    return Progress(step, steps, step * epochs / steps, epochs)


def masked(method, masks):
    """Let a method draw these masks, (crops, 16) bool."""
    method.patches.draw = lambda count, grid: masks
    return method


def some(*rows):
    masks = torch.zeros(len(rows), 16, dtype=torch.bool)
    for row, places in zip(masks, rows):
        row[list(places)] = True
    return masks


MASKS = some([0, 1, 5], [], [15], [], [2, 3], [])  # of 2 views of 3 images


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def scores(head, last):
    return head(last.normed.flatten(0, 1)).unflatten(0, last.normed.shape[:2])


@pytest.mark.parametrize("shared", [True, False])
def test_patch_loss_counts_the_masked_patches_alone_each_crop_alike(shared):
    method = masked(make(shared_head=shared), MASKS)
    method.patches.centre.normal_()
    views = views_of(method)
    whole = torch.cat(views)
    student_head = method.student_head if shared else method.patches.head
    teacher_head = method.teacher_head if shared else method.patches.teacher_head
    with torch.no_grad():
        taught = scores(teacher_head, last_block(method.teacher, whole))
        seen = last_block(method.backbone, whole, masks=MASKS, mask_token=method.patches.mask_token)
        learnt = scores(student_head, seen)
    crops = []
    for crop, row in enumerate(MASKS):
        losses = [0.0]
        for place in row.nonzero().flatten().tolist():
            p = softmax((taught[crop, place] - method.patches.centre).double().numpy() / 0.04)
            losses.append(-(p * np.log(softmax(learnt[crop, place].double().numpy() / 0.1))).sum())
        crops.append(sum(losses) / max(1, len(losses) - 1))
    out = method(views, at(0))
    assert out["patch_loss"].item() == pytest.approx(np.mean(crops), rel=1e-4)
    total = out["image_loss"] + out["patch_loss"]
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_patch_weight_weighs_the_patch_loss():
    out = masked(make(patch_weight=0.5), MASKS)(views_of(make()), at(0))
    expected = out["image_loss"] + 0.5 * out["patch_loss"]
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_masking_changes_what_the_student_says_of_an_image():
    views = views_of(make())
    one, two = (masked(make(), masks)(views, at(0))["image_loss"] for masks in (MASKS, some(*[range(9)] * 6)))
    assert abs(one.item() - two.item()) > 1e-3


def test_the_teacher_sees_whole_crops():
    method = masked(make(), MASKS)
    views = views_of(method)
    seen = []
    method.teacher.net.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method(views, at(0))
    tokens = seen[0].detach().clone()
    seen.clear()
    with torch.no_grad():
        method.teacher.features(torch.cat(views))
    assert torch.equal(tokens, seen[0])


def test_what_a_masked_patch_showed_does_not_reach_the_student():
    method = masked(make(), some(*[[5]] * 6))
    learnt = []
    loss = method.patches.loss
    method.patches.loss = lambda student, *rest, **more: (
        learnt.append(student) or loss(student, *rest, **more)
    )
    views = views_of(method)
    method(views, at(0))
    for view in views:
        view[:, :, 8:16, 8:16] = 0.5  # patch 5 of 4 × 4
    method(views, at(0))
    assert torch.equal(learnt[0].normed, learnt[1].normed)


def test_small_crops_are_whole():
    method = masked(make(n_local=2), MASKS)
    calls = []
    features = method.backbone.features
    method.backbone.features = lambda x: calls.append(x) or features(x)
    views = views_of(method)
    method(views, at(0))
    assert len(calls) == 1 and torch.equal(calls[0], torch.cat(views[2:]))


@pytest.mark.parametrize("shared", [True, False])
def test_every_student_parameter_learns_and_the_teacher_does_not(shared):
    method = make(shared_head=shared, n_local=1).train()
    method(views_of(method), at(0))["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == ("teacher" not in name), name
    assert method.patches.mask_token.grad.abs().max() > 0


def test_patch_centre_is_a_moving_mean_over_all_patches_of_the_teacher():
    method = masked(make(), MASKS)
    views = views_of(method)
    with torch.no_grad():
        taught = scores(method.teacher_head, last_block(method.teacher, torch.cat(views)))
    method(views, at(0))
    method.after_step(at(0))
    torch.testing.assert_close(method.patches.centre, 0.1 * taught.mean(dim=(0, 1)))


def test_a_head_of_its_own_is_frozen_for_an_epoch_and_followed():
    method = make(shared_head=False).train()
    for step, frozen in ((0, True), (5, False)):  # five steps an epoch
        method.zero_grad()
        method(views_of(method), at(step))["loss"].backward()
        method.after_backward(at(step))
        assert (method.patches.head.last_layer.weight.grad is None) is frozen
    before = method.patches.teacher_head.mlp[0].weight.clone()
    with torch.no_grad():
        method.patches.head.mlp[0].weight.add_(1)
    method.after_step(at(0))
    torch.testing.assert_close(method.patches.teacher_head.mlp[0].weight, before + 0.004, atol=1e-6, rtol=0)


def test_a_net_without_patch_embeddings_is_refused():
    cnn = create_backbone(Backbone(name="test_resnet"), 32, seed=0)
    with pytest.raises(UserError, match="'test_resnet' has no patch embeddings that could be masked"):
        Ibot({"cnn": cnn}, resolve_options("ibot", SMALL), image_size=32, seed=0)


@pytest.mark.parametrize("grid", [(14, 14), (2, 2), (4, 9), (1, 1)])
def test_masks_hold_the_shares_that_were_asked_for(grid):
    torch.manual_seed(0)
    places = grid[0] * grid[1]
    masks = block_masks(40, grid=grid, probability=0.25, share=(0.1, 0.5))
    counts = masks.sum(dim=1)
    assert masks.shape == (40, places) and (counts > 0).sum() == 10
    assert counts.max() <= max(1, round(0.5 * places))
    assert counts[counts > 0].min() >= max(1, round(0.1 * places))
    assert (block_masks(1, grid=grid, probability=0.01, share=(0.1, 0.1)).sum() > 0).all()


def test_masks_are_blocks():
    """Of 59 patches of 14 × 14 at random, one has 1.1 masked neighbours on average; in blocks far more."""
    torch.manual_seed(0)
    masks = block_masks(50, grid=(14, 14), probability=1.0, share=(0.3, 0.3)).view(50, 1, 14, 14).float()
    cross = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0.0]]).view(1, 1, 3, 3)
    neighbours = (F.conv2d(masks, cross, padding=1) * masks).sum() / masks.sum()
    assert masks.sum(dim=(1, 2, 3)).unique().tolist() == [59] and neighbours > 2


def test_masks_come_from_torchs_random_state():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(block_masks(8, grid=(6, 6), probability=0.5, share=(0.1, 0.5)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
