"""DINO: which pairs enter the loss, and what moves the teacher, the centre and the prototypes."""

import math

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.methods.base import Progress
from pipeline.methods.dino import Dino, default_local_size, distillation_loss
from pipeline.methods.registry import resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

CNN = Backbone(name="test_resnet")
VIT = Backbone(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
)
SMALL = {"out_dim": 32, "hidden": 16, "bottleneck": 8, "n_local": 3, "freeze_last_layer_epochs": 1.0}


def make(arch="vit", **given):
    net = create_backbone(VIT if arch == "vit" else CNN, 32, seed=0)
    return Dino({arch: net}, resolve_options("dino", SMALL | given), image_size=32, seed=0)


def views_of(method, n=4):
    return [torch.rand(n, 3, v.size, v.size) for v in method.views]


def at(step, *, steps=10, epochs=2.0):
    return Progress(step, steps, step * epochs / steps, epochs)


def test_loss_is_the_mean_over_all_pairs_of_different_views():
    scores, targets, centre = torch.randn(5, 3, 7), torch.randn(2, 3, 7), torch.randn(7)
    loss, entropy = distillation_loss(
        scores, targets, centre=centre, student_temperature=0.1, teacher_temperature=0.05
    )

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    pairs = []
    for q in range(2):
        for v in range(5):
            for b in range(3) if v != q else ():
                p = softmax((targets[q, b] - centre).double().numpy() / 0.05)
                pairs.append(-(p * np.log(softmax(scores[v, b].double().numpy() / 0.1))).sum())
    assert len(pairs) == 3 * (2 * 5 - 2)
    assert loss.item() == pytest.approx(np.mean(pairs), rel=1e-4)
    assert 0 <= entropy.item() <= math.log(7)


def test_views_are_two_global_crops_and_smaller_local_ones():
    method = make()
    assert [v.recipe for v in method.views] == ["dino_global_1", "dino_global_2"] + ["dino_local"] * 3
    assert [v.size for v in method.views] == [32, 32, 16, 16, 16]
    assert default_local_size(224, 16) == 96
    assert [v.recipe for v in make(crops="wide", n_local=0).views] == ["wide_global_1", "wide_global_2"]


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_teacher_gets_no_gradient_and_every_student_parameter_does(arch):
    method = make(arch).train()
    method(views_of(method), at(0))["loss"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("teacher"):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None, name


def test_teacher_follows_the_student_by_its_momentum_and_is_exported():
    method = make()
    exported = method.exported()["vit"]
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in exported.parameters()]
    method.after_step(at(0))  # momentum .996 at the first step
    for old, new in zip(before, exported.parameters()):
        torch.testing.assert_close(new, old + 0.004, atol=1e-6, rtol=0)
    before = [p.clone() for p in exported.parameters()]
    method.after_step(at(9))  # and 1 at the last: the teacher stays
    assert all(torch.equal(old, new) for old, new in zip(before, exported.parameters()))


def test_centre_is_a_moving_mean_of_the_teachers_outputs():
    method = make(n_local=0).eval()
    views = views_of(method)
    with torch.no_grad():
        outputs = method.teacher_head(method.teacher.features(torch.cat(views)))
    method(views, at(0))
    method.after_step(at(0))
    torch.testing.assert_close(method.centre, 0.1 * outputs.mean(dim=0))


def test_centre_weighs_accumulated_micro_batches_as_one_batch():
    one, two = make(n_local=0).eval(), make(n_local=0).eval()
    views = views_of(one)
    one(views, at(0))
    for half in (slice(0, 2), slice(2, 4)):
        two([v[half] for v in views], at(0))
    for method in (one, two):
        method.after_step(at(0))
    torch.testing.assert_close(one.centre, two.centre)


def test_last_layer_is_frozen_during_the_first_epoch_only():
    method = make()
    weight = method.student_head.last_layer.weight
    for step, frozen in ((0, True), (4, True), (5, False)):  # five steps an epoch
        method.zero_grad()
        method(views_of(method), at(step))["loss"].backward()
        method.after_backward(at(step))
        assert (weight.grad is None) is frozen, step
        assert method.student_head.mlp[0].weight.grad is not None


def test_teacher_temperature_rises_linearly_then_stays():
    method = make(teacher_warmup_epochs=2.0)
    values = [method.teacher_temperature(Progress(0, 10, epoch, 10.0)) for epoch in (0.0, 1.0, 2.0, 9.0)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_a_net_without_local_crops_needs_no_second_size():
    method = make(n_local=0)
    assert method(views_of(method), at(0))["loss"].isfinite()


def test_local_crops_that_cannot_be_patched_are_refused():
    with pytest.raises(UserError, match=r"local crops of 20 pixels .*; set local_size, or n_local 0"):
        make(local_size=20)
    with pytest.raises(UserError, match=r"32 pixels are not smaller than the images of 32: set a smaller"):
        make(local_size=32)


def test_teacher_drops_no_paths():
    net = create_backbone(VIT.model_copy(update={"args": VIT.args | {"drop_path_rate": 0.5}}), 32, seed=0)
    method = Dino({"vit": net}, resolve_options("dino", SMALL), image_size=32, seed=0).train()
    images = torch.rand(32, 3, 32, 32)
    assert torch.equal(method.teacher.features(images), method.teacher.features(images))
    assert not torch.equal(method.backbone.features(images), method.backbone.features(images))


@pytest.mark.parametrize("retried", [6, 3])  # the next step, or an earlier one after going back
def test_a_step_that_was_not_taken_leaves_nothing_in_the_centre(retried):
    one, two = make(n_local=0).eval(), make(n_local=0).eval()
    views = views_of(one)
    one([torch.full_like(view, float("nan")) for view in views], at(5))
    for method in (one, two):
        method(views, at(retried))
        method.after_step(at(retried))
    assert one.centre.isfinite().all() and torch.equal(one.centre, two.centre)
