"""The pretrain stage from its task to its backbones."""

import json

import numpy as np
import pytest
import timm
import torch
from pretrain_cases import BACKBONES, OPTIONS, SIZE, assert_same_bits, settings, write_shards

from pipeline.errors import UserError
from pipeline.manifest import Receipt, Task
from pipeline.methods.registry import resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.nets.cost import cost
from pipeline.nets.export import load_exported
from pipeline.specs import PretrainSpec, Resources
from pipeline.stages import pretrain, runner
from pipeline.stages.work import Done, Interrupted, Work
from pipeline.train.checkpoint import list_checkpoints

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def make_work(
    method, shards, folder, *, archs=("cnn", "vit"), resources=None, options=None, **changed
) -> Work:
    spec = PretrainSpec(
        dataset="tiny",
        label=method,
        method=method,
        options=resolve_options(method, OPTIONS[method] if options is None else options),
        backbones={arch: BACKBONES[arch] for arch in archs},
        train=settings(**changed),
        seed=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    task = Task(id=f"pretrain/{method}", stage="pretrain", spec=spec.model_dump(), needs=[], key="0" * 64)
    sharded = Task(id="shard/tiny", stage="shard", spec={}, needs=[], key="1" * 64)
    receipt = Receipt(sharded.key, sharded.id, "shard", {}, {}, "", "", 0.0, ["here"], 1)
    return Work(
        task=task,
        folder=folder,
        inputs={"shard": [Done(sharded, shards, receipt)]},
        resources=resources or Resources(device="cpu"),
    )


def test_joint_method_leaves_two_backbones_that_plain_timm_loads_and_says_how_they_are(shards, tmp_path):
    work = make_work("cass_vc", shards, tmp_path, probe_epochs=1, averaging="swa", augment="simclr")
    outcome = pretrain.run(work)
    images = torch.rand(2, 3, SIZE, SIZE)
    for arch in ("cnn", "vit"):
        for classes in (0, 5):
            plain = timm.create_model(
                f"local-dir:{tmp_path / arch}", pretrained=True, num_classes=classes
            ).eval()
            net = load_exported(tmp_path / arch, num_classes=0).eval()
            ours = net.features(images)
            theirs = plain.forward_head(plain.forward_features(net.normalise(images)), pre_logits=True)
            assert torch.equal(ours, theirs)
    metrics = json.loads(json.dumps(outcome.metrics))
    assert metrics["steps"] == 10 and outcome.images_seen == 80 and outcome.device_seconds > 0
    assert metrics["images_per_second"] > 0 and np.isfinite(metrics["loss"])
    assert metrics["collapsed"] == {"cnn": False, "vit": False}
    assert metrics["knn"].keys() == metrics["health"].keys() == {"cnn", "vit"}
    assert metrics["backbones"] == {
        arch: cost(load_exported(tmp_path / arch, num_classes=0)) for arch in ("cnn", "vit")
    }
    assert metrics["knn"]["cnn"] == 1.0  # dark or bright: even a random CNN tells
    assert outcome.peak_memory_bytes > 2**20 and outcome.device == "cpu"
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kinds.count("health") == kinds.count("knn") == 5  # at the start, after 2.6 steps each, at the end
    assert any((tmp_path / "tensorboard").iterdir())


def test_batch_larger_than_the_set_is_warned_of(shards, tmp_path, capsys):
    def warnings(method: str, batch_size: int) -> list[str]:
        folder = tmp_path / f"{method}-{batch_size}"
        work = make_work(method, shards, folder, archs=("cnn",), batch_size=batch_size, epochs=1)
        return pretrain.run(work).metrics["warnings"]

    (warning,) = warnings("simclr", 32)
    assert warning == (
        "batch_size 32 is more than the 21 train images: a batch holds some more than once, which contrastive"
        " losses take for different ones"
    )
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert warnings("simclr", 20) == warnings("supervised", 32) == []
    assert "warning:" not in capsys.readouterr().err


def test_supervised_exports_the_initial_weights_as_they_are(shards, tmp_path):
    outcome = pretrain.run(make_work("supervised", shards, tmp_path, archs=("vit",)))
    initial = create_backbone(BACKBONES["vit"], SIZE, seed=1, arch="vit").headless().net.state_dict()
    assert_same_bits(dict(initial), dict(load_exported(tmp_path / "vit", num_classes=0).net.state_dict()))
    assert outcome.metrics["steps"] == outcome.images_seen == 0
    assert outcome.metrics["backbones"]["vit"]["params"] == sum(value.numel() for value in initial.values())
    assert outcome.metrics["loss"] is None and outcome.metrics["collapsed"] == {"vit": False}


def test_batch_norm_refresh_changes_batch_statistics_and_nothing_else(shards, tmp_path):
    outcome = pretrain.run(make_work("bn_refresh", shards, tmp_path, archs=("cnn",), averaging="none"))
    assert outcome.images_seen == 80 and outcome.metrics["collapsed"] == {"cnn": False}
    initial = create_backbone(BACKBONES["cnn"], SIZE, seed=1, arch="cnn").headless().net.state_dict()
    for name, value in load_exported(tmp_path / "cnn", num_classes=0).net.state_dict().items():
        refreshed = "running_" in name or "num_batches" in name
        assert torch.equal(value, initial[name]) != refreshed, name


def test_streamed_reading_trains_too(shards, tmp_path):
    outcome = pretrain.run(make_work("cass", shards, tmp_path, reading="streamed"))
    assert outcome.metrics["steps"] == 10 and np.isfinite(outcome.metrics["loss"])


def test_stopped_stage_is_interrupted_with_its_checkpoint(shards, tmp_path):
    work = make_work("cass", shards, tmp_path)
    work.stop_requested = lambda: True
    with pytest.raises(Interrupted, match="pretrain/cass: stopped after step 1 of 10"):
        pretrain.run(work)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_killed_between_the_last_step_and_the_receipt_repeats_one_checkpoint_interval(
    shards, tmp_path, monkeypatch, capsys
):
    whole, killed = (
        make_work("cass", shards, tmp_path / "whole"),
        make_work("cass", shards, tmp_path / "killed"),
    )
    receipts = [runner._leave_receipt(whole, pretrain.run(whole), "", 0.0)]

    def die(folder, **ignored):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "describe_files", die)
        runner._leave_receipt(killed, pretrain.run(killed), "", 0.0)
    assert (tmp_path / "killed" / "cnn" / "model.safetensors").exists()
    capsys.readouterr()
    receipts.append(runner._leave_receipt(killed, pretrain.run(killed), "", 0.0))
    assert "going on after step 9" in capsys.readouterr().err
    results = [
        {name: said for name, said in receipt.files.items() if not name.startswith("tensorboard")}
        for receipt in receipts
    ]
    assert results[0] == results[1] and "vit/model.safetensors" in results[0]
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(shards, tmp_path):
    with pytest.raises(UserError, match=r"resources\.device is 'cuda' but PyTorch finds no GPU"):
        pretrain.run(make_work("cass", shards, tmp_path, resources=Resources(device="cuda")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_method_without_steps_needs_no_gpu_wherever_the_others_run(shards, tmp_path):
    work = make_work("supervised", shards, tmp_path, archs=("cnn",), resources=Resources(device="auto"))
    assert pretrain.run(work).device == "cpu"


def test_a_profiled_training_has_the_same_weights_and_says_where_its_time_goes(shards, tmp_path, capsys):
    plain = make_work("cass_vc", shards, tmp_path / "plain")
    profiled = make_work("cass_vc", shards, tmp_path / "profiled", resources=Resources(profile_steps=1))
    for work in (plain, profiled):
        pretrain.run(work)
    for arch in ("cnn", "vit"):
        weights = [load_exported(w.folder / arch, num_classes=0).state_dict() for w in (plain, profiled)]
        assert_same_bits(*weights)
    rows = (profiled.folder / "profile" / "steps.txt").read_text().splitlines()
    spent = {row[:40].strip(): float(row[40:].split()[0]) for row in rows}
    parts = {
        "data",
        "augment",
        "forward cnn",
        "forward vit",
        "forward, heads and loss",
        "backward",
        "optimiser",
    }
    whole = spent.pop("a step, part by part")
    assert spent.pop("a step") > 0 and spent.pop("communication, beside the rest") == 0
    assert set(spent) == parts | {"other"} and spent["backward"] > 0
    assert sum(spent.values()) == pytest.approx(whole, abs=0.1)
    assert (profiled.folder / "profile" / "trace.json.gz").stat().st_size > 1000
    assert "profile of 3 steps" in capsys.readouterr().err and not (plain.folder / "profile").exists()


def test_a_training_too_short_for_a_profile_says_so(shards, tmp_path, capsys):
    pretrain.run(
        make_work("simclr", shards, tmp_path, archs=("cnn",), resources=Resources(profile_steps=900))
    )
    assert "no profile: it needs 2705 steps, and there were" in capsys.readouterr().err
