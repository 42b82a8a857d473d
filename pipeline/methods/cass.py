"""CASS and its relatives: a CNN and a ViT learn, from one batch, to give an image the same vector.

Singh et al. 2022, arXiv 2206.04170. As published (``cass``): both nets see the same augmented image, the
loss is 2 − 2·cos of their classifier logits, both get the gradient, and nothing but the difference of the
architectures stands against collapse. The options add what is known to prevent it, and what the neighbours
teach; ``cass_vc``, ``cass_nce`` and ``cass_plus`` are presets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.methods.base import Method, Progress, View, cosine_momentum, follow, slow_copy
from pipeline.methods.collective import gather
from pipeline.methods.dino import check_crop_size, default_local_size
from pipeline.methods.losses import agreement, cosine_distance
from pipeline.methods.patches import PatchAgreement
from pipeline.nets.auxiliary import AuxiliaryHead
from pipeline.nets.backbone import Net, evaluating
from pipeline.nets.heads import mlp

ARCHS = ("cnn", "vit")
AUXILIARY = {"cnn": "vit", "vit": "convnext"}  # the head that a net gets: of the other's architecture
GATHERED = ("variance_covariance", "infonce", "nt_xent")  # regularisers that compare images with each other
Slot = tuple[str, int]  # an architecture, or one with "_auxiliary", and the number of a view
Pair = tuple[Slot, Slot]


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
        self.local_size = options["local_size"] or default_local_size(image_size, nets["vit"].patch_size or 8)
        if options["n_local"]:
            for net in nets.values():
                check_crop_size(net, self.local_size, label="local crops")
        self.auxiliaries = nn.ModuleDict()
        for arch in ARCHS if options["auxiliary"] else ():
            with self.seeded(f"auxiliary {arch}"):
                self.auxiliaries[arch] = _auxiliary(AUXILIARY[arch], nets[arch], image_size)
                self.heads[f"{arch}_auxiliary"] = mlp(
                    nets[arch].map_channels,
                    options["projector_hidden"],
                    width,
                    layers=options["projector_layers"],
                )
        self.patches: PatchAgreement | None = None
        if options["patch_weight"]:
            with self.seeded("patches"):
                self.patches = PatchAgreement(nets["cnn"], nets["vit"], options)
        if options["teacher"]:
            self.teachers = slow_copy(self.nets)
            self.teacher_heads = slow_copy(self.heads)
            self.teacher_auxiliaries = slow_copy(self.auxiliaries)

    @property
    def views(self) -> list[View]:
        if self.options["views"] == 1:
            return [View("cass", self.image_size)]
        whole = [View("gentle", self.image_size)] * 2
        return whole + [View("gentle_local", self.local_size)] * self.options["n_local"]

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        vectors, maps = self._vectors(views)
        targets = self._targets(views) if self.options["teacher"] else vectors
        losses = {pair: self._pair_loss(pair, vectors, targets) for pair in self.pairs}
        loss = torch.stack(list(losses.values())).mean()
        logged = {}
        for kind in ("cross", *ARCHS):
            chosen = [v.detach() for pair, v in losses.items() if _kind(pair) == kind]
            if chosen and len(chosen) < len(losses):
                logged[f"loss_{kind}"] = torch.stack(chosen).mean()
        if self.patches is not None:
            learns = self.options["cross_gradient"]
            places = self.patches(
                *(maps[arch] if learns in ("both", arch) else maps[arch].detach() for arch in ARCHS)
            )
            loss = loss + self.options["patch_weight"] * places
            logged["loss_patches"] = places.detach()
        return {"loss": loss, **logged}

    def after_step(self, progress: Progress) -> None:
        if self.options["teacher"]:
            momentum = cosine_momentum(self.options["momentum"], progress)
            follow(self.teachers, self.nets, momentum)
            follow(self.teacher_heads, self.heads, momentum)
            follow(self.teacher_auxiliaries, self.auxiliaries, momentum)

    def exported(self) -> dict[str, Net]:
        if not self.options["teacher"]:
            return super().exported()
        return {arch: net for arch, net in self.teachers.items() if isinstance(net, Net)}

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        return {arch: self._vector(arch, images).float() for arch in ARCHS}

    def _parts(self, arch: str, slow: bool) -> tuple[Net, nn.ModuleDict, nn.ModuleDict]:
        """A net, all heads and all auxiliary heads: those that learn, or their slow copies."""
        if slow:
            net, heads, auxiliaries = self.teachers[arch], self.teacher_heads, self.teacher_auxiliaries
        else:
            net, heads, auxiliaries = self.nets[arch], self.heads, self.auxiliaries
        assert isinstance(net, Net)
        return net, heads, auxiliaries

    def _vector(self, arch: str, images: Tensor, *, slow: bool = False) -> Tensor:
        """What a net, or its slow copy, says of images of any size: (B, D)."""
        net, heads, _ = self._parts(arch, slow)
        if self.options["head"] == "logits":
            return net.logits(images)
        return heads[arch](net.features(images))

    def _whole(
        self, arch: str, images: Tensor, *, slow: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a net and its auxiliary head, or their slow copies, say of whole views.

        Returns:
            (B, D) float32 by name, and the net's last map (B, C, h, w) where it was read.
        """
        if not self.auxiliaries and (slow or self.patches is None):
            return {arch: self._vector(arch, images, slow=slow).float()}, None
        net, heads, auxiliaries = self._parts(arch, slow)
        features, last = net.features_and_map(images)
        outs = {arch: heads[arch](features)}
        if self.auxiliaries:
            _, pooled = auxiliaries[arch](last.flatten(2).transpose(1, 2), *last.shape[2:])
            outs[f"{arch}_auxiliary"] = heads[f"{arch}_auxiliary"](pooled)
        return {name: out.float() for name, out in outs.items()}, last

    def _vectors(self, views: list[Tensor]) -> tuple[dict[Slot, Tensor], dict[str, Tensor]]:
        """A (B, D) float32 tensor for every net and view that a pair needs; one forward pass a net and size.

        And, where patches are compared, each net's feature map of the whole views, (V · B, C, h, w).
        """
        needed = sorted({slot for pair in self.pairs for slot in pair})
        vectors: dict[Slot, Tensor] = {}
        maps: dict[str, Tensor] = {}
        for arch in ARCHS:
            numbers = [view for a, view in needed if a == arch]
            whole, local = [n for n in numbers if n < 2], [n for n in numbers if n >= 2]
            outs, last = self._whole(arch, torch.cat([views[n] for n in whole]))
            if last is not None:
                maps[arch] = last
            for name, out in outs.items():
                vectors |= {(name, n): part for n, part in zip(whole, out.chunk(len(whole)))}
            if local:
                out = self._vector(arch, torch.cat([views[n] for n in local])).float()
                vectors |= {(arch, n): part for n, part in zip(local, out.chunk(len(local)))}
        if self.options["regulariser"] in GATHERED:
            vectors = dict(zip(vectors, gather(*vectors.values())))
        return vectors, maps

    @torch.no_grad()
    def _targets(self, views: list[Tensor]) -> dict[Slot, Tensor]:
        """The teachers' vectors of the whole views."""
        targets: dict[Slot, Tensor] = {}
        whole = views[: self.options["views"]]
        for arch in ARCHS:
            outs, _ = self._whole(arch, torch.cat(whole), slow=True)
            for name, out in outs.items():
                targets |= {(name, n): part for n, part in enumerate(out.chunk(len(whole)))}
        if self.options["regulariser"] in GATHERED:
            targets = dict(zip(targets, gather(*targets.values())))
        return targets

    def _pair_loss(self, pair: Pair, vectors: dict[Slot, Tensor], targets: dict[Slot, Tensor]) -> Tensor:
        """The loss between two vectors; whichever side learns nothing from it is a constant."""
        a, b = pair
        learners = self._learners(pair)
        if self.options["teacher"]:
            # Local crops have no teacher's vector: they only learn from whole views.
            terms = [(one, other) for one, other in ((a, b), (b, a)) if one in learners and other in targets]
            return torch.stack(
                [self._compare(vectors[one], targets[other], pair) for one, other in terms]
            ).mean()
        one, other = (vectors[slot] if slot in learners else vectors[slot].detach() for slot in pair)
        return self._compare(one, other, pair)

    def _learners(self, pair: Pair) -> tuple[Slot, ...]:
        learns = self.options["cross_gradient"]
        if learns == "both" or _kind(pair) != "cross":
            return pair
        return tuple(slot for slot in pair if slot[0] == learns)

    def _compare(self, a: Tensor, b: Tensor, pair: Pair) -> Tensor:
        regulariser = self.options["regulariser"]
        if regulariser == "stop_gradient":
            (arch_a, _), (arch_b, _) = pair
            forth = cosine_distance(self.predictors[arch_a](a).float(), b.detach())
            back = cosine_distance(self.predictors[arch_b](b).float(), a.detach())
            return (forth + back) / 2
        return agreement("cosine" if regulariser == "none" else regulariser, a, b, self.options)


