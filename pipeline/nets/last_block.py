"""A backbone's pooled vector and its last block's own tokens from one forward pass, with patches masked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.nets.architectures import PLAIN_VIT
from pipeline.nets.backbone import Net, evaluating


@dataclass(frozen=True)
class LastBlock:
    """What leaves a backbone's last block.

    Attributes:
        features: (B, F) as ``Net.features`` gives it.
        tokens: (B, N, C) patch tokens, or the feature map row by row, before the net's last normalisation.
        height, width: of their grid; N = height · width.
        normed: (B, N, C) the patch tokens after that normalisation; None of a feature map.
        class_token: (B, C), beside ``tokens``; None where it was not asked for.
    """

    features: Tensor
    tokens: Tensor
    height: int
    width: int
    normed: Tensor | None = None
    class_token: Tensor | None = None


def last_block(
    net: Net,
    images: Tensor,
    *,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    class_token: bool = False,
) -> LastBlock:
    """One forward pass.

    Args:
        net: the backbone.
        images: (B, 3, S, S) in [0, 1].
        masks: (B, N) bool: where patches are replaced before position embeddings are added; None: nowhere.
        mask_token: (E,) that stands there, as wide as a patch embedding.
        class_token: whether the class token is wanted too; the net has one.

    Raises:
        UserError: timm does not hand out this model's last block.
    """
    model = net.net
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"backbone '{net.name}': timm does not hand out its last block's tokens")
    wanted: dict[str, Any] = {"return_prefix_tokens": True} if class_token else {}
    with _masked(model, masks, mask_token):
        out, (last,) = net.timm_pass(
            "forward_intermediates", images, eager=masks is not None, indices=1, **wanted
        )
    last, prefix = last if class_token else (last, None)
    tokens = last.flatten(2).transpose(1, 2)
    return LastBlock(
        features=model.forward_head(out, pre_logits=True),
        tokens=tokens,
        height=last.shape[2],
        width=last.shape[3],
        normed=out[:, -tokens.shape[1] :] if out.ndim == 3 else None,  # prefix tokens come first
        class_token=None if prefix is None else prefix[:, 0],
    )


def check_maskable(net: Net) -> None:
    """Refuse a net whose patch embeddings do not keep their places and their width up to its last block.

    Raises:
        UserError: there is nothing that could be masked and found again.
    """
    embed = getattr(net.net, "patch_embed", None)
    blank = torch.zeros(1, 3, net.image_size, net.image_size)
    with torch.no_grad(), evaluating(net):
        patches = embed(net.normalise(blank)) if isinstance(embed, nn.Module) else None
        last = last_block(net, blank).normed
    found = isinstance(patches, Tensor) and last is not None and patches.flatten(1, -2).shape == last.shape
    if not found or last is None or last.shape[2] != net.num_features:
        raise UserError(
            f"backbone '{net.name}' has no patch embeddings that could be masked and found again in its last"
            f" block: expected {PLAIN_VIT}"
        )


@contextlib.contextmanager
def _masked(model: Any, masks: Tensor | None, token: Tensor | None) -> Iterator[None]:
    if masks is None or token is None:
        yield
        return

    def replace(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        there = masks.to(patches.device, non_blocking=True).view(*patches.shape[:-1], 1)
        return torch.where(there, token.to(patches.dtype), patches)

    handle = model.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
