"""What nets and methods refuse is said before anything is submitted, without building them for real."""

from __future__ import annotations

import pytest
import timm
import torch
import yaml

from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment, ready_experiments
from pipeline.nets.backbone import Net
from pipeline.plan import plan
from pipeline.preflight import preflight

SMALL_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = "name: swin_tiny_patch4_window7_224, args: {embed_dim: 12, depths: [1, 1], num_heads: [1, 1]}"


@pytest.fixture
def check(tmp_path):
    """``check(methods, *settings)`` is the preflight of a small experiment with a CNN and a ViT."""

    def run(methods: str, *settings: str) -> None:
        path = tmp_path / "small.yaml"
        given = {
            "dataset": {"source": "digits"},
            "backbones": {
                "cnn": {"name": "test_resnet"},
                "vit": {"name": "vit_tiny_patch16_224", "args": SMALL_VIT},
            },
            "methods": yaml.safe_load(methods),
            "pretrain": {"image_size": 32, "batch_size": 8},
            "finetune": {"protocols": ["knn"], "fractions": [1.0]},
        }
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        preflight([task for task in plan(load_experiment(str(path), settings)) if task.stage != "shard"])

    return run


@pytest.mark.parametrize(
    ("methods", "settings", "words"),
    [
        ("{ibot: {}}", ["pretrain.image_size=30"], ["method ibot", "image size 30", "24 or 32"]),
        ("{dino: {}}", ["methods.dino.options.local_size=20"], ["method dino", "local crops of 20 pixels"]),
        ("{supervised: {}}", ["finetune.image_size=30"], ["finetune.image_size", "image size 30"]),
        ("{ibot: {}}", ["backbones.vit.args={patchsize: 8}"], ["does not take", "patchsize"]),
        ("{hssl: {options: {host: ibot}}}", [], ["test_resnet", "masked"]),
        ("{hssl: {options: {patch_tokens_only: false}}}", [], ["test_resnet", "no class token"]),
        (
            "{hssl: {options: {separate_projectors: false, head_width: 16}}}",
            [],
            ["separate_projectors", "16 wide"],
        ),
        ("{hssl: {options: {head: search, patch_tokens_only: false}}}", [], ["no class token"]),
        ("{ibot: {}}", [f"backbones.vit={{{SWIN}}}"], ["swin_tiny", "plain vision transformer"]),
        (
            "{selfpatch: {}}",
            [f"backbones.vit={{{SWIN}}}"],
            ["swin_tiny", "class_token: false", "that selfpatch gives", "plain vision transformer, such as"],
        ),
        ("{cass: {}}", ["backbones.cnn.args={num_classes: 10}"], ["number of classes", "10 (cnn)"]),
        (
            "{simclr: {}}",
            ["backbones={cnn: {name: maxvit_tiny_rw_256}}", "pretrain.image_size=100"],
            ["method simclr", "maxvit_tiny_rw_256", "cannot take images of 100 pixels"],
        ),
    ],
)
def test_what_a_net_or_a_method_refuses_is_found_before_any_job(check, methods, settings, words):
    with pytest.raises(UserError) as refused:
        check(methods, *settings)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    for word in words:
        assert word in str(refused.value)


def test_weights_that_do_not_fit_are_found_before_any_job(check, tmp_path):
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL_VIT | {"embed_dim": 48})
    torch.save(other.state_dict(), tmp_path / "w.pth")
    weights = f"backbones.vit.weights={tmp_path / 'w.pth'}"
    with pytest.raises(UserError, match=r"w\.pth' do not fit backbone 'vit_tiny_patch16_224'"):
        check("{supervised: {}}", weights)
    check("{supervised: {}}", weights, "backbones.vit.args.embed_dim=48")


@pytest.mark.parametrize("name", ["pbc", "hssl_heads", "stl10_scatsimclr", "nuclei_selfpatch"])
def test_ready_experiments_can_be_built(name, capsys, monkeypatch):
    assert name in ready_experiments()
    experiment = load_experiment(name, ["dataset.root=/nowhere"] if name != "hssl_heads" else [])
    preflight([task for task in plan(experiment) if task.stage != "shard"])
    assert not capsys.readouterr().err


def test_what_only_the_meta_device_cannot_do_is_said_and_refuses_nothing(check, capsys, monkeypatch):
    features = Net.features

    def cannot(net: Net, images: torch.Tensor) -> torch.Tensor:
        if images.is_meta:
            raise RuntimeError("unsupported scalarType")
        return features(net, images)

    monkeypatch.setattr(Net, "features", cannot)
    check("{simclr: {}}")
    assert "method simclr could not be tried out before the launch" in capsys.readouterr().err


def test_only_what_is_still_to_run_is_built_and_once(monkeypatch, tmp_path):
    built: list[str] = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **args: built.append(name) or create(name, **args))
    path = tmp_path / "small.yaml"
    path.write_text(
        "dataset: {source: digits}\nbackbones: {cnn: {name: test_resnet}}\nseeds: [0, 1, 2]\n"
        "methods: {simclr: {seeds: each}}\npretrain: {image_size: 32}\n"
    )
    tasks = plan(load_experiment(str(path)))
    preflight([task for task in tasks if task.stage == "aggregate"])
    assert not built
    preflight([task for task in tasks if task.stage == "pretrain"])
    assert built == ["test_resnet"]
