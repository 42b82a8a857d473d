"""The experiment file: what is accepted, what is refused and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment, ready_experiments
from pipeline.plan import plan
from pipeline.specs import FOR_SOURCES, Dataset

SMALL = """\
dataset: {source: digits}
backbones:
  cnn: {name: test_resnet}
  vit: {name: test_vit}
methods:
  supervised: {}
  cass: {}
seeds: [3]
"""


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        ("{source: digits}", "classification"),
        ("{source: csv, root: /x}", "classification"),
        ("{source: csv, root: /x, mask_column: mask, mask_classes: {a: 0, b: 9}}", "segmentation"),
        ("{source: masks, root: /x, mask_ignore: 255}", "segmentation"),
        ("{source: coco, root: /x, annotations: 'instances_{split}.json'}", "detection"),
        ("{source: voc, root: /x, classes: [a, b]}", "detection"),
    ],
)
def test_source_tells_the_kind_of_a_data_set(dataset, kind):
    given = yaml.safe_load(dataset)
    spec = Dataset.model_validate(given)
    assert spec.kind == kind
    written = spec.model_dump(mode="json")
    assert Dataset.model_validate(written) == spec
    # What is for other sources stands in no task's specification, and so changes no key.
    assert {key for key in written if key in FOR_SOURCES} == {key for key in given if key in FOR_SOURCES}
    assert written.get("mask_ignore", [255]) == [255]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("{source: masks}", "dataset: root is missing"),
        ("{source: coco, root: /x, masks: m}", "dataset: masks is for source masks, not for coco"),
        ("{source: folder, root: /x, mask_column: m}", "mask_column is for source csv, not for folder"),
        ("{source: csv, root: /x, mask_ignore: 255}", "mask_column is missing"),
        ("{source: masks, root: /x, classes: [a, b]}", "classes is not for masks: mask_classes"),
        (
            "{source: masks, root: /x, mask_classes: {0: a}}",
            "dataset.mask_classes: expected each class's name and its value",
        ),
        ("{source: masks, root: /x, mask_classes: {a: 256}}", "mask_classes.a: input should be less than"),
        ("{source: mask, root: /x}", "dataset.source: input should be 'digits'"),
    ],
)
def test_keys_of_another_source_are_named(file, dataset, message):
    with pytest.raises(UserError) as refused:
        load_experiment(file(SMALL.replace("{source: digits}", dataset)))
    assert message in str(refused.value) and "small.yaml:1: dataset" in str(refused.value)


@pytest.mark.parametrize("name", sorted(ready_experiments()))
def test_every_ready_experiment_plans(name):
    tasks = plan(load_experiment(name))
    assert {task.stage for task in tasks} - {"search"} == {"shard", "pretrain", "finetune", "aggregate"}


def test_every_ready_experiment_opens_with_what_it_is_and_its_command():
    for name, path in ready_experiments().items():
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(
            f"pipeline.launch all{'' if name == 'quickstart' else ' ' + name}" in line for line in head
        )


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (SMALL.replace("seeds", "seed"), 8, "seed: unknown key, did you mean 'seeds'"),
        (SMALL + "pretrain:\n  epoch: 3\n", 10, "pretrain.epoch: unknown key, did you mean 'epochs'"),
        (SMALL + "pretrain:\n  epochs: -1\n", 10, "pretrain.epochs: input should be greater than 0"),
        (SMALL.replace("  cass", "  cas"), 7, "methods.cas: unknown method, did you mean 'cass'"),
        (SMALL.replace("cass: {}", "cass: {options: {view: 2}}"), 7, "unknown option 'view'"),
        (SMALL.replace("cass: {}", "cass: {train: {lrate: 2}}"), 7, "methods.cass.train.lrate: unknown key"),
        (SMALL + "finetune: {protocols: [lineal]}\n", 9, "unknown protocol 'lineal'"),
        (SMALL + "finetune: {fractions: [1, 1]}\n", 9, "twice"),
        (SMALL + "report: {baseline: casss}\n", 9, "did you mean 'cass'"),
        (SMALL + "report: {metric: f1}\n", 9, "report.metric: unknown metric 'f1'"),
        (SMALL.replace("  vit: {name: test_vit}\n", ""), 2, "needs both a cnn and a vit"),
        (SMALL.replace("digits", "folder"), 1, "root is missing"),
        (SMALL + "resources: {pretrain: {tasks_per_job: 2}}\n", 9, "only finetune tasks share a job"),
    ],
)
def test_mistake_is_refused_with_file_line_and_key(file, text, line, message):
    path = file(text)
    with pytest.raises(UserError) as refused:
        load_experiment(path)
    assert str(refused.value).startswith(f"{path}:{line}: "), refused.value
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "found no mapping"), ("a: [1\n", "not valid YAML"), ("", "found no mapping")],
)
def test_file_that_is_no_experiment_is_refused(file, text, message):
    with pytest.raises(UserError, match=message):
        load_experiment(file(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: !!bool x",
            "not valid YAML",
        ),  # PyYAML raises KeyError, IndexError, AttributeError, OverflowError
        ("a: !!int ''", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: " + "59" * 50 + ".5", "digits"),
        ("a: !!timestamp 2024-99-99", "not valid YAML"),
        ("seeds: [" + "9" * 5000 + "]", "digits"),  # Python refuses to print it
        ("? [a]\n: b", "cannot be a key"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n? [*b, *b]\n: c", "cannot be a key"),
        (
            SMALL.replace("{name: test_resnet}", "{name: test_resnet, args: {a: {1: x, b: y}}}"),
            "plain values",
        ),
        (
            SMALL.replace("{name: test_resnet}", "{name: test_resnet, args: {checkpoint_path: /tmp/w}}"),
            "'checkpoint_path' is not for args",
        ),
        (SMALL.replace("cass: {}", "dino: {options: {hidden: !!timestamp 2024-01-01}}"), "plain values"),
        (
            SMALL.replace("cass: {}", "dino: {options: {momentum: 0.5, teacher_temperature: 1e999}}"),
            "plain values",
        ),
        (SMALL.replace("digits", "folder, root: ~nobody1/images"), "no home folder ~nobody1"),
        (SMALL.replace("digits", 'folder, root: "a\\0b"'), "NUL"),
        (SMALL.replace("test_vit", "test_vit, weights: ~nobody1/w"), "no home folder"),
    ],
)
def test_value_that_breaks_what_reads_it_is_refused(file, text, message):
    with pytest.raises(UserError, match=message) as refused:
        load_experiment(file(text))
    assert "small.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_set_overrides_by_dotted_key_and_names_itself_in_errors(file):
    path = file(SMALL)
    experiment = load_experiment(path, ["pretrain.epochs=7", "methods.dino={}", "finetune.fractions=[0.5]"])
    assert experiment.pretrain.epochs == 7
    assert list(experiment.methods) == ["supervised", "cass", "dino"]
    assert experiment.finetune.fractions == [0.5]
    with pytest.raises(UserError, match=r"^--set: pretrain\.epochs: "):
        load_experiment(path, ["pretrain.epochs=many"])
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        load_experiment(path, ["pretrain.epochs"])
    with pytest.raises(UserError, match="no keys below"):
        load_experiment(path, ["seeds.first=1"])


def test_methods_may_be_a_list_and_still_be_overridden(file):
    text = SMALL.replace("methods:\n  supervised: {}\n  cass: {}\n", "methods: [supervised, dino]\n")
    experiment = load_experiment(file(text), ["methods.dino.train.epochs=2"])
    assert experiment.training_of("dino").epochs == 2
    assert experiment.training_of("supervised").epochs != 2


def test_settings_come_from_recipe_then_experiment_then_method(file):
    text = SMALL.replace("cass: {}", "cass: {}\n  dino: {train: {warmup_epochs: 2}}")
    text += "pretrain: {batch_size: 64, weight_decay: 0.3}\n"
    experiment = load_experiment(file(text))
    dino = experiment.training_of("dino")
    assert dino.lr == pytest.approx(5e-4 * 64 / 256), "the recipe's rate is for a batch of 256"
    assert dino.weight_decay == 0.3, "the experiment wins over the recipe"
    assert dino.warmup_epochs == 2, "the method's own entry wins over both"
    assert experiment.training_of("cass").optimizer == "adam"


def test_resolved_experiment_gives_the_same_plan(file, tmp_path):
    first = load_experiment(file(SMALL))
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(first.resolved(), sort_keys=False))
    assert [task.key for task in plan(load_experiment(str(again)))] == [task.key for task in plan(first)]


def test_unknown_experiment_names_the_nearest_ready_one():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_experiment("quikstart")
    for name in ("nowhere/mine.yaml", f"{'x' * 300}.yaml", "a\0.yaml"):
        with pytest.raises(UserError, match="no experiment file"):
            load_experiment(name)


def test_partly_given_resources_keep_the_rest_of_their_stage(file):
    resources = load_experiment(file(SMALL), ["resources.finetune.minutes=7"]).resources.finetune
    assert (resources.minutes, resources.tasks_per_job) == (7, 16)


def test_method_trains_its_own_backbones_where_its_entry_names_them(file):
    text = SMALL.replace("supervised: {}", "supervised: {backbones: {cnn: {name: resnet10t}}}")
    experiment = load_experiment(file(text))
    own, others = experiment.backbones_of("supervised"), experiment.backbones_of("cass")
    assert (own["cnn"].name, own["vit"].name) == ("resnet10t", "test_vit")
    assert others["cnn"].name == "test_resnet"
    specs = {task.id: task.spec for task in plan(experiment)}
    assert specs["pretrain/small-supervised-cnn-s3"]["backbones"]["cnn"]["name"] == "resnet10t"
    assert specs["finetune/small-supervised-cnn-linear-1pc-s3"]["backbone"]["name"] == "resnet10t"


def test_a_method_gets_the_timm_arguments_it_wants_where_the_backbone_names_no_others(file):
    text = SMALL.replace("cass: {}", "selfpatch: {}\n  own: {method: selfpatch, weights: w.pt}")
    text = text.replace("test_vit}", "test_vit, args: {depth: 2, global_pool: max}}")
    experiment = load_experiment(file(text))
    assert experiment.backbones_of("supervised")["vit"].args == {"depth": 2, "global_pool": "max"}
    wanted = {"class_token": False, "global_pool": "max", "depth": 2}
    (only,) = experiment.backbones_of("selfpatch").values()  # no CNN: it trains ViTs alone
    assert (only.args, only.weights) == (wanted, "random")
    assert experiment.backbones_of("own")["vit"].weights.endswith("w.pt")
    pretrainings = [task.id for task in plan(experiment) if task.stage == "pretrain"]
    assert [name for name in pretrainings if "selfpatch" in name] == ["pretrain/small-selfpatch-vit-s3"]
    spec = next(task.spec for task in plan(experiment) if task.id.startswith("finetune/small-selfpatch-vit"))
    assert spec["backbone"]["args"] == wanted


def test_protocols_that_are_not_for_the_data_sets_labels_are_refused(file, monkeypatch):
    monkeypatch.setattr("pipeline.specs.Dataset.kind", property(lambda dataset: "segmentation"))
    with pytest.raises(UserError, match=r"finetune\.protocols: none is for segmentation, which small is"):
        load_experiment(file(SMALL), ["finetune.protocols=[linear, detect]"])


def test_method_may_be_pretrained_more_or_less_often_than_the_others(file):
    text = SMALL.replace("seeds: [3]", "seeds: [3, 4]").replace(
        "supervised: {}", "supervised: {seeds: first}"
    )
    ids = [task.id for task in plan(load_experiment(file(text)))]
    assert [name for name in ids if name.startswith("pretrain/small-cass-")] == [
        "pretrain/small-cass-cnn-vit-s3",
        "pretrain/small-cass-cnn-vit-s4",
    ]
    assert [name for name in ids if name.startswith("pretrain/small-supervised-cnn")] == [
        "pretrain/small-supervised-cnn-s3"
    ]
    assert ids.count("finetune/small-supervised-cnn-linear-1pc-s4") == 1
    assert ids.count("finetune/small-cass-cnn-linear-1pc-s4") == 1