def _pairs(options: dict[str, Any]) -> list[Pair]:
    """Which vectors are compared; the loss is the mean over them."""
    if options["views"] == 1:
        return [(("cnn", 0), ("vit", 0))]
    across, alone = "cross" in options["pairs"], "self" in options["pairs"]
    pairs: list[Pair] = []
    if across:
        pairs.append((("cnn", 0), ("vit", 1)))
    if across and options["symmetric"]:
        pairs.append((("cnn", 1), ("vit", 0)))
    if alone:
        pairs += [((arch, 0), (arch, 1)) for arch in ARCHS]
    if options["auxiliary"]:
        pairs += [((arch, n), (f"{arch}_auxiliary", 1 - n)) for arch in ARCHS for n in (0, 1)]
    # A small crop has no teacher's vector: where only one net learns, its own small crops are what can.
    one_way = options["cross_gradient"] if options["teacher"] else "both"
    for local in range(2, 2 + options["n_local"]):
        whole = {arch: local % 2 for arch in ARCHS}
        if not alone and not options["symmetric"]:
            whole = {"cnn": 0, "vit": 1}  # each net sees but one
        if across and one_way in ("both", "cnn"):
            pairs.append((("cnn", local), ("vit", whole["vit"])))
        if across and one_way in ("both", "vit"):
            pairs.append((("vit", local), ("cnn", whole["cnn"])))
        if alone:
            pairs += [((arch, local), (arch, whole[arch])) for arch in ARCHS]
    if options["same_view"]:
        seen = {arch: {n for pair in pairs for name, n in pair if name == arch} for arch in ARCHS}
        both = sorted(seen["cnn"] & seen["vit"])
        pairs += [(("cnn", n), ("vit", n)) for n in both if n < 2 or not options["teacher"]]
    return pairs


def _kind(pair: Pair) -> str:
    """``cross``, or the architecture that is compared with itself."""
    a, b = (name.removesuffix("_auxiliary") for name, _ in pair)
    return a if a == b else "cross"


def _auxiliary(kind: str, net: Net, image_size: int) -> AuxiliaryHead:
    """A head on a net's last map."""
    with torch.no_grad(), evaluating(net):
        grid = net.feature_map(torch.zeros(1, 3, image_size, image_size)).shape[2:]
    return AuxiliaryHead(kind, net.map_channels, grid=(int(grid[0]), int(grid[1])))
