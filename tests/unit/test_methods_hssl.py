"""HSSL: the teacher's head teaches base and head, and is gone after pretraining."""

import numpy as np
import pytest
import timm
import torch

from pipeline.errors import UserError
from pipeline.methods.base import Progress
from pipeline.methods.hssl import Hssl
from pipeline.methods.losses import cosine_distance, info_nce, variance_covariance
from pipeline.methods.options import HsslHead
from pipeline.methods.registry import resolve_options
from pipeline.nets.auxiliary import KINDS
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export
from pipeline.specs import Backbone

SPECS = {
    "cnn": Backbone(name="resnet10t", args={"channels": [16, 16, 32, 32]}),
    "vit": Backbone(
        name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    ),
}
SMALL = {"out_dim": 16, "hidden": 16, "bottleneck": 8}


def make(arch="vit", name="hssl", **given):
    net = create_backbone(SPECS[arch], 64, seed=0, arch=arch)
    return Hssl({arch: net}, resolve_options(name, SMALL | given), image_size=64, seed=0).eval()


def views_of(method, n=3):
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(n, 3, v.size, v.size, generator=draw) for v in method.views]


def at(step, *, steps=10, epochs=2.0):
    return Progress(step, steps, step * epochs / steps, epochs)


def stray(method):
    """Move the teacher away from its student."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in (method.teacher, method.teacher_towers):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return method


@torch.no_grad()
def says(method, images, *, teacher=False):
    """What base and head say of images, by parts and no shortcut through ``Hssl``."""
    net, towers = (method.teacher, method.teacher_towers) if teacher else (method.backbone, method.towers)
    (raw,) = net.net.forward_intermediates(net.normalise(images), indices=1, intermediates_only=True)
    (kind,) = method.kinds
    _, pooled = towers.auxiliaries[kind](raw.flatten(2).transpose(1, 2), *raw.shape[2:])
    return towers.heads["base"](net.features(images)).float(), towers.heads[kind](pooled).float()


def distance(target, scores, centre):
    """H by the slow formula, of one image."""

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    p = softmax((target - centre).double().numpy() / 0.04)
    return -(p * np.log(softmax(scores.double().numpy() / 0.1))).sum()


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_loss_is_the_mean_of_both_distances_to_the_teachers_head_over_all_other_views(arch):
    method = stray(make(arch, n_local=1))
    method.centres.normal_(generator=torch.Generator().manual_seed(3))
    views = views_of(method)
    targets = [says(method, view, teacher=True)[1] for view in views[:2]]
    learnt = [says(method, view) for view in views]
    terms = [
        (distance(t[b], base[b], method.centres[0]) + distance(t[b], own[b], method.centres[0])) / 2
        for q, t in enumerate(targets)
        for v, (base, own) in enumerate(learnt)
        for b in range(3)
        if v != q
    ]
    assert len(terms) == 2 * 2 * 3
    out = method(views, at(0))
    assert out["loss"].item() == pytest.approx(np.mean(terms), rel=1e-4)
    assert out["loss"].item() == pytest.approx((out["loss_base"] + out["loss_auxiliary"]).item() / 2)


def test_the_teachers_base_teaches_nothing():
    """What its base's projector says enters no loss; what its head's projector says enters both."""
    method = make()
    views = views_of(method)
    before = method(views, at(0))
    with torch.no_grad():
        method.teacher_towers.heads["base"].mlp[-1].weight.mul_(-3)
    assert torch.equal(method(views, at(0))["loss"], before["loss"])
    with torch.no_grad():
        method.teacher_towers.heads["convnext"].mlp[-1].weight.mul_(-3)
    after = method(views, at(0))
    for name in ("loss_base", "loss_auxiliary"):
        assert abs((after[name] - before[name]).item()) > 1e-3


def test_the_heads_own_loss_reaches_the_base():
    method = make()
    method.towers.base = lambda last: says(method, torch.cat(views))[0]  # without gradient
    views = views_of(method)
    method(views, at(0))["loss"].backward()
    gradients = [p.grad for p in method.backbone.net.blocks.parameters()]
    assert all(g is not None for g in gradients) and sum(g.abs().sum() for g in gradients) > 0


def test_the_head_sees_raw_tokens_not_those_after_the_bases_norm():
    method = make()
    images = views_of(method)[0]
    own = method.towers.auxiliary(method.towers.read(method.backbone, images))["convnext"]
    with torch.no_grad():
        method.backbone.net.norm.weight.mul_(5)
    again = method.towers.auxiliary(method.towers.read(method.backbone, images))["convnext"]
    assert torch.equal(own, again)


@pytest.mark.parametrize("arch", ["cnn", "vit"])
@pytest.mark.parametrize("head", KINDS)
def test_every_head_trains_on_every_base_with_local_crops(arch, head):
    method = make(arch, head=head, n_local=1).train()
    out = method(views_of(method), at(0))
    out["loss"].backward()
    assert out["loss"].isfinite()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == ("teacher" not in name), name


def test_prototypes_are_shared_and_projectors_are_not():
    heads = make().towers.heads
    assert heads["base"].last_layer is heads["convnext"].last_layer
    assert heads["base"].mlp is not heads["convnext"].mlp
    heads = make(separate_projectors=False).towers.heads
    assert heads["base"] is heads["convnext"]
    with pytest.raises(UserError, match=r"as wide as the 64 features .*, not 32 wide: set head_width"):
        make(separate_projectors=False, head_width=32)


def test_the_homogeneous_control_is_a_head_of_the_bases_own_kind():
    assert make("vit", head="homogeneous").kinds == ["vit"]
    assert make("cnn", head="homogeneous").kinds == ["resnet"]


def test_the_class_token_is_seen_only_where_it_is_asked_for():
    for only in (True, False):
        method = make(patch_tokens_only=only)
        images = views_of(method)[0]
        last = method.towers.read(method.backbone, images)
        assert (last.class_token is None) == only
        tokens = last.tokens if only else last.tokens + last.class_token[:, None]
        _, pooled = method.towers.auxiliaries["convnext"](tokens, last.height, last.width)
        assert torch.equal(method.towers.pooled(last)["convnext"], pooled)
    with pytest.raises(UserError, match="has no class token: patch_tokens_only must be true"):
        make("cnn", patch_tokens_only=False)


def test_a_search_must_have_named_the_head():
    with pytest.raises(UserError, match="head 'search' stands for the winner of a search"):
        make(head="search")


def test_centre_is_a_moving_mean_of_the_teachers_head():
    method = stray(make())
    views = views_of(method)
    mean = torch.cat([says(method, view, teacher=True)[1] for view in views]).mean(dim=0)
    method(views, at(0))
    method.after_step(at(0))
    torch.testing.assert_close(method.centres[0], 0.1 * mean)


def test_teacher_follows_base_head_and_projectors():
    method = make()
    pairs = [(method.teacher, method.backbone), (method.teacher_towers, method.towers)]
    before = [[p.clone() for p in slow.parameters()] for slow, _ in pairs]
    with torch.no_grad():
        for _, fast in pairs:
            for parameter in fast.parameters():
                parameter.add_(1)
    method.after_step(at(0))
    for (slow, _), old in zip(pairs, before):
        for parameter, was in zip(slow.parameters(), old):
            torch.testing.assert_close(parameter, was + 0.004, atol=1e-6, rtol=0)


def test_prototypes_are_frozen_during_the_first_epoch():
    method = make()
    for step, frozen in ((0, True), (5, False)):  # five steps an epoch
        method.zero_grad()
        method(views_of(method), at(step))["loss"].backward()
        method.after_backward(at(step))
        assert (method.towers.image_head.last_layer.weight.grad is None) is frozen


def test_ibot_as_host_adds_the_bases_own_patch_loss():
    plain, method = stray(make()), stray(make(name="hssl_ibot"))
    torch.manual_seed(0)
    out = method(views_of(method), at(0))
    assert out["patch_loss"] > 0
    image_loss = (out["loss_base"] + out["loss_auxiliary"]) / 2
    assert out["loss"].item() == pytest.approx((image_loss + out["patch_loss"]).item(), rel=1e-5)
    method.patches.draw = lambda count, grid: torch.zeros(count, 64, dtype=torch.bool)
    unmasked = method(views_of(method), at(0))
    assert unmasked["patch_loss"] == 0
    torch.testing.assert_close(unmasked["loss"], plain(views_of(plain), at(0))["loss"])


def test_ibot_as_host_needs_a_vit():
    with pytest.raises(UserError, match="'resnet10t' has no patch embeddings that could be masked"):
        make("cnn", host="ibot")


def test_simclr_as_host_contrasts_both_with_the_teachers_head_of_the_other_view():
    method = stray(make(host="simclr"))
    assert [view.recipe for view in method.views] == ["simclr", "simclr"]
    views = views_of(method)
    targets = [says(method, view, teacher=True)[1] for view in views]
    (base, own), (base2, own2) = (says(method, view) for view in views)
    pairs = [(base, targets[1]), (base2, targets[0]), (own, targets[1]), (own2, targets[0])]
    expected = sum(info_nce(*pair, temperature=0.2) for pair in pairs) / 4
    assert method(views, at(0))["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert method.exported()["vit"] is method.backbone


@pytest.mark.parametrize("agreement", ["cosine", "infonce", "variance_covariance"])
def test_cass_as_host_lets_base_and_head_agree_across_views_without_a_teacher(agreement):
    method = make(host="cass", agreement=agreement)
    assert not hasattr(method, "teacher")
    compare = {
        "cosine": cosine_distance,
        "infonce": lambda a, b: info_nce(a, b, temperature=0.2),
        "variance_covariance": lambda a, b: variance_covariance(
            a, b, invariance=25, variance=25, covariance=1
        ),
    }[agreement]
    views = views_of(method)
    (base, own), (base2, own2) = (says(method, view) for view in views)
    expected = (compare(base, own2) + compare(base2, own)) / 2
    out = method(views, at(0))
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    out["loss"].backward()
    method.after_step(at(0))
    assert all(p.grad is not None for p in method.parameters())


def test_without_the_head_the_export_is_a_plain_timm_model(tmp_path):
    method = stray(make(name="hssl_ibot"))
    export(method.exported()["vit"], tmp_path, trained={"method": "hssl"})
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    bare = timm.create_model(SPECS["vit"].name, num_classes=0, img_size=64, **SPECS["vit"].args)
    assert plain.state_dict().keys() == bare.state_dict().keys()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain((images - 0.5) / 0.5), method.teacher.features(images))


def test_every_kind_of_head_is_an_option():
    assert set(KINDS) == set(HsslHead.__args__)


def test_options_that_do_not_fit_each_other_are_refused():
    for given, message in (
        ({"host": "cass", "n_local": 2}, "n_local needs host dino or ibot: cass compares two whole views"),
        ({"candidates": ["vit", "vit"]}, "a candidate stands there twice"),
        ({"mask_share_min": 0.6}, "mask_share_min is more than mask_share_max"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_options("hssl", given)
