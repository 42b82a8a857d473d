"""What cannot work is refused when the experiment file is read, not after minutes of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment

SMALL = """\
dataset: {source: digits}
backbones:
  cnn: {name: test_resnet}
  vit: {name: test_vit}
methods:
  supervised: {}
  simclr: {}
pretrain: {batch_size: 8}
"""
COCO, VOC = "{source: coco, root: /x}", "{source: voc, root: /x}"


@pytest.fixture
def load(tmp_path: Path):
    """``load(*settings)`` reads the small experiment with ``KEY=VALUE`` settings over it."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return lambda *settings: load_experiment(str(path), settings)


@pytest.fixture
def refuse(load):
    """``refuse(*settings)`` is the one line that the settings get."""

    def line(*settings: str) -> str:
        with pytest.raises(UserError) as refused:
            load(*settings)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return line


def test_batch_that_the_ranks_of_a_training_cannot_share_is_refused(load, refuse):
    said = refuse("resources.pretrain.ranks_per_node=3")
    assert said.startswith("--set: pretrain.batch_size") or "small.yaml:8: pretrain.batch_size" in said
    assert "batch_size 8" in said and "3" in said and "6 or 9" in said
    assert "pretrain.accumulate" in refuse("pretrain.accumulate=3")
    load("resources.pretrain.ranks_per_node=4", "pretrain.accumulate=2")
    said = refuse("methods.simclr.train.batch_size=9", "resources.pretrain.nodes=2")
    assert "methods.simclr.train.batch_size" in said and "8 or 10" in said
    # Nothing is trained, so nothing is shared.
    load("methods.supervised.train.batch_size=9", "resources.pretrain.nodes=2")


def test_a_search_is_held_to_its_own_ranks(load, refuse):
    hssl = "methods.hssl.options={head: search}"
    said = refuse(hssl, "resources.search.ranks_per_node=3")
    assert "search" in said and "multiple of 3" in said
    load("methods.hssl.options={head: pool}", "resources.search.ranks_per_node=3")


def test_one_image_a_micro_batch_is_refused_with_the_greatest_accumulate_that_works(load, refuse):
    said = refuse("pretrain.accumulate=8")
    assert "batch_size 8" in said and "accumulate 8" in said and "at most 4" in said
    load("pretrain.accumulate=4")
    load("pretrain.accumulate=1", "resources.pretrain.ranks_per_node=8")
    said = refuse("pretrain.batch_size=2", "pretrain.accumulate=2")
    assert "at most 1" in said
    said = refuse("pretrain.batch_size=3", "pretrain.accumulate=3")
    assert "at most 1" in said


@pytest.mark.parametrize("key", ["report.metric", "finetune.select_by"])
def test_a_metric_that_a_data_sets_labels_lack_is_refused(load, refuse, key):
    assert f"{key}: no metric 'miou' for single-label data" in refuse(f"{key}=miou")
    assert f"{key}: no metric 'map' for single-label data" in refuse(f"{key}=map")
    load(f"{key}=map", "dataset={source: csv, root: /x, label_columns: [a, b]}")
    load(f"{key}=map", "dataset={source: csv, root: /x, label_separator: '|'}")
    load(f"{key}=miou", "dataset={source: csv, root: /x, mask_column: mask}")


@pytest.mark.parametrize("key", ["report.metric", "finetune.select_by"])
def test_one_metric_stands_for_data_sets_of_several_kinds(load, refuse, key):
    several = f"datasets={{a: {{source: digits}}, b: {{source: digit_pages}}, c: {COCO}}}"
    load("dataset=null", several, f"{key}=accuracy")
    said = refuse("dataset=null", several, f"{key}=box_ap")
    assert "single-label" in said and "'a'" in said
    pixels_and_boxes = f"datasets={{b: {{source: digit_pages}}, c: {COCO}}}"
    load("dataset=null", pixels_and_boxes, f"{key}=mask_ap")


