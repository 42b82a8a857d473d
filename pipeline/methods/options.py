"""The options of every method, with defaults and ranges. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.typed import Typed

Width = Annotated[int, Field(ge=1)]


class Options(Typed):
    """Options of one method: unknown names are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, defer_build=True
    )


class NoOptions(Options):
    """A method with nothing to choose."""


class CrossArchitectureOptions(Options):
    """A CNN and a ViT that learn to agree; see ``pipeline.methods.cass``."""

    views: Literal[1, 2] = 1  # augmented views of an image
    head: Literal["logits", "projector"] = "logits"  # what is compared: timm's classifier or an MLP
    pairs: Literal["cross", "cross+self", "self"] = "cross"  # self: each net agrees with itself
    symmetric: bool = True  # two views: CNN(1)-ViT(2) and CNN(2)-ViT(1), not only the first
    same_view: bool = False  # two views: the nets also compare what they say of each view that both see
    cross_gradient: Literal["both", "cnn", "vit"] = "both"  # which net learns from the other
    n_local: int = Field(0, ge=0, le=32)  # two views: small crops beside them, each compared with one of them
    local_size: int | None = Field(None, ge=8)  # pixels; None: 3/7 of the image (96 of 224)
    auxiliary: bool = False  # each net also agrees with a head of the other's architecture on its last map
    teacher: bool = False  # vectors are compared with those of slow averages of the nets
    momentum: float = Field(0.99, ge=0, le=1)  # of the teachers at the start; 1 at the end
    patch_weight: float = Field(
        0, ge=0
    )  # of the agreement of the CNN's feature map with the ViT's patch grid
    regulariser: Literal["none", "variance_covariance", "infonce", "nt_xent", "stop_gradient"] = "none"
    projector_layers: int = Field(3, ge=1, le=5)
    projector_hidden: int = Field(2048, ge=8)
    projector_dim: int = Field(512, ge=8)
    predictor_hidden: int = Field(512, ge=8)  # stop_gradient only
    temperature: float = Field(0.2, gt=0)  # infonce and nt_xent
    invariance: float = Field(25, ge=0)  # the three coefficients of variance_covariance
    variance: float = Field(25, ge=0)
    covariance: float = Field(1, ge=0)

    @model_validator(mode="after")
    def _goes_together(self) -> CrossArchitectureOptions:
        if self.pairs != "cross" and self.views == 1:
            raise ValueError(f"pairs '{self.pairs}' needs views 2: a net agrees with itself across two views")
        if self.auxiliary and (self.views == 1 or self.head == "logits"):
            raise ValueError(
                "auxiliary needs views 2 and head projector: logits have no place for a third net"
            )
        if self.same_view and (self.views == 1 or self.pairs == "self"):
            raise ValueError("same_view needs views 2 and pairs cross or cross+self")
        small = self.n_local and not self.teacher  # teachers see no small crops
        if self.same_view and self.pairs == "cross" and not (self.symmetric or small):
            raise ValueError("same_view needs symmetric or small crops: there is no view that both nets see")
        if self.n_local and self.views == 1:
            raise ValueError("n_local needs views 2: small crops are compared with two whole views")
        if self.teacher and self.regulariser in ("variance_covariance", "stop_gradient"):
            raise ValueError(f"teacher goes with infonce, nt_xent or none, not with {self.regulariser}")
        if self.auxiliary and self.regulariser == "stop_gradient":
            raise ValueError("auxiliary does not go with stop_gradient: its heads have no predictors")
        if self.patch_weight and self.pairs == "self":
            raise ValueError(
                "patch_weight compares the nets with each other: it needs pairs cross or cross+self"
            )
        if self.patch_weight and self.head == "logits":
            raise ValueError("patch_weight needs head projector: logits have no places")
        if self.patch_weight and self.views == 2 and self.pairs == "cross" and not self.symmetric:
            raise ValueError(
                "patch_weight compares places of the same views: it needs symmetric, or pairs cross+self"
            )
        if self.cross_gradient != "both" and self.pairs == "self":
            raise ValueError(
                f"cross_gradient '{self.cross_gradient}' needs pairs cross or cross+self: with pairs 'self'"
                " there is nothing to learn from the other"
            )
        if self.cross_gradient != "both" and self.pairs == "cross" and not self.auxiliary:
            other = {"cnn": "vit", "vit": "cnn"}[self.cross_gradient]
            raise ValueError(
                f"cross_gradient '{self.cross_gradient}' needs pairs cross+self, or auxiliary: the {other}"
                " would learn from nothing"
            )
        return self


class DinoOptions(Options):
    """Self-distillation with multi-crop; see ``pipeline.methods.dino``."""

    crops: Literal["dino", "wide"] = "dino"  # global ones: of 40 % of the area or more; wide: of 14 % or more
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


