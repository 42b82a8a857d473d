"""Exported folders: plain timm loads them with the same bits, and they tell this training's truth."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pipeline.data.images import ImageSet
from pipeline.data.squares import border
from pipeline.errors import UserError
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import Classifier, export, load_exported
from pipeline.specs import Backbone
from shards import FolderSource, write

SMALL_VIT = Backbone(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
)
SMALL_SWIN = Backbone(name="swin_tiny_patch4_window7_224", args={"depths": [1, 1, 1, 1], "embed_dim": 24})
# Before 1.0.31, timm took any Swin file without a classifier for an old one, and renamed its keys.
OLD_SWIN = pytest.mark.skipif(
    tuple(int(part) for part in timm.__version__.split(".")[:3]) < (1, 0, 31), reason="timm < 1.0.31"
)
CASES = [
    (Backbone(name="test_resnet"), 32),
    (Backbone(name="resnet10t"), 32),
    (Backbone(name="resnet10t", args={"global_pool": "catavgmax"}), 32),
    (Backbone(name="mobilenetv3_small_050"), 64),
    (Backbone(name="test_convnext"), 64),
    (Backbone(name="test_scatnet", args={"J": 1, "L": 2}), 32),
    (Backbone(name="test_vit"), 160),
    (Backbone(name="test_vit"), 96),
    (SMALL_VIT, 32),
    (SMALL_VIT.model_copy(update={"args": SMALL_VIT.args | {"drop_path_rate": 0.2}}), 32),
    pytest.param(SMALL_SWIN, 64, marks=OLD_SWIN),
    (Backbone(name="levit_128s"), 64),  # batch normalisation in its classifier
]


def disturbed(spec, size):
    """A net whose every parameter and statistic differs from a fresh one's."""
    net = create_backbone(spec, size, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=draw) * 0.01)
    return net.eval()


@pytest.mark.parametrize(("spec", "size"), CASES, ids=lambda value: getattr(value, "name", value))
def test_plain_timm_loads_bit_equal_features_for_any_number_of_classes(spec, size, tmp_path):
    net = disturbed(spec, size)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = net.features(images)
    assert expected.isfinite().all() and expected.std() > 0
    export(net, tmp_path, trained={})
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (net.mean, net.std))
    for classes in (0, 7, 1000):
        plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=classes).eval()
        with torch.no_grad():
            out = plain((images - mean) / std)
            features = plain.forward_head(plain.forward_features((images - mean) / std), pre_logits=True)
        assert torch.equal(features, expected)
        assert out.shape == (2, classes or expected.shape[1])
        assert classes or torch.equal(out, expected)
        assert tuple(plain.pretrained_cfg["mean"]) == net.mean


@pytest.mark.parametrize(
    ("spec", "size"), [(Backbone(name="test_resnet"), 32), (SMALL_VIT, 32), (SMALL_SWIN, 64)]
)
def test_load_exported_gives_the_same_features_and_a_new_seeded_classifier(spec, size, tmp_path):
    net = disturbed(spec, size)
    export(net, tmp_path, trained={"method": "dino"})
    images = torch.rand(2, 3, size, size)
    one, same, other = (load_exported(tmp_path, num_classes=5, seed=seed).eval() for seed in (1, 1, 2))
    assert (one.arch, one.mean, one.std, one.image_size) == (net.arch, net.mean, net.std, size)
    assert torch.equal(one.features(images), net.features(images))
    assert one.logits(images).shape == (2, 5)
    assert torch.equal(one.logits(images), same.logits(images))
    if spec is SMALL_VIT:  # its classifier starts at small random values
        assert not torch.equal(one.net.head.weight, other.net.head.weight)
    assert load_exported(tmp_path, num_classes=0).num_classes == 0


def test_an_export_is_loaded_for_another_image_size(tmp_path):
    export(disturbed(SMALL_VIT, 32), tmp_path, trained={})
    net = load_exported(tmp_path, num_classes=3, image_size=64)
    assert net.logits(torch.rand(2, 3, 64, 64)).shape == (2, 3) and net.image_size == 64
    with pytest.raises(UserError, match="image size 60 is not a multiple"):
        load_exported(tmp_path, num_classes=3, image_size=60)


