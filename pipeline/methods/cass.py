"""CASS and its relatives: a CNN and a ViT learn, from one batch, to give an image the same vector.

Singh et al. 2022, arXiv 2206.04170. As published (``cass``): both nets see the same augmented image, the
loss is 2 − 2·cos of their classifier logits, both get the gradient, and nothing but the difference of the
architectures stands against collapse. The options add what is known to prevent it; ``cass_vc`` and
``cass_nce`` are presets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.methods.base import Method, Progress, View
from pipeline.methods.collective import gather
from pipeline.methods.losses import cosine_distance, info_nce, variance_covariance
from pipeline.nets.backbone import Net
from pipeline.nets.heads import mlp

ARCHS = ("cnn", "vit")
Slot = tuple[str, int]  # an architecture and the number of a view


class CrossArchitecture(Method):
    """See ``pipeline.methods.options.CrossArchitectureOptions`` for the choices."""

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        if set(nets) != set(ARCHS):
            raise UserError(
                f"cross-architecture methods need a cnn and a vit, got {', '.join(nets) or 'none'}"
            )
        super().__init__({arch: nets[arch] for arch in ARCHS}, options, image_size=image_size, seed=seed)
        self.pairs = _pairs(options)
        self.heads = nn.ModuleDict()
        self.predictors = nn.ModuleDict()
        if options["head"] == "logits":
            widths = {net.num_classes for net in nets.values()}
            if len(widths) > 1 or widths == {0}:
                raise UserError(
                    "head 'logits' compares classifier outputs: both backbones need the same number of "
                    f"classes, got {nets['cnn'].num_classes} (cnn) and {nets['vit'].num_classes} (vit)"
                )
            width = widths.pop()
        else:
            width = options["projector_dim"]
        for arch, net in nets.items():
            with self.seeded(f"heads {arch}"):
                if options["head"] == "projector":
                    self.heads[arch] = mlp(
                        net.headless().num_features,
                        options["projector_hidden"],
                        width,
                        layers=options["projector_layers"],
                    )
                if options["regulariser"] == "stop_gradient":
                    self.predictors[arch] = mlp(width, options["predictor_hidden"], width)

    @property
    def views(self) -> list[View]:
        if self.options["views"] == 1:
            return [View("cass", self.image_size)]
        return [View("simclr", self.image_size)] * 2

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        vectors = self._vectors(views)
        losses = {pair: self._pair_loss(vectors[pair[0]], vectors[pair[1]], pair) for pair in self.pairs}
        loss = torch.stack(list(losses.values())).mean()
        logged = {}
        for kind in ("cross", *ARCHS):
            chosen = [v.detach() for pair, v in losses.items() if _kind(pair) == kind]
            if chosen and len(chosen) < len(losses):
                logged[f"loss_{kind}"] = torch.stack(chosen).mean()
        return {"loss": loss, **logged}

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        return {arch: self._vector(arch, images).float() for arch in ARCHS}

    def _vector(self, arch: str, images: Tensor) -> Tensor:
        net = self.nets[arch]
        assert isinstance(net, Net)
        if self.options["head"] == "logits":
            return net.logits(images)
        return self.heads[arch](net.features(images))

    def _vectors(self, views: list[Tensor]) -> dict[Slot, Tensor]:
        """A (B, D) float32 tensor for every net and view that a pair needs; one forward pass a net."""
        needed = sorted({slot for pair in self.pairs for slot in pair})
        vectors: dict[Slot, Tensor] = {}
        for arch in ARCHS:
            numbers = [view for a, view in needed if a == arch]
            out = self._vector(arch, torch.cat([views[n] for n in numbers])).float()
            vectors |= {(arch, n): part for n, part in zip(numbers, out.chunk(len(numbers)))}
        if self.options["regulariser"] in ("variance_covariance", "infonce"):
            vectors = dict(zip(vectors, gather(*vectors.values())))
        return vectors

    def _pair_loss(self, a: Tensor, b: Tensor, pair: tuple[Slot, Slot]) -> Tensor:
        options = self.options
        match options["regulariser"]:
            case "none":
                return cosine_distance(a, b)
            case "infonce":
                return info_nce(a, b, temperature=options["temperature"])
            case "stop_gradient":
                (arch_a, _), (arch_b, _) = pair
                forth = cosine_distance(self.predictors[arch_a](a).float(), b.detach())
                back = cosine_distance(self.predictors[arch_b](b).float(), a.detach())
                return (forth + back) / 2
            case _:
                weights = {name: options[name] for name in ("invariance", "variance", "covariance")}
                return variance_covariance(a, b, **weights)


def _pairs(options: dict[str, Any]) -> list[tuple[Slot, Slot]]:
    """Which vectors are compared; the loss is the mean over them."""
    if options["views"] == 1:
        return [(("cnn", 0), ("vit", 0))]
    pairs: list[tuple[Slot, Slot]] = [(("cnn", 0), ("vit", 1))]
    if options["symmetric"]:
        pairs.append((("cnn", 1), ("vit", 0)))
    if options["pairs"] == "cross+self":
        pairs += [((arch, 0), (arch, 1)) for arch in ARCHS]
    return pairs


def _kind(pair: tuple[Slot, Slot]) -> str:
    """``cross``, or the architecture that is compared with itself."""
    (a, _), (b, _) = pair
    return a if a == b else "cross"
