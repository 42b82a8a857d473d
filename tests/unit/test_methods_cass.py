"""Cross-architecture methods: what is compared, who gets the gradient, what stands against collapse."""

import copy
import random

import pytest
import torch

from pipeline.errors import UserError
from pipeline.methods.base import Progress
from pipeline.methods.cass import CrossArchitecture
from pipeline.methods.losses import cosine_distance, covariance_term, info_nce, nt_xent, variance_term
from pipeline.methods.registry import resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

CNN = Backbone(name="test_resnet")
VIT = Backbone(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
)
START = Progress(step=0, steps=10, epoch=0.0, epochs=1.0)
SMALL = {"projector_hidden": 32, "projector_dim": 16, "predictor_hidden": 8}


def make(name="cass", **given):
    nets = {
        "cnn": create_backbone(CNN, 32, seed=0, arch="cnn"),
        "vit": create_backbone(VIT, 32, seed=0, arch="vit"),
    }
    return CrossArchitecture(nets, resolve_options(name, SMALL | given), image_size=32, seed=0).eval()


def images(n, count=1):
    return [torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_cass_as_published_compares_the_classifier_logits_of_one_view():
    method = make()
    (view,) = images(4)
    assert [v.recipe for v in method.views] == ["cass"]
    cnn, vit = method.nets["cnn"], method.nets["vit"]
    expected = cosine_distance(cnn.net((view - 0.5) / 0.5), vit.net((view - 0.5) / 0.5))
    assert method([view], START)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_cass_as_published_has_no_stop_gradient_so_both_nets_learn():
    method = make()
    method(images(4), START)["loss"].backward()
    for arch in ("cnn", "vit"):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.nets[arch].parameters())
        assert sum(p.grad.abs().sum() for p in method.nets[arch].parameters()) > 0


def test_cass_as_published_collapses_to_zero_loss_when_both_nets_are_constant():
    method = make()
    with torch.no_grad():
        for arch, head in (("cnn", "fc"), ("vit", "head")):
            layer = getattr(method.nets[arch].net, head)
            layer.weight.zero_()
            layer.bias.fill_(1.0)
    assert method(images(4), START)["loss"].item() == pytest.approx(0, abs=1e-6)


def test_cass_vc_is_the_weighted_sum_over_both_view_orders():
    method = make("cass_vc")
    views = images(6, 2)
    c = [method.embed(v)["cnn"] for v in views]
    t = [method.embed(v)["vit"] for v in views]

    def loss(a, b):
        spread = (variance_term(a) + variance_term(b)) / 2
        return 25 * (a - b).pow(2).mean() + 25 * spread + covariance_term(a) + covariance_term(b)

    expected = (loss(c[0], t[1]) + loss(c[1], t[0])) / 2
    assert method(views, START)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_cass_vc_punishes_collapse():
    method = make("cass_vc")
    with torch.no_grad():
        for head in method.heads.values():
            head[-1].weight.zero_()
            head[-1].bias.fill_(1.0)
    assert method(images(6, 2), START)["loss"].item() == pytest.approx(25 * 0.99, rel=1e-3)


def test_cass_nce_is_the_mean_over_four_pairs():
    method = make("cass_nce")
    views = images(6, 2)
    c = [method.embed(v)["cnn"] for v in views]
    t = [method.embed(v)["vit"] for v in views]
    pairs = [(c[0], t[1]), (c[1], t[0]), (c[0], c[1]), (t[0], t[1])]
    expected = sum(info_nce(a, b, temperature=0.2) for a, b in pairs) / 4
    out = method(views, START)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    own = info_nce(c[0], c[1], temperature=0.2).item()
    assert out["loss_cnn"].item() == pytest.approx(own, rel=1e-4)


def test_one_view_order_runs_each_net_once():
    method = make("cass_vc", symmetric=False)
    seen = []
    original = method.nets["cnn"].features
    method.nets["cnn"].features = lambda x: seen.append(x) or original(x)
    first, second = images(4, 2)
    method([first, second], START)
    assert len(seen) == 1 and torch.equal(seen[0], first)


