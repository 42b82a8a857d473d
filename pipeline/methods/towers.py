"""What HSSL puts on a base model and drops after pretraining: auxiliary heads, projectors, prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.methods.dino import make_head
from pipeline.nets.auxiliary import AuxiliaryHead
from pipeline.nets.backbone import Net, evaluating
from pipeline.nets.heads import DinoHead, dino_mlp
from pipeline.nets.last_block import LastBlock, last_block

BASE = "base"


class Towers(nn.Module):
    """Auxiliary heads on one base, and a projector for it and for each of them.

    With hosts ``dino`` and ``ibot`` a projector is a DINO head, and all share their prototypes; with the
    others it is the MLP alone.

    Args:
        net: the base.
        kinds: of the auxiliary heads.
        options: those of ``pipeline.methods.options.HsslOptions``.

    Raises:
        UserError: the net has no class token although the heads are to get it, or there are widths that one
            projector cannot serve.
    """

    def __init__(self, net: Net, kinds: list[str], options: dict[str, Any]) -> None:
        super().__init__()
        self.has_prototypes = options["host"] in ("dino", "ibot")
        self.class_token = not options["patch_tokens_only"]
        if self.class_token and getattr(net.net, "cls_token", None) is None:
            raise UserError(f"backbone '{net.name}' has no class token: patch_tokens_only must be true")
        with torch.no_grad(), evaluating(net):
            last = self.read(net, torch.zeros(1, 3, net.image_size, net.image_size))
        self.grid = (last.height, last.width)
        self.auxiliaries = nn.ModuleDict(
            {
                kind: AuxiliaryHead(
                    kind,
                    last.tokens.shape[2],
                    grid=self.grid,
                    depth=options["depth"],
                    width=options["head_width"],
                    first_shortcut=options["first_shortcut"],
                )
                for kind in kinds
            }
        )
        self.heads = nn.ModuleDict({BASE: self._projector(last.features.shape[1], options)})
        for kind, auxiliary in self.auxiliaries.items():
            assert isinstance(auxiliary, AuxiliaryHead)
            if options["separate_projectors"]:
                self.heads[kind] = self._projector(auxiliary.out_dim, options)
            elif auxiliary.out_dim == last.features.shape[1]:
                self.heads[kind] = self.heads[BASE]
            else:
                raise UserError(
                    f"separate_projectors false needs a head as wide as the {last.features.shape[1]} features"
                    f" of backbone '{net.name}', not {auxiliary.out_dim} wide: set head_width"
                )

    def read(self, net: Net, images: Tensor, **masked: Any) -> LastBlock:
        """What the heads need of a base; ``masked`` as ``last_block`` takes it."""
        return last_block(net, images, class_token=self.class_token, **masked)

    def base(self, last: LastBlock) -> Tensor:
        """The base's output: (B, D) float32."""
        return self.heads[BASE](last.features).float()

    def pooled(self, last: LastBlock) -> dict[str, Tensor]:
        """Each auxiliary head's own vector, before its projector: (B, width)."""
        tokens = last.tokens
        if last.class_token is not None:
            tokens = tokens + last.class_token[:, None]
        return {kind: head(tokens, last.height, last.width)[1] for kind, head in self.auxiliaries.items()}

    def project(self, pooled: dict[str, Tensor]) -> dict[str, Tensor]:
        """The auxiliary outputs: (B, D) float32 each."""
        return {kind: self.heads[kind](vectors).float() for kind, vectors in pooled.items()}

    def auxiliary(self, last: LastBlock) -> dict[str, Tensor]:
        """:meth:`project` of :meth:`pooled`."""
        return self.project(self.pooled(last))

    def embed(self, features: Tensor) -> Tensor:
        """What the base's scores are linear in; its output where there are no prototypes. (B, bottleneck)"""
        head = self.heads[BASE]
        return head.embed(features) if isinstance(head, DinoHead) else head(features).float()

    @property
    def image_head(self) -> DinoHead:
        """The base's, with the prototypes that all share."""
        head = self.heads[BASE]
        assert isinstance(head, DinoHead)
        return head

    def _projector(self, in_dim: int, options: dict[str, Any]) -> nn.Module:
        if not self.has_prototypes:
            return dino_mlp(
                in_dim,
                options["hidden"],
                options["bottleneck"],
                layers=options["head_layers"],
                bn=options["head_bn"],
            )
        head = make_head(in_dim, options, out_dim=options["out_dim"], bn=options["head_bn"])
        if hasattr(self, "heads"):
            head.last_layer = self.image_head.last_layer
        return head