class SelfpatchOptions(DinoOptions):
    """DINO with a loss on every patch; see ``pipeline.methods.selfpatch``."""

    aggregation_depth: int = Field(2, ge=1, le=12)  # class-attention blocks that make patches one vector
    neighbours: Literal["clip", "wrap"] = "clip"  # wrap: round the image's edge, as released
    top_k: int = Field(4, ge=1, le=8)  # neighbours that make a patch's target: the most similar ones
    patch_weight: float = Field(0.1, ge=0)  # of the patch loss
    patch_crops: Literal["all", "global"] = "all"  # that carry the patch loss
    patch_mean: Literal["patches", "crops"] = "patches"  # what weighs the same in it; crops: as released
    patch_out_dim: int = Field(4096, ge=2)  # prototypes of the patch head
    patch_student_temperature: float = Field(0.1, gt=0)
    patch_teacher_temperature: float = Field(0.04, gt=0)
    patch_chunk: int = Field(16384, ge=1)  # patches whose scores are in memory at one time


class IbotOptions(DinoOptions):
    """DINO on masked crops, and prediction of the masked patches; see ``pipeline.methods.ibot``."""

    n_local: int = Field(10, ge=0, le=32)
    out_dim: int = Field(8192, ge=2)
    mask_probability: float = Field(0.5, gt=0, le=1)  # share of the global crops that are masked
    mask_share_min: float = Field(0.1, gt=0, lt=1)  # of the patches of a masked crop
    mask_share_max: float = Field(0.5, gt=0, lt=1)
    patch_weight: float = Field(1, ge=0)  # of the loss on masked patches
    shared_head: bool = True  # one head for images and patches
    patch_out_dim: int = Field(8192, ge=2)  # prototypes of the patches' own head

    @model_validator(mode="after")
    def _shares_in_order(self) -> IbotOptions:
        if self.mask_share_min > self.mask_share_max:
            raise ValueError("mask_share_min is more than mask_share_max")
        return self


HsslHead = Literal["convnext", "resnet", "resnet_basic", "swin", "vit", "mixer", "pool"]


class HsslOptions(IbotOptions):
    """An auxiliary head of another architecture; see ``pipeline.methods.hssl``."""

    host: Literal["dino", "ibot", "simclr", "cass"] = "dino"  # whose loss it is; ibot only with a ViT
    # homogeneous: of the base's own kind, as a control; search: what the search finds
    head: Literal[HsslHead, "homogeneous", "search"] = "convnext"
    depth: int = Field(3, ge=1, le=24)  # blocks of the head
    head_width: int | None = Field(None, ge=8, multiple_of=4)  # channels of the head; None: the base's
    first_shortcut: bool = False  # whether the head's first block has its shortcuts
    separate_projectors: bool = True  # one for the base and one for the head
    patch_tokens_only: bool = True  # false: a ViT's class token is added to the tokens that the head sees
    crops: Literal["dino", "wide"] = "wide"
    n_local: int = Field(0, ge=0, le=32)
    teacher_warmup_epochs: float = Field(50, ge=0)
    temperature: float = Field(0.2, gt=0)  # infonce: host simclr, and cass with it
    agreement: Literal["cosine", "infonce", "variance_covariance"] = "variance_covariance"  # host cass
    invariance: float = Field(25, ge=0)  # the three coefficients of variance_covariance
    variance: float = Field(25, ge=0)
    covariance: float = Field(1, ge=0)
    candidates: list[HsslHead] = Field(  # of the search
        ["convnext", "resnet", "swin", "vit", "mixer", "pool"], min_length=2
    )
    search_epochs: float = Field(10, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> HsslOptions:
        if self.n_local and self.host in ("simclr", "cass"):
            raise ValueError(f"n_local needs host dino or ibot: {self.host} compares two whole views")
        if len(set(self.candidates)) < len(self.candidates):
            raise ValueError("a candidate stands there twice")
        return self


class SimclrOptions(Options):
    """Contrastive learning within the batch; see ``pipeline.methods.simclr``."""

    temperature: float = Field(0.5, gt=0)  # 0.5 suits small sets and batches, 0.1-0.2 large ones
    hidden: int = Field(2048, ge=8)
    out_dim: int = Field(128, ge=2)
    head_bn: bool = True  # batch normalisation inside the projector
    pretext: Literal["none", "rotation", "jigsaw"] = "none"  # a task beside the contrast
    pretext_weight: float = Field(0.3, ge=0)  # of its loss
    pretext_start_epochs: float = Field(40, ge=0)  # its weight is 0 for so many epochs …
    pretext_start_share: float = Field(0.4, ge=0, le=1)  # … or for this share of the training, if it is less
    pretext_hidden: list[Width] | None = Field(None, min_length=2, max_length=2)  # None: as published
    pretext_dropout: float = Field(0.5, ge=0, lt=1)
    jigsaw_permutations: int = Field(35, ge=2, le=1000)  # orders of the tiles to tell apart


class ByolOptions(Options):
    """Prediction of a slow teacher's projection; see ``pipeline.methods.byol``."""

    hidden: int = Field(4096, ge=8)
    out_dim: int = Field(256, ge=2)
    momentum: float = Field(0.996, ge=0, le=1)  # of the teacher at the start; 1 at the end
