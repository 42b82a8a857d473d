"""Cross-architecture methods: what is compared, who gets the gradient, what stands against collapse."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.methods.base import Progress
from pipeline.methods.cass import CrossArchitecture
from pipeline.methods.losses import cosine_distance, covariance_term, info_nce, variance_term
from pipeline.methods.registry import resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

CNN = Backbone(name="test_resnet")
VIT = Backbone(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
)
START = Progress(step=0, steps=10, epoch=0.0, epochs=1.0, steps_per_epoch=10)
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