def test_stop_gradient_lets_a_target_learn_nothing_from_being_predicted():
    method = make("cass", views=2, head="projector", regulariser="stop_gradient", symmetric=False)
    views = images(4, 2)
    method(views, START)["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    # Without the predictors nothing may reach the nets: the targets are detached.
    method.zero_grad()
    for predictor in method.predictors.values():
        predictor.requires_grad_(False)
        for layer in predictor:
            if hasattr(layer, "weight"):
                torch.nn.init.zeros_(layer.weight)
    method(views, START)["loss"].backward()
    assert sum(p.grad.abs().sum().item() for n in method.nets.values() for p in n.parameters()) == 0


def test_logits_of_different_lengths_are_refused():
    nets = {
        "cnn": create_backbone(Backbone(name="test_resnet", args={"num_classes": 10}), 32, seed=0),
        "vit": create_backbone(VIT, 32, seed=0),
    }
    with pytest.raises(UserError, match=r"got 10 \(cnn\) and 1000 \(vit\)"):
        CrossArchitecture(nets, resolve_options("cass"), image_size=32, seed=0)


def test_both_architectures_are_needed():
    nets = {"vit": create_backbone(VIT, 32, seed=0)}
    with pytest.raises(UserError, match="need a cnn and a vit, got vit"):
        CrossArchitecture(nets, resolve_options("cass"), image_size=32, seed=0)


def gradient_of(net):
    return sum(p.grad.abs().sum().item() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize(("learner", "other"), [("cnn", "vit"), ("vit", "cnn")])
@pytest.mark.parametrize("teacher", [False, True])
def test_cross_gradient_lets_only_one_net_learn_from_the_other(learner, other, teacher):
    method = make("cass_nce", cross_gradient=learner, teacher=teacher)
    views = images(6, 2)
    vectors, _ = method._vectors(views)
    targets = method._targets(views) if teacher else vectors
    for pair in [(("cnn", 0), ("vit", 1)), (("cnn", 1), ("vit", 0))]:
        method._pair_loss(pair, vectors, targets).backward(retain_graph=True)
    assert gradient_of(method.nets[learner]) > 0
    assert gradient_of(method.nets[other]) == 0


def test_cross_gradient_leaves_what_a_net_learns_from_itself():
    method = make("cass_nce", cross_gradient="vit")
    method(images(6, 2), START)["loss"].backward()
    assert gradient_of(method.nets["cnn"]) > 0
    own = make("cass_nce")
    views = images(6, 2)
    vectors = [own._vector("cnn", v) for v in views]
    (info_nce(*vectors, temperature=0.2) / 4).backward()
    for (name, p), (_, q) in zip(method.nets["cnn"].named_parameters(), own.nets["cnn"].named_parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_cross_gradient_holds_for_places_too():
    plain, patches = ({"cross_gradient": "vit", "projector_hidden": 16}, {"patch_weight": 0.5})
    views = images(6, 2)
    gradients = []
    for given in (plain, plain | patches):
        method = make("cass_nce", **given)
        method(views, START)["loss"].backward()
        gradients.append([gradient_of(method.nets[arch]) for arch in ("cnn", "vit")])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-4), "the CNN learns from itself alone"
    assert gradients[0][1] != pytest.approx(gradients[1][1], rel=1e-2)


def test_with_teachers_every_side_learns_from_the_other_sides_slow_average():
    method = make("cass_nce", teacher=True)
    views = images(6, 2)
    with torch.no_grad():
        for p in [*method.teachers.parameters(), *method.teacher_heads.parameters()]:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    student = {(a, n): method.embed(v)[a] for a in ("cnn", "vit") for n, v in enumerate(views)}
    teacher = {
        (a, n): method.teacher_heads[a](method.teachers[a].features(v))
        for a in ("cnn", "vit")
        for n, v in enumerate(views)
    }
    pairs = [
        (("cnn", 0), ("vit", 1)),
        (("cnn", 1), ("vit", 0)),
        (("cnn", 0), ("cnn", 1)),
        (("vit", 0), ("vit", 1)),
    ]
    terms = [info_nce(student[a], teacher[b], temperature=0.2) for a, b in pairs]
    terms += [info_nce(student[b], teacher[a], temperature=0.2) for a, b in pairs]
    assert method(views, START)["loss"].item() == pytest.approx((sum(terms) / 8).item(), rel=1e-4)
    assert method.exported()["cnn"] is method.teachers["cnn"]
    before = next(method.teachers["cnn"].parameters()).clone()
    method.after_step(START)
    assert not torch.equal(before, next(method.teachers["cnn"].parameters()))


def test_the_nets_may_also_compare_what_they_say_of_the_same_view():
    views = images(4, 2)
    without, method = make("cass_nce"), make("cass_nce", same_view=True)
    added = [(("cnn", 0), ("vit", 0)), (("cnn", 1), ("vit", 1))]
    assert [pair for pair in method.pairs if pair not in without.pairs] == added
    vectors, _ = method._vectors(views)
    terms = [info_nce(vectors[a], vectors[b], temperature=0.2) for a, b in method.pairs]
    assert method(views, START)["loss"].item() == pytest.approx((sum(terms) / 6).item(), rel=1e-6)
    half = {"pairs": "cross", "symmetric": False, "n_local": 2, "local_size": 16}
    without, method = make("cass_nce", **half), make("cass_nce", same_view=True, **half)
    added = [(("cnn", crop), ("vit", crop)) for crop in (2, 3)]
    assert [pair for pair in method.pairs if pair not in without.pairs] == added


def test_small_crops_are_compared_with_one_whole_view_each():
    method = make("cass_nce", n_local=2, local_size=16)
    assert [(v.recipe, v.size) for v in method.views] == [("gentle", 32)] * 2 + [("gentle_local", 16)] * 2
    locals_ = [(pair, kind) for pair in method.pairs for kind in [max(n for _, n in pair)] if kind >= 2]
    assert len(method.pairs) == 4 + 2 * 4 and len(locals_) == 8
    for (a, b), number in locals_:
        assert a[1] == number and b[1] == number % 2
    views = images(6, 2) + [v[:, :, :16, :16].contiguous() for v in images(6, 2)]
    assert method(views, START)["loss"].isfinite()


def test_with_one_view_order_each_net_sees_one_whole_view_and_the_small_crops():
    """A small crop is compared with the only whole view that the other net sees."""
    method = make("cass_nce", pairs="cross", symmetric=False, n_local=2, local_size=16)
    assert set(method.pairs) == {
        (("cnn", 0), ("vit", 1)),
        *((("cnn", crop), ("vit", 1)) for crop in (2, 3)),
        *((("vit", crop), ("cnn", 0)) for crop in (2, 3)),
    }
    vectors, _ = method._vectors([torch.rand(4, 3, view.size, view.size) for view in method.views])
    assert sorted(vectors) == [("cnn", 0), ("cnn", 2), ("cnn", 3), ("vit", 1), ("vit", 2), ("vit", 3)]


def test_small_crops_need_two_whole_views():
    with pytest.raises(UserError, match="n_local needs views 2"):
        resolve_options("cass", {"n_local": 2})


def test_teacher_is_refused_where_its_regulariser_has_no_use_for_it():
    with pytest.raises(UserError, match="teacher goes with infonce, nt_xent or none"):
        resolve_options("cass_vc", {"teacher": True})


def test_patches_of_one_place_agree_and_those_of_other_places_do_not():
    torch.manual_seed(0)
    method = make("cass_nce", patch_weight=0.5)
    agreement = method.patches
    maps = torch.randn(8, 5, 2, 2)
    agreement.heads["cnn"], agreement.heads["vit"] = torch.nn.Identity(), torch.nn.Identity()
    same = agreement(maps, maps)
    moved = agreement(maps, maps.flip(3))
    assert same < moved / 3


def test_the_finer_map_is_averaged_over_the_cells_of_the_coarser_one():
    agreement = make("cass_nce", patch_weight=0.5).patches
    agreement.heads["cnn"], agreement.heads["vit"] = torch.nn.Identity(), torch.nn.Identity()
    coarse = torch.randn(4, 5, 2, 2)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.manual_seed(1)
    expected = agreement(coarse, coarse)
    torch.manual_seed(1)
    torch.testing.assert_close(agreement(coarse, fine), expected)


def test_patch_loss_is_added_with_its_weight():
    views = images(6, 2)
    torch.manual_seed(0)
    out = make("cass_nce", patch_weight=0.5)(views, START)
    plain = make("cass_nce")(views, START)["loss"]
    torch.testing.assert_close(out["loss"], plain + 0.5 * out["loss_patches"], rtol=1e-4, atol=1e-5)


def test_nt_xent_also_drives_apart_a_nets_own_vectors():
    method = make("cass_nce", regulariser="nt_xent", pairs="cross", symmetric=False)
    views = images(6, 2)
    c, t = method.embed(views[0])["cnn"], method.embed(views[1])["vit"]
    expected = nt_xent(c, t, temperature=0.2).item()
    assert method(views, START)["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_self_pairs_alone_are_two_nets_that_learn_beside_each_other():
    method = make("cass_nce", pairs="self", n_local=2, local_size=16)
    assert len(method.pairs) == 2 + 2 * 2
    assert all(a[0] == b[0] for a, b in method.pairs)


def test_auxiliary_heads_are_of_the_other_architecture_and_their_loss_reaches_the_net():
    method = make("cass_nce", auxiliary=True)
    assert {arch: head.kind for arch, head in method.auxiliaries.items()} == {"cnn": "vit", "vit": "convnext"}
    assert len(method.pairs) == 4 + 4
    views = images(6, 2)
    vectors, _ = method._vectors(views)
    targets = info_nce(vectors["cnn", 0], vectors["cnn_auxiliary", 1], temperature=0.2)
    method.zero_grad()
    targets.backward()
    assert gradient_of(method.nets["cnn"]) > 0 and gradient_of(method.nets["vit"]) == 0
    expected = sum(method._compare(vectors[a], vectors[b], (a, b)) for a, b in method.pairs) / 8
    assert method(views, START)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert "auxiliaries" not in " ".join(method.exported()["cnn"].state_dict())


def test_auxiliary_heads_need_a_projector():
    with pytest.raises(UserError, match="auxiliary needs views 2 and head projector"):
        resolve_options("cass", {"auxiliary": True})


def test_a_net_learns_from_its_heads_slow_copy_and_the_head_from_the_nets():
    """With teachers, and as without them: what the other architecture sees must reach the net."""
    method = make("cass_nce", pairs="self", teacher=True, auxiliary=True)
    views = images(6, 2)
    for parameter in [*method.auxiliaries.parameters(), *method.heads["cnn_auxiliary"].parameters()]:
        parameter.data += 0.1  # the student's: not what its slow copy says
    vectors, _ = method._vectors(views)
    vectors = {slot: vector.detach().requires_grad_() for slot, vector in vectors.items()}
    targets = method._targets(views)
    pair = (("cnn", 0), ("cnn_auxiliary", 1))
    assert pair in method.pairs
    loss = method._pair_loss(pair, vectors, targets)
    terms = [info_nce(vectors[one], targets[other], temperature=0.2) for one, other in (pair, pair[::-1])]
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)
    loss.backward()
    assert all(vectors[slot].grad.abs().sum() > 0 for slot in pair)
    slow = {name: value.clone() for name, value in method.teacher_auxiliaries.state_dict().items()}
    method.after_step(START)
    assert any(
        not torch.equal(value, slow[n]) for n, value in method.teacher_auxiliaries.state_dict().items()
    )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cass", {"patch_weight": 0.5}, "patch_weight needs head projector"),
        ("cass", {"patch_weight": 0.5, "views": 2}, "patch_weight needs head projector"),
        ("cass_nce", {"patch_weight": 0.5, "pairs": "cross", "symmetric": False}, "the same views"),
        ("cass_vc", {"regulariser": "stop_gradient", "auxiliary": True}, "auxiliary does not go with"),
        ("cass_nce", {"patch_weight": 0.5, "pairs": "self"}, "compares the nets with each other"),
        ("cass_nce", {"pairs": "cross", "cross_gradient": "vit"}, "the cnn would learn from nothing"),
        ("cass_nce", {"pairs": "self", "cross_gradient": "vit"}, "there is nothing to learn from the other"),
        ("cass", {"cross_gradient": "cnn"}, "the vit would learn from nothing"),
        ("cass", {"same_view": True}, "same_view needs views 2"),
        ("cass_nce", {"same_view": True, "pairs": "self"}, "same_view needs views 2"),
        ("cass_nce", {"same_view": True, "pairs": "cross", "symmetric": False}, "no view that both nets see"),
    ],
)
def test_what_does_not_go_together_is_refused(name, given, message):
    with pytest.raises(UserError, match=message):
        resolve_options(name, given)


