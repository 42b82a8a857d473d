"""Every method by name: its class, its options with defaults and ranges, its training recipe.

Nothing here imports torch, so that planning stays fast; ``pipeline.methods.load`` imports the class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UserError, nearest


class Options(BaseModel):
    """Options of one method: unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class NoOptions(Options):
    """A method with nothing to choose."""


class CrossArchitectureOptions(Options):
    """A CNN and a ViT that learn to agree; see ``pipeline.methods.cass``."""

    views: Literal[1, 2] = 1  # augmented views of an image
    head: Literal["logits", "projector"] = "logits"  # what is compared: timm's classifier or an MLP
    pairs: Literal["cross", "cross+self"] = "cross"  # cross+self: each net also agrees with itself
    symmetric: bool = True  # two views: CNN(1)-ViT(2) and CNN(2)-ViT(1), not only the first
    regulariser: Literal["none", "variance_covariance", "infonce", "stop_gradient"] = "none"
    projector_layers: int = Field(3, ge=1, le=5)
    projector_hidden: int = Field(2048, ge=8)
    projector_dim: int = Field(512, ge=8)
    predictor_hidden: int = Field(512, ge=8)  # stop_gradient only
    temperature: float = Field(0.2, gt=0)  # infonce only
    invariance: float = Field(25, ge=0)  # the three coefficients of variance_covariance
    variance: float = Field(25, ge=0)
    covariance: float = Field(1, ge=0)

    @model_validator(mode="after")
    def _self_pairs_need_two_views(self) -> CrossArchitectureOptions:
        if self.pairs == "cross+self" and self.views == 1:
            raise ValueError("pairs 'cross+self' needs views 2: a net agrees with itself across two views")
        return self


class DinoOptions(Options):
    """Self-distillation with multi-crop; see ``pipeline.methods.dino``."""

    n_local: int = Field(8, ge=0, le=32)  # local crops beside the two global ones
    local_size: int | None = Field(None, ge=8)  # pixels; None: 3/7 of the image (96 of 224)
    out_dim: int = Field(65536, ge=2)  # prototypes K
    hidden: int = Field(2048, ge=8)
    bottleneck: int = Field(256, ge=2)
    head_layers: int = Field(3, ge=1, le=6)
    head_bn: bool = False  # batch normalisation inside the head
    norm_last_layer: bool = True  # prototypes of length 1, not of a learnt length
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature_start: float = Field(0.04, gt=0)
    teacher_temperature: float = Field(0.07, gt=0)
    teacher_warmup_epochs: float = Field(30, ge=0)  # epochs from the first temperature to the second
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    momentum: float = Field(0.996, ge=0, le=1)  # of the teacher at the start; 1 at the end
    freeze_last_layer_epochs: float = Field(1, ge=0)


class SimclrOptions(Options):
    """Contrastive learning within the batch; see ``pipeline.methods.simclr``."""

    temperature: float = Field(0.5, gt=0)  # 0.5 suits small sets and batches, 0.1-0.2 large ones
    hidden: int = Field(2048, ge=8)
    out_dim: int = Field(128, ge=2)


class ByolOptions(Options):
    """Prediction of a slow teacher's projection; see ``pipeline.methods.byol``."""

    hidden: int = Field(4096, ge=8)
    out_dim: int = Field(256, ge=2)
    momentum: float = Field(0.996, ge=0, le=1)  # of the teacher at the start; 1 at the end


@dataclass(frozen=True)
class MethodInfo:
    """What the planner and the training loop must know about a method without importing it.

    Attributes:
        name: as written in an experiment file.
        target: ``module:Class`` of the implementation.
        options: the pydantic model of its options.
        preset: option values that this name changes from the model's defaults.
        joint: True where one run trains a CNN and a ViT together; else one run a net.
        steps: ``train``; ``forward``: forward passes without an optimiser step; ``none``: the initial weights
            are exported as they are.
        recipe: default training settings, keys of ``pipeline.specs.Training``, and ``lr_per_batch``: None,
            or the batch size that ``lr`` is meant for (linear scaling).
    """

    name: str
    target: str
    options: type[Options]
    preset: dict[str, Any] = field(default_factory=dict)
    joint: bool = False
    steps: Literal["train", "forward", "none"] = "train"
    recipe: dict[str, Any] = field(default_factory=dict)


