"""Initial weights from timm's cache, a file or an exported folder, and what is said when there are none."""

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export
from pipeline.specs import Backbone

SMALL_VIT = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def other_weights(name, seed=9, **args):
    torch.manual_seed(seed)
    return timm.create_model(name, **args)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put_into(hub_cache, name, source):
    repo = hub_cache / f"models--timm--{name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    save_file(source.state_dict(), repo / "snapshots" / "abc" / "model.safetensors")


def test_imagenet_weights_come_from_the_cache_unasked_with_their_own_mean_and_std(hub_cache, monkeypatch):
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", lambda **_: pytest.fail("asked the network"))
    source = other_weights("resnet18")
    put_into(hub_cache, "resnet18.a1_in1k", source)
    net = create_backbone(Backbone(name="resnet18", weights="imagenet"), 64, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(net.net.parameters(), source.parameters()))
    assert net.mean == (0.485, 0.456, 0.406) and net.std == (0.229, 0.224, 0.225)


def test_imagenet_weights_out_of_reach_are_one_line(hub_cache):
    with pytest.raises(UserError, match="neither in timm's cache nor reachable") as error:
        create_backbone(Backbone(name="test_resnet", weights="imagenet"), 32, seed=0)
    assert "test_resnet" in str(error.value) and "\n" not in str(error.value)


def test_imagenet_weights_with_a_class_token_are_refused_by_a_net_without_one(hub_cache):
    put_into(hub_cache, "test_vit.r160_in1k", other_weights("test_vit"))
    args = {"class_token": False, "global_pool": "avg"}
    with pytest.raises(UserError, match=r"do not fit args \{'class_token': False") as error:
        create_backbone(Backbone(name="test_vit", weights="imagenet", args=args), 160, seed=0)
    assert "\n" not in str(error.value)


def test_a_model_without_imagenet_weights_is_told_apart_from_an_unreachable_one(hub_cache):
    assert not timm.is_model_pretrained("resnetblur18")
    with pytest.raises(UserError, match="timm has no ImageNet weights for it"):
        create_backbone(Backbone(name="resnetblur18", weights="imagenet"), 64, seed=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_weights_is_loaded_with_the_models_mean_and_std(suffix, tmp_path):
    source = other_weights("resnet10t")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":  # as a distributed training leaves it
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, path
        )
    else:
        save_file(source.state_dict(), path)
    net = create_backbone(Backbone(name="resnet10t", weights=str(path)), 32, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(net.net.parameters(), source.parameters()))
    assert net.mean == tuple(source.pretrained_cfg["mean"])


def test_a_file_with_other_classes_keeps_the_features_and_a_new_classifier(tmp_path):
    source = other_weights("resnet10t", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    net = create_backbone(Backbone(name="resnet10t", weights=str(tmp_path / "w.pth")), 32, seed=0)
    assert net.num_classes == 1000
    assert torch.equal(net.net.conv1[0].weight, source.conv1[0].weight)


def test_position_embeddings_are_interpolated_to_another_image_size(tmp_path):
    source = other_weights("vit_tiny_patch16_224", img_size=32, **SMALL_VIT)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    spec = Backbone(name="vit_tiny_patch16_224", args=SMALL_VIT, weights=str(tmp_path / "w.pth"))
    net = create_backbone(spec, 64, seed=0)
    assert net.net.pos_embed.shape[1] == 65 and source.pos_embed.shape[1] == 17
    assert torch.equal(net.net.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_an_exported_folder_is_weights_too_with_the_mean_and_std_of_its_training(tmp_path):
    first = create_backbone(Backbone(name="resnet10t"), 32, seed=4).eval()
    export(first, tmp_path / "cnn", trained={})
    net = create_backbone(Backbone(name="resnet10t", weights=str(tmp_path / "cnn")), 32, seed=0).eval()
    images = torch.rand(2, 3, 32, 32)
    assert net.mean == (0.5, 0.5, 0.5)  # not ImageNet's, which a bare file would get
    assert torch.equal(net.features(images), first.features(images))


def test_an_exported_folder_of_a_net_built_otherwise_says_how(tmp_path):
    args = SMALL_VIT | {"class_token": False, "global_pool": "avg"}
    export(
        create_backbone(Backbone(name="vit_tiny_patch16_224", args=args), 32, seed=0), tmp_path, trained={}
    )
    usual = Backbone(name="vit_tiny_patch16_224", args=SMALL_VIT, weights=str(tmp_path))
    with pytest.raises(UserError) as error:
        create_backbone(usual, 32, seed=0)
    built = 'their net was built with args {class_token: false, global_pool: "avg"}'
    assert built in str(error.value) and "depth" not in str(error.value)
    create_backbone(usual.model_copy(update={"args": args}), 64, seed=0)
    with pytest.raises(UserError, match="they are of a vit_tiny_patch16_224"):
        create_backbone(Backbone(name="test_vit", weights=str(tmp_path)), 32, seed=0)
    more = usual.model_copy(update={"args": args | {"init_values": 0.1}})
    with pytest.raises(UserError, match=r"built without args \{init_values: 0\.1\}"):
        create_backbone(more, 32, seed=0)


def test_weights_that_are_missing_unreadable_or_another_models_are_one_line(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save(other_weights("test_resnet").state_dict(), tmp_path / "other.pth")
    torch.save(other_weights("vit_tiny_patch16_224", **SMALL_VIT).state_dict(), tmp_path / "vit.pth")
    for name, file, message in (
        ("resnet10t", "none.pth", "not found; expected 'random', 'imagenet', or a file or folder"),
        ("resnet10t", "text.pth", "cannot be read as tensors"),
        ("resnet10t", "text.safetensors", "cannot be read as tensors"),
        ("resnet10t", "empty.pth", "hold no state dict"),
        ("resnet10t", "other.pth", "do not fit backbone 'resnet10t': .* of another shape"),
        ("resnet10t", "vit.pth", "do not fit backbone 'resnet10t': .* missing"),
        ("test_vit", "other.pth", "do not fit backbone 'test_vit'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            create_backbone(Backbone(name=name, weights=str(tmp_path / file)), 32, seed=0)
        assert "\n" not in str(error.value)
