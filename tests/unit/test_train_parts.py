"""The parts of the training loop: schedules, health, logs, batch normalisation, devices."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pipeline.data.recipes import RECIPES
from pipeline.errors import UserError
from pipeline.methods.base import Method, Progress, View
from pipeline.methods.load import load_method
from pipeline.methods.registry import resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone, Training
from pipeline.train import distributed
from pipeline.train.distributed import World
from pipeline.train.health import describe, is_collapsed
from pipeline.train.logs import Log, read_log
from pipeline.train.optim import learning_rate, make_optimizer, set_schedule, weight_decay
from pipeline.train.profiling import NoProfile
from pipeline.train.step import Stepper
from pipeline.train.syncbn import CpuSyncBatchNorm, batch_norms, batch_statistics
from pipeline.train.views import Views

torch.set_num_threads(1)


def test_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine_to_its_end():
    training = Training(lr=1.0, lr_min=0.1, warmup_epochs=2)
    rates = [learning_rate(training, step=s, steps=20, steps_per_epoch=2.5) for s in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[12] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert rates[5:] == sorted(rates[5:], reverse=True)
    constant = Training(lr=0.5, schedule="constant")
    assert learning_rate(constant, step=19, steps=20, steps_per_epoch=2) == 0.5
    longer = Training(lr=1.0, warmup_epochs=100)  # a warm-up longer than the training still ends in it
    assert learning_rate(longer, step=2, steps=4, steps_per_epoch=2) == 1.0


def test_a_recipe_that_the_user_names_leaves_small_crops_small():
    views = [View("simclr", 32), View("simclr", 32), View("dino_local", 16)]
    named = {recipe: Views(views, seed=0, recipe=recipe).augment for recipe in ("gentle", "light")}
    recipes = {name: [augment.recipe for augment in augments] for name, augments in named.items()}
    assert recipes["gentle"] == [RECIPES["gentle"]] * 2 + [RECIPES["gentle_local"]]
    assert recipes["light"] == [RECIPES["light"]] * 2 + [RECIPES["dino_local"]]
    assert [augment.size for augment in named["light"]] == [32, 32, 16]
    assert Views([], seed=0, recipe="gentle").augment == []


def test_weight_decay_goes_to_its_end_and_spares_what_the_method_names():
    class Tiny(Method):
        def __init__(self):
            super().__init__({}, {}, image_size=8, seed=0)
            self.layer, self.frozen = nn.Linear(2, 3), nn.Linear(2, 2).requires_grad_(False)

    training = Training(weight_decay=0.04, weight_decay_end=0.4, lr=0.1)
    assert weight_decay(training, step=0, steps=11) == pytest.approx(0.04)
    assert weight_decay(training, step=5, steps=11) == pytest.approx(0.22)
    assert weight_decay(training, step=10, steps=11) == pytest.approx(0.4)
    method = Tiny()
    for kind in ("adamw", "adam", "sgd"):
        optimizer = make_optimizer(method, training.model_copy(update={"optimizer": kind}))
        set_schedule(optimizer, training, step=10, steps=11, steps_per_epoch=5)
        decays, spared = optimizer.param_groups
        assert [id(p) for p in decays["params"]] == [id(method.layer.weight)]
        assert [id(p) for p in spared["params"]] == [id(method.layer.bias)]
        assert decays["weight_decay"] == pytest.approx(0.4) and spared["weight_decay"] == 0


def test_health_tells_constant_line_and_sphere_apart():
    rng = torch.Generator().manual_seed(0)
    sphere = torch.randn(400, 16, generator=rng)
    constant = torch.ones(400, 16) + 0.01 * torch.randn(400, 16, generator=rng)
    line = torch.randn(400, 1, generator=rng) * torch.ones(1, 16)
    found = describe(sphere)
    assert found["std"] == pytest.approx(1, abs=0.05) and found["effective_rank"] > 15
    assert abs(found["cosine"]) < 0.02 and found["spread"] > 0.98
    assert describe(constant)["cosine"] > 0.999 and describe(constant)["spread"] < 0.001
    assert describe(line)["effective_rank"] == pytest.approx(1, abs=0.01)
    assert [collapsed(sphere, embedding=z) for z in (sphere, constant, line)] == [False, True, True]


def collapsed(features: torch.Tensor, *, embedding: torch.Tensor, initial_rank: float = 15) -> bool:
    health = describe(features) | {"initial_effective_rank": initial_rank}
    return is_collapsed(health | {f"embedding_{name}": value for name, value in describe(embedding).items()})


def test_health_judges_the_exported_features_beside_the_embedding():
    """Features that lost their directions, or are alike but for rounding, pass no more beside an embedding
    that is well; a large constant part, as a good ViT may have, still does."""
    rng = torch.Generator().manual_seed(0)
    sphere = torch.randn(400, 64, generator=rng)
    plane = torch.randn(400, 3, generator=rng) @ torch.randn(3, 64, generator=rng)
    rounding = torch.ones(400, 64) + 1e-6 * torch.randn(400, 64, generator=rng)
    offset = 100 + sphere
    assert describe(offset)["cosine"] > 0.999
    found = [
        collapsed(z, embedding=sphere, initial_rank=describe(sphere)["effective_rank"])
        for z in (sphere, offset, plane, rounding)
    ]
    assert found == [False, False, True, True]
    assert not collapsed(plane, embedding=sphere, initial_rank=5)  # the net never had more


def test_health_numbers_are_those_of_their_definitions():
    z = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)) + 1
    cosines = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=-1)
    found = describe(z)
    assert found["cosine"] == pytest.approx(float(cosines[~torch.eye(30, dtype=torch.bool)].mean()), abs=1e-5)
    values = np.linalg.svd((z - z.mean(0)).double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert found["effective_rank"] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-6)
    assert describe(torch.zeros(4, 3)) == {"std": 0.0, "effective_rank": 1.0, "cosine": -1 / 3, "spread": 0.0}


def test_log_is_cut_back_to_the_position_of_the_checkpoint(tmp_path):
    log = Log(tmp_path)
    log.write("step", step=0, epoch=0.0, loss=1.0)
    position = log.position()
    log.write("health", step=1, epoch=0.5, cnn={"std": float("nan")})
    log.close()
    assert read_log(tmp_path, "health") == [{"kind": "health", "step": 1, "epoch": 0.5, "cnn": {"std": None}}]
    again = Log(tmp_path, position=position, step=1)
    again.write("step", step=1, epoch=0.5, loss=2.0)
    again.close()
    content = (tmp_path / "log.jsonl").read_bytes()
    assert (again.sha256(), position) == (hashlib.sha256(content).hexdigest(), content.index(b"\n") + 1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("step", 0), ("step", 1)]


def test_batch_statistics_are_used_and_forgotten():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.rand(8, 3, 4, 4) * 5
    with torch.no_grad(), batch_statistics(net):
        seen = net(images)
    assert seen.mean((0, 2, 3)).abs().max() < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(part.training for part in net.modules()) and net[1].momentum == 0.1


def test_cpu_sync_batch_norm_of_one_rank_is_batch_norm(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = BatchNormAct2d(4)
        nn.init.uniform_(plain.weight)
        twin = BatchNormAct2d(4)
        twin.load_state_dict(plain.state_dict())
        ours = CpuSyncBatchNorm(twin)
        assert ours.state_dict().keys() == plain.state_dict().keys()
        for _ in range(2):
            x = torch.randn(6, 4, 5, 5)
            one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            first, second = plain(one), ours(other)
            assert torch.allclose(first, second, atol=1e-5)
            first.square().sum().backward()
            second.square().sum().backward()
            assert torch.allclose(one.grad, other.grad, atol=1e-4)
            assert torch.allclose(plain.weight.grad, ours.weight.grad, rtol=1e-4)
        assert torch.allclose(plain.running_var, ours.running_var, rtol=1e-5)
        assert torch.allclose(plain.eval()(x), ours.eval()(x), atol=1e-5)
        assert batch_norms(ours) == [ours]
    finally:
        torch.distributed.destroy_process_group()


def test_every_rank_finds_its_own_gpu_or_says_that_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.choose_device("auto", local_rank=3) == torch.device("cuda", 3)
    assert distributed.choose_device("cpu", local_rank=3) == torch.device("cpu")
    with pytest.raises(UserError, match="local rank 4 has no GPU"):
        distributed.choose_device("cuda", local_rank=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # Slurm shows each rank its own only
    assert distributed.choose_device("cuda", local_rank=3) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="finds no GPU"):
        distributed.choose_device("cuda")


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("resnet10t", {}, 32),
        ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 32),
        ("scatnet8", {"L": 4}, 16),
    ],
)
@pytest.mark.parametrize(
    ("wanted", "options"),
    [("simclr", {"hidden": 16}), ("hssl", {"out_dim": 8, "hidden": 16, "bottleneck": 8, "depth": 1})],
)
def test_recomputed_activations_take_less_memory_and_give_the_same_gradients(
    wanted, options, name, args, size
):
    seen = []
    for recompute in (False, True):
        net = create_backbone(Backbone(name=name, args=args), size, seed=0)
        method = load_method(wanted)(
            {net.arch: net}, resolve_options(wanted, options), image_size=size, seed=0
        )
        optimizer = make_optimizer(method, Training())
        Stepper(
            method.train(),
            optimizer,
            Views(method.views, seed=0),
            training=Training(recompute=recompute),
            world=World(),
            accumulate=1,
            first=0,
            profile=NoProfile(),
            say=print,
        )
        views = [torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = method(views, Progress(step=0, steps=1, epoch=0.0, epochs=1.0))["loss"]
        loss.backward()
        seen.append((sum(kept.values()), [p.grad for p in method.parameters()]))
    (whole, plain), (less, again) = seen
    assert less < 0.9 * whole
    for one, other in zip(plain, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_net_that_cannot_recompute_says_so():
    net = create_backbone(Backbone(name="cspresnet50"), 32, seed=0)
    with pytest.raises(UserError, match="'cspresnet50' cannot compute its activations again"):
        net.recompute()
