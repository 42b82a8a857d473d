"""Which of timm's models are CNNs and which are vision transformers."""

from __future__ import annotations

from typing import Literal

import timm

import pipeline.nets.scatnet  # noqa: F401 — registers its models with timm
from pipeline.errors import UserError, nearest
from pipeline.specs import Architecture

PLAIN_VIT = "a plain vision transformer, such as vit_small_patch16_224 or deit3_small_patch16_224"

# timm source files (one a family) whose models mix tokens by attention throughout.
_VIT_FAMILIES = frozenset(
    """
    beit cait convit crossvit davit deepseek_vit deit eva gcvit gemma4_vit hiera hieradet_sam2 mvitv2
    naflexvit nest pit pvt_v2 qwen3_vit swin_transformer swin_transformer_v2 swin_transformer_v2_cr tnt
    twins vision_transformer vision_transformer_relpos vision_transformer_sam volo xcit
    """.split()  # noqa: SIM905
)
# Those that mix convolution with attention, or use neither: they may stand for either.
_OTHER_FAMILIES = frozenset(
    """
    byoanet coat cpubone csatv2 edgenext efficientformer efficientformer_v2 efficientvim
    efficientvit_mit efficientvit_msra fastvit focalnet iformer levit lowformer mambaout maxxvit
    metaformer mlp_mixer mobilenetv5 mobilevit nextvit sequencer shvit swiftformer tiny_vit
    vision_transformer_hybrid visformer vitamin
    """.split()  # noqa: SIM905
)


def check_name(name: str) -> None:
    """Refuse a name, or a pretrained tag after its dot, that timm does not know.

    Raises:
        UserError: with the nearest known name.
    """
    if ":" in name or "/" in name:
        raise UserError(
            f"backbone '{name}': expected a timm model name; a file or folder goes into its 'weights'"
        )
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models()) or " (timm.list_models() lists them)"
        raise UserError(f"backbone '{name}' is unknown to timm {timm.__version__}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # the part after the dot is not a set of weights of this model
        base, _, tag = name.partition(".")
        hint = nearest(tag, [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")])
        raise UserError(f"backbone '{name}': timm has no weights of {base} tagged '{tag}'{hint}") from None


def architecture_of(name: str) -> Literal["cnn", "vit", "hybrid"]:
    """Whether a timm model is a CNN, a vision transformer, or something between.

    Args:
        name: a timm model name, with or without a pretrained tag.

    Raises:
        UserError: timm does not know the name.
    """
    check_name(name)
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    if family in _VIT_FAMILIES:
        return "vit"
    return "hybrid" if family in _OTHER_FAMILIES else "cnn"


def default_architecture(name: str) -> Architecture:
    """``vit`` for vision transformers, ``cnn`` for CNNs and hybrids."""
    return "vit" if architecture_of(name) == "vit" else "cnn"


def check_architecture(name: str, arch: Architecture) -> None:
    """Refuse a ViT where a CNN belongs, and the reverse; hybrids may be either.

    Raises:
        UserError: the model is of the other kind.
    """
    found = architecture_of(name)
    if found not in (arch, "hybrid"):
        kinds = {"cnn": "a CNN", "vit": "a vision transformer"}
        raise UserError(f"backbone '{name}' is {kinds[found]}, but stands where {kinds[arch]} belongs")
