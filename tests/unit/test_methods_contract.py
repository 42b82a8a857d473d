"""What every method promises the training loop."""

import pytest
import timm
import torch

from pipeline.errors import UserError
from pipeline.methods.base import Progress, View, cosine_momentum, follow, slow_copy
from pipeline.methods.load import load_method
from pipeline.methods.registry import METHODS, resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export
from pipeline.specs import Backbone

SPECS = {
    "cnn": Backbone(name="test_resnet"),
    "vit": Backbone(
        name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    ),
}
SMALL = {
    "hidden": 32,
    "out_dim": 32,
    "bottleneck": 16,
    "projector_hidden": 32,
    "projector_dim": 16,
    "pretext_hidden": [32, 16],
    "pretext_dropout": 0.0,
    "patch_out_dim": 32,
}
RUNS = [
    (name, archs)
    for name, info in METHODS.items()
    for archs in ([info.archs] if info.joint else [(arch,) for arch in info.archs])
]
TRAINED = [run for run in RUNS if METHODS[run[0]].steps == "train"]


def make(name, archs):
    specs = {arch: METHODS[name].with_args(arch, SPECS[arch]) for arch in archs}
    nets = {arch: create_backbone(spec, 32, seed=3, arch=arch) for arch, spec in specs.items()}
    known = METHODS[name].options.model_fields
    crops = (
        {} if resolve_options(name).get("views") == 1 else {"n_local": 2}
    )  # small ones need two whole ones
    options = resolve_options(name, {key: v for key, v in (SMALL | crops).items() if key in known})
    return load_method(name)(nets, options, image_size=32, seed=3).train()


def batch(method, n=6):
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, v.size, v.size, generator=draw) for v in method.views]


def at(step, steps=3):
    return Progress(step, steps, 2.0 + step / steps, 5.0)


@pytest.mark.parametrize(("name", "archs"), TRAINED)
def test_three_steps_change_the_net_and_lower_the_loss_and_the_export_loads_in_plain_timm(
    name, archs, tmp_path
):
    torch.manual_seed(0)  # of masks
    method = make(name, archs)
    views = batch(method)
    before = {arch: [p.clone() for p in net.parameters()] for arch, net in method.exported().items()}
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(3):
        out = method(views, at(step))
        assert out["loss"].dtype == torch.float32 and out["loss"].ndim == 0
        assert not any(value.requires_grad for key, value in out.items() if key != "loss")
        optimizer.zero_grad()
        out["loss"].backward()
        assert all(p.grad is not None for p in trained)  # DDP needs every parameter used
        method.after_backward(at(step))
        optimizer.step()
        method.after_step(at(step))
        losses.append(out["loss"].item())
    assert losses[-1] < losses[0]
    images = torch.rand(2, 3, 32, 32)
    for arch, net in method.eval().exported().items():
        assert any(not torch.equal(old, new) for old, new in zip(before[arch], net.parameters()))
        export(net, tmp_path / arch, trained={"method": name})
        plain = timm.create_model(f"local-dir:{tmp_path / arch}", pretrained=True, num_classes=0).eval()
        with torch.no_grad():
            assert torch.equal(plain((images - 0.5) / 0.5), net.features(images))


@pytest.mark.parametrize(("name", "archs"), RUNS)
def test_embed_gives_float32_vectors_without_gradient_by_architecture(name, archs):
    vectors = make(name, archs).eval().embed(torch.rand(4, 3, 32, 32))
    assert set(vectors) == set(archs)
    for vector in vectors.values():
        assert vector.shape[0] == 4 and vector.ndim == 2
        assert vector.dtype == torch.float32 and not vector.requires_grad


@pytest.mark.parametrize(("name", "archs"), TRAINED)
def test_the_same_seed_gives_the_same_method_and_leaves_the_random_state_alone(name, archs):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = make(name, archs)
    assert torch.equal(torch.rand(1), expected)
    for key, value in make(name, archs).state_dict().items():
        assert torch.equal(one.state_dict()[key], value), key


@pytest.mark.parametrize("name", [name for name, info in METHODS.items() if not info.joint])
def test_methods_of_one_net_refuse_two(name):
    with pytest.raises(UserError, match="trains one backbone a run, got cnn, vit"):
        make(name, ("cnn", "vit"))


def test_supervised_trains_nothing_and_exports_the_initial_weights():
    method = make("supervised", ("cnn",))
    assert method.views == []
    assert method.exported()["cnn"] is method.nets["cnn"]


def test_bn_refresh_moves_batch_norm_statistics_and_nothing_else():
    method = make("bn_refresh", ("cnn",))
    before = {key: value.clone() for key, value in method.state_dict().items()}
    out = method(batch(method), at(0))
    assert out["loss"].item() == 0 and not out["loss"].requires_grad
    changed = {key for key, value in method.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {key for key in before if "running_" in key or "num_batches_tracked" in key}


def test_byol_predicts_the_other_views_target_and_exports_the_online_net():
    method = make("byol", ("vit",)).eval()
    one, two = batch(method)
    assert [v.recipe for v in method.views] == ["byol_1", "byol_2"]
    target = [method.target_projector(method.target.features(x)) for x in (one, two)]
    online = [method.embed(x)["vit"] for x in (one, two)]
    cosine = torch.nn.functional.cosine_similarity
    expected = sum((2 - 2 * cosine(p, t)).mean() for p, t in zip(online, reversed(target)))
    assert method([one, two], at(0))["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert method.exported()["vit"] is method.backbone


def test_teacher_momentum_starts_as_set_and_ends_at_one():
    values = [cosine_momentum(0.9, at(step, steps=5)) for step in range(5)]
    assert values[0] == pytest.approx(0.9) and values[-1] == 1.0
    assert values[2] == pytest.approx(0.95) and values == sorted(values)


def test_slow_copy_has_no_gradients_and_follow_is_a_moving_average():
    student = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    teacher = slow_copy(student)
    assert not any(p.requires_grad for p in teacher.parameters()) and teacher[1].p == 0
    old = teacher[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1)
    follow(teacher, student, 0.75)
    torch.testing.assert_close(teacher[0].weight, old + 0.25)


def test_weight_decay_spares_biases_and_norms():
    method = make("simclr", ("vit",))
    spared = {name for name, p in method.named_parameters() if method.no_decay(name, p)}
    assert "projector.0.weight" not in spared and "projector.1.weight" in spared  # linear, batch norm
    assert "nets.vit.net.blocks.0.norm1.weight" in spared and "nets.vit.net.blocks.0.mlp.fc1.bias" in spared


def test_views_repeat_a_recipe_with_their_own_draws():
    assert make("simclr", ("cnn",)).views == [View("simclr", 32)] * 2