CHOICES = {
    "views": [1, 2],
    "head": ["logits", "projector"],
    "pairs": ["cross", "cross+self", "self"],
    "symmetric": [True, False],
    "same_view": [False, True],
    "cross_gradient": ["both", "vit"],
    "n_local": [0, 1, 2],
    "auxiliary": [False, True],
    "teacher": [False, True],
    "patch_weight": [0, 0.5],
    "regulariser": ["none", "variance_covariance", "infonce", "nt_xent", "stop_gradient"],
}


def test_whatever_is_accepted_trains_and_everything_in_it_learns():
    """A sample of all combinations: each is refused before a net is built, or all its weights learn."""
    draw = random.Random(0)
    nets = {arch: create_backbone(spec, 32, seed=0, arch=arch) for arch, spec in (("cnn", CNN), ("vit", VIT))}
    accepted = 0
    for _ in range(400):
        given = {name: draw.choice(values) for name, values in CHOICES.items()}
        try:
            options = resolve_options("cass", SMALL | given)
        except UserError:
            continue
        accepted += 1
        method = CrossArchitecture(copy.deepcopy(nets), options, image_size=32, seed=0)
        views = [torch.rand(3, 3, view.size, view.size) for view in method.views]
        method(views, START)["loss"].backward()
        moved: dict[str, float] = {}  # of each net and head
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (given, name)
                part = ".".join(name.split(".")[: 3 if name.startswith("patches") else 2])
                moved[part] = moved.get(part, 0.0) + parameter.grad.abs().sum().item()
        assert all(moved.values()), (given, moved)
    assert accepted > 25
