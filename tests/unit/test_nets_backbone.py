"""Backbones: any timm model by name, at any size, fed with its own mean and std."""

import pytest
import timm
import torch

from pipeline.errors import UserError
from pipeline.nets.architectures import architecture_of
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

SMALL_VIT = Backbone(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
)
SMALL_SWIN = Backbone(name="swin_tiny_patch4_window7_224", args={"depths": [1, 1, 1, 1], "embed_dim": 24})


@pytest.mark.parametrize(
    ("spec", "size", "arch", "features", "tokens"),
    [
        (Backbone(name="test_resnet"), 32, "cnn", 96, (1, 96)),
        (Backbone(name="resnet10t"), 64, "cnn", 512, (4, 512)),
        (Backbone(name="mobilenetv3_small_050"), 64, "cnn", 1024, (4, 288)),  # a hidden layer in its head
        (Backbone(name="test_scatnet"), 32, "cnn", 256, (64, 16)),  # pooled to 4 x 4
        (Backbone(name="test_vit"), 96, "vit", 64, (36, 64)),
        (SMALL_VIT, 32, "vit", 64, (16, 64)),
        (SMALL_SWIN, 64, "vit", 192, (4, 192)),
    ],
)
def test_any_model_at_any_size_gives_features_tokens_and_logits(spec, size, arch, features, tokens):
    net = create_backbone(spec, size, seed=0).eval()
    images = torch.rand(2, 3, size, size)
    assert net.arch == arch and net.num_features == features
    assert net.features(images).shape == (2, features)
    assert net.feature_map(images).flatten(2).transpose(1, 2).shape == (2, *tokens)
    assert net.logits(images).shape == (2, 1000) == net(images).shape
    before = net.features(images)
    assert torch.equal(net.headless().logits(images), before)
    assert net.num_classes == 0


def test_images_are_normalised_inside():
    net = create_backbone(Backbone(name="test_resnet"), 32, seed=0).eval()
    images = torch.rand(2, 3, 32, 32)
    assert (net.mean, net.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert torch.equal(net.logits(images), net.net(images * 2 - 1))


def test_a_transformer_takes_other_sizes_in_the_forward_pass():
    net = create_backbone(SMALL_VIT, 32, seed=0)
    assert net.features(torch.rand(2, 3, 16, 16)).shape == (2, 64)
    assert net.patch_size == 8


def test_the_seed_alone_decides_the_weights_and_the_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = create_backbone(SMALL_VIT, 32, seed=1)
    assert torch.equal(torch.rand(1), expected)
    two, other = create_backbone(SMALL_VIT, 32, seed=1), create_backbone(SMALL_VIT, 32, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.net.patch_embed.proj.weight, other.net.patch_embed.proj.weight)


def test_token_order_is_row_by_row_for_every_layout():
    """A bright patch moves the token at its own place most."""
    for spec, size, grid in (
        (SMALL_VIT, 32, 4),
        (Backbone(name="test_convnext"), 64, 2),
        (SMALL_SWIN, 64, 2),
    ):
        net = create_backbone(spec, size, seed=0).eval()
        dark, bright = torch.zeros(2, 1, 3, size, size)
        cell = size // grid
        bright[..., :cell, -cell:] = 1.0  # the first row's last place
        moved = (net.feature_map(bright) - net.feature_map(dark)).norm(dim=1)[0].flatten()
        assert moved.argmax().item() == grid - 1, spec.name


@pytest.mark.parametrize("args", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_raw_tokens_are_those_that_the_last_norm_has_not_seen(args):
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    net = create_backbone(Backbone(name="vit_tiny_patch16_224", args=small | args), 64, seed=0).eval()
    with torch.no_grad():
        for norm in (net.net.norm, net.net.fc_norm):
            for parameter in norm.parameters():
                parameter.add_(torch.randn_like(parameter))
        for size in (64, 32):
            images = torch.rand(2, 3, size, size)
            raw = net.raw_tokens(images)
            assert raw.shape == (2, (size // 16) ** 2, 16)
            expected = net.net.fc_norm(net.feature_map(images).flatten(2).transpose(1, 2))
            torch.testing.assert_close(net.final_norm()(raw), expected)
            assert not torch.allclose(raw, expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet50", "cnn"),
        ("convnext_tiny.fb_in1k", "cnn"),
        ("efficientnet_b0", "cnn"),
        ("scatnet12", "cnn"),
        ("vit_base_patch16_384", "vit"),
        ("deit_tiny_patch16_224", "vit"),
        ("swin_tiny_patch4_window7_224", "vit"),
        ("coatnet_0_rw_224", "hybrid"),
    ],
)
def test_architecture_is_known_by_name(name, kind):
    assert architecture_of(name) == kind


def test_a_hybrid_may_stand_for_either():
    spec = Backbone(name="levit_128s")
    assert create_backbone(spec, 64, seed=0, arch="vit").arch == "vit"
    assert create_backbone(spec, 64, seed=0, arch="cnn").arch == "cnn"


@pytest.mark.parametrize(
    ("spec", "size", "arch", "message"),
    [
        (Backbone(name="resnet5O"), 32, None, "'resnet5O' is unknown to timm .*did you mean 'resnet50"),
        (Backbone(name="test_vit.r161_in1k"), 32, None, "no weights of test_vit tagged .*'r160_in1k'"),
        (Backbone(name="some/folder"), 32, None, "expected a timm model name; a file or folder goes into"),
        (Backbone(name="test_vit"), 32, "cnn", "is a vision transformer, but stands where a CNN belongs"),
        (Backbone(name="test_resnet"), 32, "vit", "is a CNN, but stands where a vision transformer belongs"),
        (
            Backbone(name="test_vit"),
            100,
            None,
            "image size 100 is not a multiple of its patch size 16; 96 or",
        ),
        (Backbone(name="test_vit"), 8, None, "image size 8 is not a multiple of its patch size 16; 16 or"),
        (Backbone(name="test_vit", args={"deepth": 2}), 32, None, "does not take these args: .*deepth"),
        (Backbone(name="test_vit", args={"num_heads": 7}), 32, None, "cannot be built with args"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(spec, size, arch, message):
    with pytest.raises(UserError, match=message) as error:
        create_backbone(spec, size, seed=0, arch=arch)
    assert "\n" not in str(error.value)


def test_arguments_of_the_model_reach_timm():
    net = create_backbone(Backbone(name="resnet10t", args={"global_pool": "catavgmax"}), 32, seed=0)
    assert net.headless().features(torch.rand(2, 3, 32, 32)).shape == (2, 1024)
    assert isinstance(net.net, timm.models.ResNet)