_BASE_RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "lr_per_batch": None,
    "lr_min": 1e-6,
    "warmup_epochs": 0.0,
    "schedule": "cosine",
    "weight_decay": 0.05,
    "weight_decay_end": None,
    "clip_grad": None,
    "averaging": "none",
}
_CASS_RECIPE = _BASE_RECIPE | {"optimizer": "adam", "weight_decay": 0.0, "averaging": "swa"}
_TWO_VIEW_RECIPE = _BASE_RECIPE | {"warmup_epochs": 1.0, "clip_grad": 3.0}
_DINO_RECIPE = _BASE_RECIPE | {
    "lr": 5e-4,
    "lr_per_batch": 256,
    "warmup_epochs": 10.0,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
}
_CROSS = "pipeline.methods.cass:CrossArchitecture"
_TWO_VIEWS = {"views": 2, "head": "projector"}

METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            "supervised",
            "pipeline.methods.supervised:Supervised",
            NoOptions,
            steps="none",
            recipe=_BASE_RECIPE,
        ),
        MethodInfo(
            "bn_refresh",
            "pipeline.methods.supervised:BatchNormRefresh",
            NoOptions,
            steps="forward",
            recipe=_BASE_RECIPE,
        ),
        MethodInfo("cass", _CROSS, CrossArchitectureOptions, joint=True, recipe=_CASS_RECIPE),
        MethodInfo(
            "cass_vc",
            _CROSS,
            CrossArchitectureOptions,
            preset=_TWO_VIEWS | {"regulariser": "variance_covariance"},
            joint=True,
            recipe=_TWO_VIEW_RECIPE,
        ),
        MethodInfo(
            "cass_nce",
            _CROSS,
            CrossArchitectureOptions,
            preset=_TWO_VIEWS | {"regulariser": "infonce", "pairs": "cross+self", "projector_dim": 128},
            joint=True,
            recipe=_TWO_VIEW_RECIPE,
        ),
        MethodInfo("dino", "pipeline.methods.dino:Dino", DinoOptions, recipe=_DINO_RECIPE),
        MethodInfo("simclr", "pipeline.methods.simclr:SimCLR", SimclrOptions, recipe=_TWO_VIEW_RECIPE),
        MethodInfo("byol", "pipeline.methods.byol:Byol", ByolOptions, recipe=_TWO_VIEW_RECIPE),
    )
}


def method_info(name: str) -> MethodInfo:
    """The registered method of this name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in METHODS:
        raise UserError(f"unknown method '{name}'{nearest(name, METHODS) or f' (there are {_listing()})'}")
    return METHODS[name]


def resolve_options(name: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every option of a method: its defaults, then this name's preset, then what was given.

    Args:
        name: a key of ``METHODS``.
        given: option values from the experiment file.

    Raises:
        UserError: unknown method or option (with the nearest real one), wrong type, value out of range.
    """
    info = method_info(name)
    given = given or {}
    known = info.options.model_fields
    for option in given:
        if option not in known:
            hint = nearest(option, known) or (f" (it has {', '.join(known)})" if known else " (it has none)")
            raise UserError(f"method {name}: unknown option '{option}'{hint}")
    try:
        return info.options.model_validate(info.preset | given).model_dump()
    except ValidationError as error:
        raise UserError(_one_line(name, error)) from None


def resolve_recipe(name: str, *, batch_size: int) -> dict[str, Any]:
    """The method's own training settings, with the learning rate scaled to the global batch size.

    Returns:
        Keys of ``pipeline.specs.Training`` only: ``lr_per_batch`` has been applied.
    """
    recipe = dict(method_info(name).recipe)
    per_batch = recipe.pop("lr_per_batch", None)
    if per_batch is not None:
        recipe["lr"] = recipe["lr"] * batch_size / per_batch
    return recipe


def _listing() -> str:
    return ", ".join(METHODS)


def _one_line(name: str, error: ValidationError) -> str:
    """The first problem that pydantic found, as one line that names the option."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"method {name}: {message}"
    return f"method {name}: option {first['loc'][0]} = {first['input']!r}: {message}"
