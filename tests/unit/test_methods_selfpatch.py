"""SelfPatch: what enters its two losses, where their gradients go, and which nets it takes."""

import math

import pytest
import torch
from test_methods_chunked import most_saved

from pipeline.errors import UserError
from pipeline.methods import selfpatch
from pipeline.methods.base import Progress
from pipeline.methods.registry import METHODS, resolve_options
from pipeline.methods.selfpatch import SelfPatch
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

VIT = Backbone(
    name="vit_tiny_patch16_224",
    args={"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
)
SMALL = {"out_dim": 32, "hidden": 16, "bottleneck": 8, "n_local": 3, "patch_out_dim": 24}


def make(net_args=None, *, name=VIT.name, image_size=32, wanted=True, **given):
    spec = Backbone(name=name, args=(VIT.args if name == VIT.name else {}) | (net_args or {}))
    net = create_backbone(METHODS["selfpatch"].with_args("vit", spec) if wanted else spec, image_size, seed=0)
    options = resolve_options("selfpatch", SMALL | given)
    return SelfPatch({net.arch: net}, options, image_size=image_size, seed=0)


def awake(method):
    """Weights and centres far from the initial ones, where every token and target is much like another."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*method.parameters(), method.centre, method.patch_centre]:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=draw))
    return method


def views_of(method, n=2):
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, v.size, v.size, generator=draw) for v in method.views]


def at(step, *, steps=10, epochs=2.0):
    return Progress(step, steps, step * epochs / steps, epochs)


def gradients(method, loss):
    method.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def entropy(target, score):
    return -(target * torch.log_softmax(score, dim=0)).sum().item()


def patch_terms(method, view):
    """The cross-entropies of one view, patch by patch, by loops."""
    teacher, student = method.teacher.raw_tokens(view), method.backbone.raw_tokens(view)
    side, temperatures = math.isqrt(teacher.shape[1]), (0.04, 0.1)
    terms = []
    for image in range(len(view)):
        for i in range(side * side):
            row, column = divmod(i, side)
            near = []
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    r, c = row + down, column + right
                    if method.options["neighbours"] == "wrap":
                        r, c = r % side, c % side
                    if (down, right) != (0, 0) and 0 <= r < side and 0 <= c < side:
                        near.append(teacher[image, r * side + c])
            near.sort(key=lambda other: -torch.cosine_similarity(other, teacher[image, i], dim=0).item())
            together = method.teacher_aggregate(torch.stack(near[: method.options["top_k"]])[None])
            told = method.teacher_patch_head(together)[0] - method.patch_centre
            said = method.patch_head(method.backbone.net.fc_norm(student[image, i])[None])[0]
            terms.append(entropy((told / temperatures[0]).softmax(dim=0), said / temperatures[1]))
    return terms


def image_terms(method, views, now):
    """The cross-entropies of DINO's loss, pair by pair."""
    scores = [method.student_head(method.aggregate(method.backbone.raw_tokens(view))) for view in views]
    told = [method.teacher_head(method.teacher_aggregate(method.teacher.raw_tokens(v))) for v in views[:2]]
    temperature = method.teacher_temperature(now)
    return [
        entropy(((told[q][b] - method.centre) / temperature).softmax(dim=0), scores[v][b] / 0.1)
        for q in range(2)
        for v in range(len(views))
        if v != q
        for b in range(len(views[0]))
    ]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"patch_mean": "crops"},
        {"patch_crops": "global"},
        {"neighbours": "wrap", "n_local": 0},
        {"top_k": 8, "local_size": 24},
        {"patch_crops": "global", "local_size": 24, "n_local": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_loss_is_that_of_the_formula_term_by_term(given):
    method = awake(make(**given)).eval()
    views, now = views_of(method), at(3)
    crops = views if method.options["patch_crops"] == "all" else views[:2]
    by_crop = [patch_terms(method, view) for view in crops]
    counts = [2 * (view.shape[-1] // 8) ** 2 for view in crops]
    assert [len(terms) for terms in by_crop] == counts
    if method.options["patch_mean"] == "crops":
        expected = sum(sum(terms) / len(terms) for terms in by_crop) / len(crops)
    else:
        expected = sum(map(sum, by_crop)) / sum(counts)
    pairs = image_terms(method, views, now)
    assert len(pairs) == 2 * (2 * len(views) - 2)  # two images
    out = method(views, now)
    assert out["patch_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert out["image_loss"].item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    whole = out["image_loss"] + 0.1 * out["patch_loss"]
    assert out["loss"].item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize(("crops", "patches"), [("all", 2 * 16 + 3 * 4), ("global", 2 * 16)])
def test_every_patch_of_the_crops_is_counted_once_an_image(crops, patches, monkeypatch):
    counted, mean = [], selfpatch.chunked_mean

    def count(piece, rows, *arguments, **options):
        counted.append(len(rows))
        return mean(piece, rows, *arguments, **options)

    monkeypatch.setattr(selfpatch, "chunked_mean", count)
    method = make(patch_crops=crops)
    method(views_of(method, n=5), at(0))
    assert sum(counted) == 5 * patches


def test_the_patch_loss_moves_the_backbone_and_never_the_class_attention():
    grads = {}
    for weight in (0.0, 0.1, 10.0):
        method = awake(make(patch_weight=weight)).eval()
        grads[weight] = gradients(method, method(views_of(method), at(3))["loss"])
    for name, found in grads[10.0].items():
        if name.startswith(("aggregate", "student_head")):
            assert found.abs().sum() > 0 and torch.equal(found, grads[0.0][name]), name
        else:
            assert not torch.equal(found, grads[0.1][name]), name
    assert all(g.abs().sum() > 0 for n, g in grads[0.1].items() if n.startswith(("patch_head", "nets")))
    assert all(g.abs().sum() > 0 for n, g in grads[0.0].items() if n.startswith("nets.vit.net.blocks"))


def test_teachers_get_no_gradient_and_every_student_parameter_does():
    method = make().train()
    found = gradients(method, method(views_of(method), at(0))["loss"])
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad is (name in found) is not name.startswith("teacher"), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crops", ["all", "global"])
def test_chunks_change_neither_loss_nor_gradients_nor_centres(precision, crops):
    results = []
    for chunk in (4096, 5):
        method = awake(make(patch_chunk=chunk, patch_crops=crops)).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            out = method(views_of(method), at(3))
        results.append((out, gradients(method, out["loss"])))
        method.after_step(at(3))
        results[-1][1]["centre"] = method.patch_centre
    (out, grads), (other_out, other_grads) = results
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(out, other_out, **tolerance)
    torch.testing.assert_close(grads, other_grads, **tolerance)


def test_memory_does_not_grow_with_patches_times_prototypes():
    def growth(prototypes, chunk):
        method = make(patch_out_dim=prototypes, patch_chunk=chunk, n_local=0)
        few, many = (
            most_saved(lambda n=n: method(views_of(method, n), at(3))["loss"].backward()) for n in (2, 10)
        )
        return many - few

    added = 8 * 2 * 16  # patches
    one_number = added * 4  # a float of each of them, in bytes
    assert growth(1024, chunk=32) - growth(16, chunk=32) < 32 * one_number
    assert growth(1024, chunk=4096) - growth(16, chunk=4096) > 1000 * one_number


def test_teachers_follow_the_student_and_the_backbone_alone_is_exported():
    method = make()
    with torch.no_grad():
        for part in (method.aggregate, method.patch_head, method.backbone):
            for parameter in part.parameters():
                parameter.add_(1.0)
    slow = (method.teacher_aggregate, method.teacher_patch_head, method.exported()["vit"])
    before = [[p.clone() for p in part.parameters()] for part in slow]
    method.after_step(at(0))  # momentum .996 at the first step
    for part, old in zip(slow, before):
        torch.testing.assert_close(list(part.parameters()), [p + 0.004 for p in old], atol=1e-6, rtol=0)
    assert list(method.exported()) == ["vit"] and method.exported()["vit"] is method.teacher


def test_the_patch_centre_is_a_moving_mean_over_all_patches():
    method, halved = awake(make(n_local=0)).eval(), awake(make(n_local=0)).eval()
    views, told = views_of(method), []
    method.teacher_patch_head.register_forward_hook(lambda head, taken, out: told.append(out))
    old = method.patch_centre.clone()
    method(views, at(0))
    for image in (0, 1):
        halved([view[image, None] for view in views], at(0))
    for each in (method, halved):
        each.after_step(at(0))
    assert len(told[0]) == 2 * 2 * 16
    torch.testing.assert_close(method.patch_centre, 0.9 * old + 0.1 * told[0].mean(dim=0))
    torch.testing.assert_close(halved.patch_centre, method.patch_centre)


def test_prototypes_of_both_heads_are_frozen_during_the_first_epoch_only():
    method = make()
    for step, frozen in ((0, True), (5, False)):  # five steps an epoch
        method.zero_grad()
        method(views_of(method), at(step))["loss"].backward()
        method.after_backward(at(step))
        for head in (method.student_head, method.patch_head):
            assert (head.last_layer.weight.grad is None) is frozen
            assert head.mlp[0].weight.grad is not None


def test_any_place_of_the_final_norm_will_do():
    for args, norm in (({"fc_norm": False}, "norm"), ({"fc_norm": True}, "fc_norm")):
        method = make(args)
        found = gradients(method, method(views_of(method), at(0))["loss"])
        assert found[f"nets.vit.net.{norm}.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "args", "given"),
    [
        ("eva02_tiny_patch14_224", {}, {}),
        ("vit_small_patch16_dinov3", {"patch_size": 14}, {}),  # with register tokens
        ("vit_relpos_small_patch16_224", {"patch_size": 14}, {"n_local": 0}),  # of one size only
    ],
)
def test_other_plain_transformers_will_do(name, args, given):
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    method = make(args | small, name=name, image_size=56, **given)
    found = gradients(method, method(views_of(method), at(0))["loss"])
    for parameter, value in method.named_parameters():
        assert (parameter in found) is value.requires_grad, parameter


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wanted": False}, r"trains patch tokens alone.* has a cls_token; give it args {class_token: false"),
        ({"net_args": {"global_pool": "map"}}, r"has a attn_pool; give it args .*global_pool: avg"),
        ({"net_args": {"patch_drop_rate": 0.5}}, "set patch_drop_rate 0"),
        ({"name": "test_resnet", "wanted": False}, "expected a plain vision transformer, such as vit_small"),
        ({"name": "swin_tiny_patch4_window7_224", "wanted": False, "image_size": 56}, "plain vision trans"),
        (
            {"local_size": 8},
            r"crops of 8 pixels have 1 x 1 patches.* 2 x 2; set image_size, local_size",
        ),
        ({"neighbours": "wrap"}, "crops of 16 pixels have 2 x 2 patches.* needs 3 x 3"),
    ],
    ids=str,
)
def test_a_net_or_a_crop_without_neighbours_of_patches_is_refused(given, message):
    with pytest.raises(UserError, match=message) as refused:
        make(**given)
    assert "\n" not in str(refused.value)
