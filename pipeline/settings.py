"""Which settings decide which results: the one table, and what it makes of a specification.

A setting *decides results* or is *execution* (how fast, how safe, how much is kept and told). A task's key is
a hash of :func:`identity`: of its specification the settings that decide this very task, where they differ
from the defaults of its stage's format. So a new option with a default changes no key, and a changed default
needs a new format (tests/unit/golden/defaults.json holds those that were hashed as nothing).

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel

from pipeline.evaluate.protocols import PROTOCOL_NAMES
from pipeline.methods.registry import METHODS
from pipeline.specs import (
    AggregateSpec,
    Backbone,
    Dataset,
    FinetuneSettings,
    FinetuneSpec,
    PretrainSpec,
    ReportSettings,
    ShardSpec,
    Splits,
    Strict,
    Training,
)

Json = dict[str, Any]
Steps = Literal["none", "forward", "train"]

EXECUTION: Final = "execution"
# The least kind of steps (``MethodInfo.steps``) with which a training setting decides a pretraining's result.
TRAINING: dict[str, Steps | Literal["execution"]] = {
    "image_size": "none",
    "fit": "none",
    "epochs": "forward",
    "batch_size": "forward",
    "accumulate": "forward",
    "augment": "forward",
    "averaging": "forward",
    "ema_decay": "forward",
    "swa_start": "forward",
    "precision": "forward",
    "sync_bn": "forward",
    "channels_last": "forward",
    "compile": "forward",
    "reading": "forward",
    "optimizer": "train",
    "lr": "train",
    "lr_min": "train",
    "warmup_epochs": "train",
    "schedule": "train",
    "weight_decay": "train",
    "weight_decay_end": "train",
    "clip_grad": "train",
    "recompute": "train",  # batch statistics are taken twice
    "on_nan": "train",
    "cache": EXECUTION,
    "workers": EXECUTION,
    "checkpoint_steps": EXECUTION,
    "checkpoint_seconds": EXECUTION,
    "keep_checkpoints": EXECUTION,
    "probe_epochs": EXECUTION,
}
_STEPS: tuple[Steps, ...] = ("none", "forward", "train")

_ALL = frozenset(PROTOCOL_NAMES)
_TRAINED = frozenset({"finetune", "seg_fpn", "detect", "detect_masks"})
_WEIGHTED = frozenset({"finetune", "linear", "seg_linear", "seg_fpn"})
# The protocols whose result a fine-tuning setting decides.
FINETUNE: dict[str, frozenset[str] | Literal["execution"]] = {
    "image_size": _ALL,
    "fit": _ALL,
    "precision": _ALL,
    "fractions_by": _ALL,
    "validation": _ALL,  # which images the validation score of a receipt is of
    "select_by": _ALL - {"knn"},
    "class_weights": _WEIGHTED,
    "head": frozenset({"finetune"}),
    "epochs": _TRAINED,
    "max_steps": _TRAINED,
    "batch_size": _TRAINED,
    "augment": _TRAINED,
    "optimizer": _TRAINED,
    "lr": _TRAINED,
    "lr_min": _TRAINED,
    "weight_decay": _TRAINED,
    "patience": _TRAINED,
    "loss": frozenset({"finetune", "seg_fpn"}),
    "focal_gamma": frozenset({"finetune", "seg_fpn"}),
    "head_width": _TRAINED - {"finetune"},
    "knn_k": frozenset({"knn"}),
    "cache": EXECUTION,
    "workers": EXECUTION,
    "keep": EXECUTION,
}
# Settings that count only where another one has a certain value.
ONLY_WITH: dict[str, tuple[str, Any]] = {
    "ema_decay": ("averaging", "ema"),
    "swa_start": ("averaging", "swa"),
    "focal_gamma": ("loss", "focal"),
    "lr_min": ("schedule", "cosine"),  # a fine-tuning has no other schedule
}
# Fine-tuning settings that say which labels are drawn, and so nothing where all are.
DRAW: Final = frozenset({"fractions_by", "validation"})


def decides_training(setting: str, steps: Steps) -> bool:
    """Whether a training setting decides the result of a method that takes such steps."""
    least = TRAINING[setting]
    return least != EXECUTION and _STEPS.index(least) <= _STEPS.index(steps)


def decides_finetuning(setting: str, protocol: str, fraction: float) -> bool:
    """Whether a fine-tuning setting decides the result of a protocol with a share of the labels."""
    protocols = FINETUNE[setting]
    drawn = fraction < 1 or setting not in DRAW
    return protocols != EXECUTION and protocol in protocols and drawn


def identity(spec: Strict) -> Json:
    """What decides a task's result, as JSON values; everything that is not here has the format's default.

    Args:
        spec: a specification of :mod:`pipeline.specs`.
    """
    kind = next(kind for kind in type(spec).__mro__ if kind in _IDENTITIES)  # a SearchSpec is a PretrainSpec
    return _IDENTITIES[kind](spec)


def _pretrain(spec: PretrainSpec) -> Json:
    info = METHODS[spec.method]
    used = [name for name in Training.model_fields if decides_training(name, info.steps)]
    options = info.options.model_validate(spec.options)
    return {
        **_names(spec, "dataset", "label", "method", "seed"),
        "options": changed(options),
        "backbones": {arch: changed(net) for arch, net in spec.backbones.items()},
        "train": changed(spec.train, used),
        **({"contents": spec.contents} if spec.contents else {}),
    }


def _finetune(spec: FinetuneSpec) -> Json:
    used = [
        name
        for name in FinetuneSettings.model_fields
        if decides_finetuning(name, spec.protocol, spec.fraction)
    ]
    return {
        **_names(spec, "dataset", "label", "arch", "protocol", "fraction", "seed"),
        "settings": changed(spec.settings, used),
    }


def _shard(spec: ShardSpec) -> Json:
    return {"dataset": changed(spec.dataset), **({"contents": spec.contents} if spec.contents else {})}


def _aggregate(spec: AggregateSpec) -> Json:
    return {**_names(spec, "experiment", "seeds"), "report": changed(spec.report)}


def _names(spec: Strict, *names: str) -> Json:
    return {name: getattr(spec, name) for name in names}


def changed(model: BaseModel, names: Collection[str] | None = None) -> Json:
    """The fields of a model that differ from their defaults, as JSON values; models within it likewise.

    Args:
        names: of the fields that count; None: all.
    """
    values = model.model_dump(mode="json")
    found: Json = {}
    for name, field in type(model).model_fields.items():
        if name not in values or (names is not None and name not in names):
            continue
        other, value = ONLY_WITH.get(name, ("", None))
        if other in values and values[other] != value:
            continue
        now = getattr(model, name)
        if field.is_required() or now != field.get_default(call_default_factory=True):
            found[name] = changed(now) if isinstance(now, BaseModel) else values[name]
    return found


_IDENTITIES: Mapping[type, Callable[[Any], Json]] = {
    ShardSpec: _shard,
    PretrainSpec: _pretrain,
    FinetuneSpec: _finetune,
    AggregateSpec: _aggregate,
}


def defaults() -> dict[str, Json]:
    """What is left out of keys, by stage: every default that counts for it."""
    training = _defaults(Training, [name for name, least in TRAINING.items() if least != EXECUTION])
    pretrain = {
        "train": training,
        "backbone": _defaults(Backbone),
        "options": {name: _defaults(info.options) for name, info in sorted(METHODS.items())},
    }
    used = [name for name, protocols in FINETUNE.items() if protocols != EXECUTION]
    return {
        "shard": {"dataset": _defaults(Dataset), "splits": _defaults(Splits)},
        "search": pretrain,
        "pretrain": pretrain,
        "finetune": {"settings": _defaults(FinetuneSettings, used)},
        "aggregate": {"report": _defaults(ReportSettings)},
    }


def _defaults(model: type[BaseModel], names: Collection[str] | None = None) -> Json:
    found = {}
    for name, field in model.model_fields.items():
        if not field.is_required() and (names is None or name in names):
            value = field.get_default(call_default_factory=True)
            found[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return found