def test_an_export_of_an_export_has_the_same_bytes(tmp_path):
    net = disturbed(SMALL_VIT, 32)
    export(net, tmp_path / "a", trained={"method": "dino", "epochs": 3})
    export(net, tmp_path / "b", trained={"epochs": 3, "method": "dino"})
    export(
        load_exported(tmp_path / "a", num_classes=9), tmp_path / "c", trained={"method": "dino", "epochs": 3}
    )
    for name in ("model.safetensors", "config.json"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def test_the_config_tells_this_trainings_truth_and_not_imagenets(tmp_path):
    net = create_backbone(Backbone(name="resnet10t.c3_in1k"), 48, seed=0)
    export(net, tmp_path, trained={"method": "cass", "dataset": "pbc", "license": "cc-by-4.0"})
    config = json.loads((tmp_path / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert config["architecture"] == "resnet10t" and config["num_features"] == 512
    assert cfg["mean"] == cfg["std"] == [0.5, 0.5, 0.5]
    assert cfg["input_size"] == [3, 48, 48] and cfg["num_classes"] == 0
    assert cfg["license"] == "cc-by-4.0" and cfg["tag"] == "cass"
    assert not {"url", "hf_hub_id", "origin_url", "paper_ids"} & cfg.keys()
    assert config["training"] == {"arch": "cnn", "dataset": "pbc", "license": "cc-by-4.0", "method": "cass"}


def test_exporting_leaves_the_net_as_it_was(tmp_path):
    net = create_backbone(Backbone(name="test_resnet"), 32, seed=0)
    export(net, tmp_path, trained={})
    assert net.num_classes == 1000 and net.training


def test_a_folder_that_is_no_export_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no exported backbone: expected config\.json"):
        load_exported(tmp_path, num_classes=2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'architecture'"):
        load_exported(tmp_path, num_classes=2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_exported(tmp_path, num_classes=2)
    export(create_backbone(Backbone(name="test_resnet"), 32, seed=0), tmp_path, trained={})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors' not found"):
        load_exported(tmp_path, num_classes=2)


@pytest.mark.parametrize(
    ("spec", "size"), CASES[:4] + CASES[8:9], ids=lambda value: getattr(value, "name", value)
)
def test_a_classifier_is_exported_with_its_net_and_class_names(spec, size, tmp_path):
    export(disturbed(spec, size), tmp_path / "bare", trained={})
    net = load_exported(tmp_path / "bare", num_classes=3, seed=5).eval()
    classifier = Classifier(["a", "b", "c"], multilabel=True, thresholds=[0.25, 0.5, 0.75])
    export(net, tmp_path / "whole", trained={"method": "m"}, classifier=classifier)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = net.logits(images)
        assert torch.equal(
            load_exported(tmp_path / "whole", num_classes=None, seed=9).eval().logits(images), expected
        )
        plain = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
        assert torch.equal(plain(net.normalise(images)), expected)
    assert plain.pretrained_cfg["label_names"] == ["a", "b", "c"]
    training = json.loads((tmp_path / "whole" / "config.json").read_text())["training"]
    assert training["thresholds"] == [0.25, 0.5, 0.75] and training["multilabel"] is True


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(90, 61), (57, 120), (64, 64)])
def test_timms_transform_of_an_export_prepares_a_file_as_training_did(fit, shape, tmp_path):
    """From the original file: what timm gives is the tensor that the training saw, normalised."""
    smooth = np.random.default_rng(1).integers(0, 256, (9, 6, 3), np.uint8)
    for split in ("train", "val", "test"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        image = Image.fromarray(smooth).resize(shape, Image.Resampling.BICUBIC)
        image.putpixel((0, 0), (len(split), 0, 0))  # no two alike
        image.save(tmp_path / "data" / split / "a" / "1.png")
    index = write(FolderSource(tmp_path / "data"), tmp_path / "shards")
    net = create_backbone(SMALL_VIT, 32, seed=0)
    export(net, tmp_path / "net", trained={}, fit=fit)
    seen = ImageSet(index, index.rows("test"), image_size=32, fit=fit, fill=border(net.mean)).batch([0])
    expected = net.normalise(seen.float() / 255)[0]
    model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with Image.open(tmp_path / "data" / "test" / "a" / "1.png") as file:
        found = transform(file)
    step = 1 / 255 / 0.5  # of a pixel's value, normalised
    assert (found - expected).abs().max() <= 2.01 * step
    assert (found - expected).abs().mean() < 0.35 * step
