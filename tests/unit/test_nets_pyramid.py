"""Feature maps at strides 4 to 32 from any backbone, as heads for segmentation and detection need them."""

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.nets.backbone import Net, create_backbone
from pipeline.nets.pyramid import STRIDES, Pyramid, last_map
from pipeline.specs import Backbone

VIT = {"embed_dim": 32, "depth": 8, "num_heads": 2}
SMALL = {
    "resnet": Backbone(name="test_resnet"),
    "convnext": Backbone(name="test_convnext"),
    "vit 4": Backbone(name="vit_tiny_patch16_224", args=VIT | {"patch_size": 4}),
    "vit 8": Backbone(name="vit_tiny_patch16_224", args=VIT | {"patch_size": 8, "depth": 1}),
    "vit 16": Backbone(name="test_vit"),
    "swin": Backbone(name="swin_tiny_patch4_window7_224", args={"depths": [1, 1, 1, 1], "embed_dim": 24}),
}


def build(kind: str, size: int = 64) -> Net:
    return create_backbone(SMALL[kind], size, seed=0).headless()


class OneMap(nn.Module):
    """A timm model without intermediate maps, of stride 4, as a scattering network is."""

    num_features, num_classes, pretrained_cfg = 6, 0, {}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images)


def one_map() -> Net:
    half = (0.5, 0.5, 0.5)
    return Net(OneMap(), arch="cnn", name="one", args={}, image_size=32, mean=half, std=half)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, (64, 64)) for kind in SMALL] + [(kind, (96, 64)) for kind in SMALL if kind != "swin"],
)
def test_four_maps_at_strides_4_to_32(kind, shape):
    pyramid = Pyramid(build(kind)).eval()
    maps = pyramid(torch.rand(2, 3, *shape))
    expected = [
        (2, channels, -(-shape[0] // stride), -(-shape[1] // stride))
        for channels, stride in zip(pyramid.channels, STRIDES)
    ]
    assert [tuple(found.shape) for found in maps] == expected


def test_sizes_that_the_strides_do_not_divide_are_rounded_up():
    for net in (build("resnet"), build("vit 4"), one_map()):
        maps = Pyramid(net)(torch.rand(2, 3, 36, 76))
        assert [found.shape[-2:] for found in maps] == [(9, 19), (5, 10), (3, 5), (2, 3)]


def test_patches_of_14_pixels_give_the_same_strides():
    args = VIT | {"patch_size": 14}
    net = create_backbone(Backbone(name="vit_tiny_patch16_224", args=args), 56, seed=0)
    assert [found.shape[-1] for found in Pyramid(net)(torch.rand(1, 3, 56, 56))] == [14, 7, 4, 2]


def test_a_vit_gives_its_blocks_at_quarters_of_its_depth_and_a_cnn_its_stages():
    images = torch.rand(1, 3, 64, 64)
    net = build("vit 4").eval()
    pyramid = Pyramid(net).eval()
    blocks = net.net.forward_intermediates(net.normalise(images), norm=True, intermediates_only=True)
    maps = pyramid(images)
    assert torch.equal(maps[0], blocks[1])
    for level, block in ((1, 3), (2, 5), (3, 7)):
        assert torch.equal(maps[level], nn.functional.max_pool2d(blocks[block], 2**level))
    assert torch.equal(blocks[7], last_map(net, images)), "the last map is what the classifier pools"
    net = build("convnext").eval()
    stages = net.net.forward_intermediates(net.normalise(images), norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(Pyramid(net)(images), stages, strict=True))


@pytest.mark.parametrize("net", [*SMALL, "one map"])
def test_every_map_teaches_the_backbone(net):
    pyramid = Pyramid(one_map() if net == "one map" else build(net)).train()
    first = next(pyramid.net.parameters())
    for level in range(4):
        pyramid.zero_grad()
        torch.manual_seed(0)
        maps = pyramid(torch.rand(2, 3, 64, 64))
        (maps[level] * torch.randn_like(maps[level])).sum().backward()
        assert first.grad is not None and first.grad.abs().sum() > 0, level


def test_looking_at_a_net_leaves_it_and_the_random_state_as_they_were():
    net = build("resnet").train()
    net.net.layer1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    Pyramid(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training and not net.net.layer1.training


def test_a_net_that_will_not_norm_its_maps_gives_them_as_they_are():
    net = create_backbone(Backbone(name="hiera_tiny_224", args={"stages": [1, 1, 1, 1]}), 224, seed=0)
    assert Pyramid(net).channels == (96, 192, 384, 768)


def test_a_net_without_a_map_is_refused_by_name():
    net = create_backbone(Backbone(name="crossvit_tiny_240"), 240, seed=0)
    with pytest.raises(UserError, match="'crossvit_tiny_240' gives no feature map"):
        last_map(net, torch.zeros(1, 3, 240, 240))


def test_the_last_map_has_its_tokens_in_their_places():
    net = build("vit 8").eval()
    dark, bright = torch.zeros(2, 1, 3, 32, 64)
    bright[..., 8:16, 40:48] = 1
    moved = (last_map(net, bright) - last_map(net, dark)).norm(dim=1)[0]
    assert moved.shape == (4, 8) and divmod(int(moved.argmax()), 8) == (1, 5)
