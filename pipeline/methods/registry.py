"""Every method by name: its class, its options, its training recipe, the nets it trains.

Nothing here imports torch, so that planning stays fast; ``pipeline.methods.load`` imports the class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.errors import UserError, nearest
from pipeline.methods.options import (
    ByolOptions,
    CrossArchitectureOptions,
    DinoOptions,
    HsslOptions,
    IbotOptions,
    NoOptions,
    Options,
    SelfpatchOptions,
    SimclrOptions,
)
from pipeline.specs import Architecture, Backbone


class OptionError(UserError):
    """An option is unknown or has a wrong value; ``option`` is its name, None where several do not agree."""

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True)
class MethodInfo:
    """What the planner and the training loop must know about a method without importing it.

    Attributes:
        name: as written in an experiment file.
        target: ``module:Class`` of the implementation.
        options: the pydantic model of its options.
        preset: option values that this name changes from the model's defaults.
        joint: True where one run trains a CNN and a ViT together; else one run a net.
        archs: the nets that it can train; an experiment's other nets go without it.
        backbones: nets that it brings along, in place of the experiment's own.
        args: timm arguments that its nets get where the experiment does not give them another value.
        search: None, or ``module:Class`` of the method that finds the value of an option given as ``search``.
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
    archs: tuple[Architecture, ...] = ("cnn", "vit")
    backbones: dict[Architecture, Backbone] = field(default_factory=dict)
    args: dict[Architecture, dict[str, Any]] = field(default_factory=dict)
    search: str | None = None
    steps: Literal["train", "forward", "none"] = "train"
    recipe: dict[str, Any] = field(default_factory=dict)

    def with_args(self, arch: Architecture, backbone: Backbone) -> Backbone:
        """The backbone with the timm arguments that the method wants and it does not name itself."""
        return backbone.model_copy(update={"args": self.args.get(arch, {}) | backbone.args})


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
_HSSL_RECIPE = _DINO_RECIPE | {"lr": 7.5e-4, "clip_grad": 0.3}
_HSSL = "pipeline.methods.hssl:Hssl"
_HSSL_SEARCH = "pipeline.methods.hssl_search:HsslSearch"
_SCATSIMCLR_RECIPE = _BASE_RECIPE | {"optimizer": "adam", "lr": 3e-4, "weight_decay": 1e-5}
_CROSS = "pipeline.methods.cass:CrossArchitecture"
_TWO_VIEWS = {"views": 2, "head": "projector"}
_FOUR_PAIRS = _TWO_VIEWS | {"regulariser": "infonce", "pairs": "cross+self", "projector_dim": 128}
_PLUS = _FOUR_PAIRS | {"n_local": 2, "same_view": True}

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
            preset=_FOUR_PAIRS,
            joint=True,
            recipe=_TWO_VIEW_RECIPE,
        ),
        MethodInfo(
            "cass_plus", _CROSS, CrossArchitectureOptions, preset=_PLUS, joint=True, recipe=_TWO_VIEW_RECIPE
        ),
        MethodInfo("dino", "pipeline.methods.dino:Dino", DinoOptions, recipe=_DINO_RECIPE),
        MethodInfo(
            "selfpatch",
            "pipeline.methods.selfpatch:SelfPatch",
            SelfpatchOptions,
            archs=("vit",),
            # Its pooled vector would otherwise be a class token that nothing has trained.
            args={"vit": {"class_token": False, "global_pool": "avg"}},
            recipe=_DINO_RECIPE,
        ),
        MethodInfo("ibot", "pipeline.methods.ibot:Ibot", IbotOptions, archs=("vit",), recipe=_DINO_RECIPE),
        MethodInfo("hssl", _HSSL, HsslOptions, search=_HSSL_SEARCH, recipe=_HSSL_RECIPE),
        MethodInfo(
            "hssl_ibot",
            _HSSL,
            HsslOptions,
            preset={"host": "ibot"},
            archs=("vit",),
            search=_HSSL_SEARCH,
            recipe=_HSSL_RECIPE,
        ),
        MethodInfo("simclr", "pipeline.methods.simclr:SimCLR", SimclrOptions, recipe=_TWO_VIEW_RECIPE),
        MethodInfo(
            "scatsimclr",
            "pipeline.methods.simclr:SimCLR",
            SimclrOptions,
            preset={"head_bn": False, "pretext": "rotation"},
            archs=("cnn",),
            backbones={"cnn": Backbone(name="scatnet16")},
            recipe=_SCATSIMCLR_RECIPE,
        ),
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
            raise OptionError(f"method {name}: unknown option '{option}'{hint}", option)
    try:
        return info.options.model_validate(info.preset | given).model_dump()
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        raise OptionError(_one_line(name, error), str(where[0]) if where else None) from None


def searched_option(options: dict[str, Any]) -> str | None:
    """The option that a search has to decide, or None."""
    return next((name for name, value in options.items() if value == "search"), None)


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
