"""What a backbone costs is counted right, and without changing it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.nets.backbone import Net, create_backbone
from pipeline.nets.cost import cost
from pipeline.specs import Backbone

CNN = Backbone(name="resnet10t", args={"channels": [16, 16, 32, 32]})
VIT = Backbone(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
)
TOKENS, WIDTH, DEPTH = 17, 32, 2  # 4 × 4 patches of 32 px and the class token


def products(net: Net, image_size: int) -> int:
    """Multiply-adds of every convolution and linear layer, from the shapes that a real pass goes through."""
    total = 0

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        outputs = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
        total += output.numel() // outputs * layer.weight.numel()

    net = copy.deepcopy(net).headless().eval()
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        net.features(torch.zeros(1, 3, image_size, image_size))
    return total


@pytest.mark.parametrize("size", [32, 64])
def test_multiply_adds_of_a_cnn_are_those_of_its_convolutions(size: int) -> None:
    net = create_backbone(CNN, size, seed=0)
    assert cost(net)["gmac"] == products(net, size) / 1e9


def test_multiply_adds_of_a_vit_have_attention_among_them() -> None:
    net = create_backbone(VIT, 32, seed=0)
    attention = DEPTH * 2 * TOKENS**2 * WIDTH  # queries times keys, and their weights times values
    assert cost(net)["gmac"] == (products(net, 32) + attention) / 1e9


def test_fused_attention_and_plain_attention_count_alike() -> None:
    net = create_backbone(VIT, 32, seed=0)
    with sdpa_kernel(SDPBackend.MATH):
        plain = cost(net)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert cost(net) == plain


def test_a_fixed_transform_before_the_net_can_be_counted_too() -> None:
    small = Backbone(name="scatnet8", args={"L": 2})
    larger = Backbone(name="scatnet8", args={"L": 4})
    costs = [cost(create_backbone(spec, 32, seed=0)) for spec in (small, larger)]
    assert 0 < costs[0]["gmac"] < costs[1]["gmac"]


@pytest.mark.parametrize("spec", [CNN, VIT])
def test_the_classifier_is_not_counted(spec: Backbone) -> None:
    large = spec.model_copy(update={"args": {**spec.args, "num_classes": 5000}})
    net, other = (create_backbone(each, 32, seed=0) for each in (spec, large))
    assert cost(net) == cost(other)
    bare = copy.deepcopy(net).headless()
    assert cost(net)["params"] == sum(parameter.numel() for parameter in bare.parameters())


def test_counting_leaves_the_net_and_the_random_state_alone() -> None:
    net = create_backbone(CNN, 32, seed=0).train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.compile_passes()
    assert net._fast is not None and copy.deepcopy(net)._fast is None, (
        "it would compute with this net's weights"
    )
    assert cost(net)["params"] > 0
    assert net.training and net.num_classes == 1000
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_scattering_is_counted_and_counted_apart() -> None:
    net = create_backbone(Backbone(name="test_scatnet"), 32, seed=0)
    found = cost(net)
    assert 0 < found["scattering_gmac"] < found["gmac"]
    assert found["gmac"] - found["scattering_gmac"] == pytest.approx(products(net, 32) / 1e9)
    assert cost(create_backbone(CNN, 32, seed=0))["scattering_gmac"] == 0
    net.features(torch.zeros(1, 3, 32, 32))  # whatever was remembered while counting can be used afterwards


def test_another_size_than_the_nets_own() -> None:
    net = create_backbone(CNN, 32, seed=0)
    assert cost(net, size=64)["gmac"] == products(net, 64) / 1e9
