"""ScatNets: the published sizes, and timm's interface."""

import subprocess
import sys

import pytest
import timm
import torch

from pipeline.nets.architectures import architecture_of
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export, load_exported
from pipeline.nets.heads import mlp
from pipeline.specs import Backbone
from pipeline.train.syncbn import batch_norms

torch.set_num_threads(1)
SMALL = Backbone(name="test_scatnet")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "L", "exact", "published"),
    [
        ("scatnet8", 16, 6_104_480, 6.11),
        ("scatnet12", 8, 7_838_720, 7.84),
        ("scatnet16", 16, 10_458_112, 10.46),
        ("scatnet30", 8, 14_062_208, 14.06),
    ],
)
def test_parameters_are_the_published_number(name, L, exact, published):
    net = create_backbone(Backbone(name=name, args={"L": L}), 96, seed=0).headless()
    assert net.num_features == 2048
    with_head = parameters(net) + parameters(mlp(2048, 2048, 128, bn=False))
    assert with_head == exact
    unused = 2 * 3 * net.net.scattering.channels  # a batch normalisation that the published nets never call
    assert round((exact + unused) / 1e6, 2) == published


def test_j_and_l_come_with_the_arguments_and_make_the_map_and_its_channels():
    net = create_backbone(Backbone(name="test_scatnet", args={"J": 3, "L": 2}), 32, seed=0)
    assert net.net.conv1.in_channels == 3 * (1 + 3 * 2 + 3 * 4)
    assert net.feature_map(torch.rand(2, 3, 32, 32)).flatten(2).transpose(1, 2).shape == (2, 16, 16)
    assert timm.create_model("scatnet8").scattering.extra_repr() == "J=2, L=16"


def test_every_parameter_and_batch_norm_is_used_and_stays_in_training_after_an_evaluation():
    net = create_backbone(SMALL, 32, seed=0)
    images = torch.rand(4, 3, 32, 32)
    net.eval().features(images)
    net.train()
    net.logits(images).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    norms = batch_norms(net)
    assert len(norms) == 7  # the stem's, two a block, one a shortcut
    assert all(norm.training and norm.num_batches_tracked == 1 for norm in norms)


def test_a_fresh_net_tells_images_apart():
    net = create_backbone(SMALL, 32, seed=0).eval()
    features = net.features(torch.rand(8, 3, 32, 32))
    assert features.isfinite().all() and features.std(0).mean() > 1e-3


def test_intermediate_maps_are_those_on_the_way():
    model = create_backbone(SMALL, 32, seed=0).eval().net
    x = torch.rand(2, 3, 32, 32)
    last, found = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x)) and torch.equal(last, found[-1])
    assert [f.shape[1] for f in found] == [info["num_chs"] for info in model.feature_info] == [8, 16]
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, found[0])
    features = timm.create_model("test_scatnet", features_only=True, out_indices=[0])
    assert features.feature_info.channels() == [8] and features.feature_info.reduction() == [4]
    assert [f.shape for f in features(x)] == [(2, 8, 8, 8)]


def test_half_precision_weights_take_half_precision_images():
    model = timm.create_model("test_scatnet").to(torch.bfloat16).eval()
    assert model(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_export_holds_no_filters_and_loads_through_this_package(tmp_path):
    net = create_backbone(Backbone(name="test_scatnet", args={"L": 2}), 32, seed=0).eval()
    export(net, tmp_path / "net", trained={})
    assert not [key for key in net.state_dict() if "scattering" in key]
    images = torch.rand(2, 3, 48, 48)  # another size than it was trained at
    with torch.no_grad():
        expected = net.features(images)
    again = load_exported(tmp_path / "net", num_classes=3, image_size=48).eval()
    with torch.no_grad():
        assert torch.equal(again.features(images), expected)
    torch.save((images * 2 - 1, expected), tmp_path / "expected.pt")
    code = (
        "import timm, torch, pipeline.nets.scatnet, sys; torch.set_num_threads(1);"
        "model = timm.create_model(f'local-dir:{sys.argv[1]}/net', pretrained=True, num_classes=0).eval();"
        "images, expected = torch.load(f'{sys.argv[1]}/expected.pt');"
        "assert torch.equal(model(images), expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_its_family_is_known_by_name():
    assert architecture_of("scatnet12") == architecture_of("test_scatnet") == "cnn"