def test_masks_of_objects_are_not_asked_of_voc_files_which_hold_boxes(load, refuse):
    said = refuse(f"dataset={VOC}", "finetune.protocols=[detect, detect_masks]")
    assert "finetune.protocols: detect_masks needs outlines" in said and "voc" in said and "detect " in said
    load(f"dataset={VOC}", "finetune.protocols=[detect]")
    both = load(
        "dataset=null", f"datasets={{a: {VOC}, b: {COCO}}}", "finetune.protocols=[detect, detect_masks]"
    )
    assert [both.protocols_of(data) for data in both.all_datasets] == [["detect"], ["detect", "detect_masks"]]
    said = refuse("dataset=null", f"datasets={{a: {VOC}, b: {COCO}}}", "finetune.protocols=[detect_masks]")
    assert "none is for detection, which a is (detect)" in said


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("seeds=[true]", "seeds"),
        ("seeds=[0, false]", "seeds"),
        ("pretrain.epochs=True", "pretrain.epochs"),
        ("methods.dino.options.n_local=FALSE", "methods.dino.options.n_local"),
        ("methods.cass.options.views=true", "methods.cass.options.views"),
        ("methods.simclr.options={pretext: jigsaw, pretext_hidden: [true, 4]}", "pretext_hidden"),
        ("finetune.fractions=[true]", "finetune.fractions"),
        ("dataset={source: masks, root: /x, mask_classes: {a: 0, b: true}}", "dataset.mask_classes"),
    ],
)
def test_true_is_no_number(refuse, setting, where):
    said = refuse(setting)
    assert said.startswith("--set: ") and where in said and "expected a number, found true or false" in said


def test_numbers_written_otherwise_and_truth_where_it_belongs_are_taken(load):
    experiment = load("seeds=[1.0, '2']", "methods.dino.options={n_local: 2.0, head_bn: yes}")
    assert experiment.seeds == [1, 2]
    options = experiment.options_of("dino")
    assert options["n_local"] == 2 and options["head_bn"] is True
    load("pretrain.sync_bn=off", "methods.simclr.train={compile: true}")
    load("backbones.vit.args={qkv_bias: true}")


@pytest.mark.parametrize("given", ["Graphs", "graph", "1", "null", "[graphs]"])
def test_what_compile_may_be_is_said(refuse, load, given):
    said = refuse(f"pretrain.compile={given}")
    assert "pretrain.compile: expected true, false or graphs, found " in said
    assert load("pretrain.compile=graphs").pretrain.compile == "graphs"


def test_widths_of_a_pretexts_head_are_positive(refuse):
    said = refuse("methods.simclr.options={pretext: rotation, pretext_hidden: [0, -4]}")
    assert "pretext_hidden" in said and "greater than or equal to 1" in said


@pytest.mark.parametrize(
    ("text", "number"),
    [("'1e-1'", "0.1"), ("'1e-6'", "1.0e-06"), ("'8'", "8"), ("[1, '3e+2']", "300"), ("08", "8")],
)
def test_text_where_a_nets_number_belongs_is_named(refuse, load, text, number):
    said = refuse(f"backbones.vit.args.drop_path_rate={text}")
    assert said.startswith("--set: backbones.vit.args.drop_path_rate: found the text")
    assert said.endswith(f"write {number}")
    load(f"backbones.vit.args.drop_path_rate={number}")
    load("backbones.vit.args={global_pool: avg, norm_layer: layernorm2d}")


def test_words_that_yaml_1_1_takes_for_something_else_stay_as_they_are_written(load):
    experiment = load(
        "dataset={source: folder, root: 0123, classes: [no, yes, 007, 1:30, 2024-01-01, 0x1F, 1_000]}"
    )
    assert experiment.dataset.root == "0123"
    assert experiment.dataset.classes == ["no", "yes", "007", "1:30", "2024-01-01", "0x1F", "1_000"]
    assert (
        load("pretrain.lr=1e-3").pretrain.lr == 0.001
        and load("pretrain.sync_bn=no").pretrain.sync_bn is False
    )


def test_an_option_given_with_set_is_reported_as_such(refuse, tmp_path):
    said = refuse("methods.hssl.options.head=serch")
    assert said.startswith("--set: methods.hssl.options.head: method hssl: option head = 'serch'")
    assert refuse("methods.hssl.options.hed=pool").startswith("--set: methods.hssl.options.hed: ")
    # Each value is sound, and together they are not: one of them may stand in the file.
    said = refuse("methods.cass.options.pairs=self")
    assert said.startswith(f"{tmp_path / 'small.yaml'}:5 with --set: methods.cass.options: ")
