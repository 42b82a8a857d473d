"""A timm model with what training needs around it: its own normalisation, features, tokens, logits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.nets.architectures import (
    architecture_of,
    check_architecture,
    check_name,
    default_architecture,
)
from pipeline.nets.seeding import seeded
from pipeline.nets.weights import (
    cached_overlay,
    file_normalisation,
    imagenet_refusal,
    load_file,
    quiet_hub,
)
from pipeline.specs import Architecture, Backbone

HALF = (0.5, 0.5, 0.5)  # mean and std for random weights: pixels in [-1, 1]


class UnknownArg(UserError):
    """A timm model does not take an argument; ``arg`` is its name, where timm says it."""

    def __init__(self, message: str, arg: str | None = None) -> None:
        super().__init__(message)
        self.arg = arg


class Net(nn.Module):
    """A timm model that takes images in [0, 1] and normalises them with its own mean and std.

    Attributes:
        net: the timm model.
        arch: ``cnn`` or ``vit``.
        name: its timm name, with the pretrained tag if one was asked for.
        args: the arguments that timm built it with.
        image_size: the side in pixels that it was built for.
        num_features: length of ``features``.
        mean, std: of its input, one value a channel.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        arch: Architecture,
        name: str,
        args: dict[str, Any],
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.net: Any = net  # timm's models share an interface but no class
        self.arch: Architecture = arch
        self.name, self.args, self.image_size = name, dict(args), image_size
        self.num_features: int = getattr(net, "head_hidden_size", None) or net.num_features  # type: ignore[assignment]
        self.mean, self.std = tuple(mean), tuple(std)
        self._fast: Callable[..., Any] | None = None
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, -1, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        """Outputs of timm's classifier; 0 without one."""
        return self.net.num_classes

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels, or None where the model has no patch embedding."""
        size = getattr(getattr(self.net, "patch_embed", None), "patch_size", None)
        return None if size is None else int(size[0] if isinstance(size, (tuple, list)) else size)

    def normalise(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) float in [0, 1] → the same shape, with the model's mean and std."""
        return (images - self._mean) / self._std

    def features(self, images: Tensor) -> Tensor:
        """The pooled vector before the classifier: (B, 3, H, W) in [0, 1] → (B, num_features)."""
        return self.net.forward_head(self.timm_pass("forward_features", images), pre_logits=True)

    def features_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`features` and the last feature map (or patch grid) of one forward pass.

        images: (B, 3, H, W) in [0, 1] → (B, num_features) and (B, map_channels, h, w)
        """
        out = self.timm_pass("forward_features", images)
        return self.net.forward_head(out, pre_logits=True), self._as_map(out, images)

    def feature_map(self, images: Tensor) -> Tensor:
        """The last feature map, a transformer's with its tokens in their places.

        images: (B, 3, H, W) in [0, 1] → (B, map_channels, h, w)
        """
        return self._as_map(self.timm_pass("forward_features", images), images)

    @property
    def map_channels(self) -> int:
        """Channels of the last feature map or patch grid."""
        return self.net.num_features

    def logits(self, images: Tensor) -> Tensor:
        """Through timm's own classifier: (B, 3, H, W) in [0, 1] → (B, num_classes)."""
        return self.timm_pass("forward", images)

    forward = logits

    def _as_tokens(self, out: Tensor) -> Tensor:
        """(B, N, C): the patch grid or feature map row by row, without class or register tokens."""
        if out.ndim == 3:
            return out[:, getattr(self.net, "num_prefix_tokens", 0) :]
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            return out.flatten(1, 2)
        return out.flatten(2).transpose(1, 2)

    def raw_tokens(self, images: Tensor) -> Tensor:
        """The patch tokens of a ViT as its last block leaves them, before timm's final norm.

        images: (B, 3, H, W) in [0, 1] → (B, N, C), row by row, without class or register tokens
        """
        (tokens,) = self.timm_pass(
            "forward_intermediates", images, indices=1, output_fmt="NLC", intermediates_only=True
        )
        return tokens

    def final_norm(self) -> nn.Sequential:
        """A ViT's last norm, for :meth:`raw_tokens`: timm has it before pooling (norm) or after (fc_norm)."""
        return nn.Sequential(self.net.norm, self.net.fc_norm)

    def _as_map(self, out: Tensor, images: Tensor) -> Tensor:
        """(B, C, h, w) of what timm's ``forward_features`` gives; a grid of tokens has the images' shape."""
        if out.ndim == 4 and getattr(self.net, "output_fmt", "NCHW") != "NHWC":
            return out
        tokens = self._as_tokens(out)
        height, width = images.shape[-2:]
        rows = max(1, round(math.sqrt(tokens.shape[1] * height / width)))
        return tokens.transpose(1, 2).unflatten(2, (rows, -1))

    def compile_passes(self, *, graphs: bool = False) -> None:
        """From now on run timm's forward passes through ``torch.compile`` while in train mode.

        Each size of image and batch is compiled for itself, when it first comes.

        Args:
            graphs: replay CUDA graphs; whoever takes a step marks where it begins
                (``torch.compiler.cudagraph_mark_step_begin``).
        """
        mode = "reduce-overhead" if graphs else None
        self._fast = torch.compile(self._run, dynamic=False, mode=mode)

    def timm_pass(self, name: str, images: Tensor, *, eager: bool = False, **wanted: Any) -> Any:
        """One of timm's forward passes, compiled where that was asked for.

        Args:
            name: of timm's method.
            images: (B, 3, H, W) in [0, 1].
            eager: not compiled in any case: hooks differ from call to call.
            wanted: for timm.
        """
        run = self._fast if self._fast is not None and self.training and not eager else self._run
        return run(name, images, **wanted)

    def _run(self, name: str, images: Tensor, **wanted: Any) -> Any:
        return getattr(self.net, name)(self.normalise(images), **wanted)

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: what was compiled is compiled for this net."""
        return self.__dict__ | {"_fast": None}

    def recompute(self) -> None:
        """From now on keep no activations for the backward pass, which computes them again.

        Raises:
            UserError: timm's model cannot.
        """
        try:
            self.net.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(
                f"backbone '{self.name}' cannot compute its activations again: leave recompute false"
            ) from None

    def set_linear_classifier(self, weight: Tensor, bias: Tensor) -> bool:
        """Give timm's classifier these weights, (K, num_features) and (K,).

        Returns:
            Whether it is such a layer: a few models have two, or none that is linear.
        """
        layer = self.net.get_classifier()
        if not isinstance(layer, nn.Linear) or layer.bias is None or layer.weight.shape != weight.shape:
            return False
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return True

    def headless(self) -> Net:
        """Drop the classifier in place, so that no parameter goes without a gradient; returns itself."""
        pool = {"global_pool": self.args["global_pool"]} if "global_pool" in self.args else {}
        self.net.reset_classifier(0, **pool)
        return self


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within this a module is in eval mode; afterwards each of its parts is in the mode that it was in."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, was in training.items():
            part.training = was


def create_backbone(
    spec: Backbone,
    image_size: int,
    *,
    seed: int,
    arch: Architecture | None = None,
) -> Net:
    """Build a timm model for an image size and give it its initial weights.

    Args:
        spec: timm name, arguments for timm and where the weights come from: ``random``, ``imagenet`` (timm's
            own, from its cache or the network), a ``.safetensors`` or ``.pth`` file, or a folder written by
            ``pipeline.nets.export``.
        image_size: side of the (square) images in pixels. Transformers are built for it and interpolate
            their position embeddings for other sizes where timm lets them.
        seed: of the initial weights; the global random state is left alone.
        arch: what the model has to be; None: whatever it is (a hybrid counts as a CNN).

    Raises:
        UserError: unknown timm name, pretrained tag or argument; a CNN where a ViT belongs; weights that do
            not exist, cannot be reached or do not fit; an image size that the model cannot take.
    """
    check_name(spec.name)
    if arch is None:
        arch = default_architecture(spec.name)
    check_architecture(spec.name, arch)
    with seeded(seed, f"backbone {arch}"):
        net, args = build_timm(
            spec.name, spec.args, image_size=image_size, pretrained=spec.weights == "imagenet"
        )
    check_image_size(net, spec.name, image_size)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    if spec.weights != "random":
        mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    if spec.weights not in ("random", "imagenet"):
        load_file(net, spec.weights, name=spec.name, args=args)
        mean, std = file_normalisation(spec.weights) or (mean, std)
    return Net(net, arch=arch, name=spec.name, args=args, image_size=image_size, mean=mean, std=std)


def build_timm(
    name: str, args: dict[str, Any], *, image_size: int, pretrained: bool
) -> tuple[Any, dict[str, Any]]:
    """``timm.create_model`` with the image size given in whichever way the model takes it.

    Models with position embeddings or windows take ``img_size``, most also ``dynamic_img_size`` (any size in
    the forward pass); CNNs take neither. timm says no to an argument before it builds anything.

    Returns:
        The model, and the arguments that built it.

    Raises:
        UserError: an argument that the model does not take, or pretrained weights that cannot be had.
    """
    base = name.partition(".")[0]
    sized = architecture_of(name) == "vit" or _is_fixed_size(base)
    ways: list[dict[str, Any]] = [{}]
    overlay = cached_overlay(name) if pretrained else None
    if sized:
        size = {"img_size": image_size}
        ways = [size | {"dynamic_img_size": True}, size, {}]
    for way in ways:
        try:
            full = way | args
            with quiet_hub():
                net = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **full)
            _require_classifier(net, name, args)
            return net, full
        except TypeError as error:
            refused = next((key for key in full if f"'{key}'" in str(error)), None)
            if refused is None or refused in args:
                raise UnknownArg(f"backbone '{name}' does not take these args: {error}", refused) from None
        except Exception as error:
            raise imagenet_refusal(name, args, error, pretrained=pretrained) from error
    raise AssertionError("the last way passes no size")


def _require_classifier(net: Any, name: str, args: dict[str, Any]) -> None:
    """Refuse what timm builds in place of a net with features and a classifier.

    Raises:
        UserError: names the args, such as ``features_only``.
    """
    wanted = ("forward_features", "forward_head", "reset_classifier", "num_features")
    missing = [part for part in wanted if not hasattr(net, part)]
    if missing:
        raise UserError(
            f"backbone '{name}': with args {args} timm builds a {type(net).__name__}, which has no"
            f" {missing[0]}; pretraining and fine-tuning need a whole net"
        )


def _is_fixed_size(base: str) -> bool:
    cfg = timm.get_pretrained_cfg(base)
    return bool(cfg and cfg.fixed_input_size)


def check_image_size(net: Any, name: str, image_size: int) -> None:
    """Refuse a size that cannot be cut into patches.

    Raises:
        UserError: names the nearest sizes that work.
    """
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, (tuple, list)) else patch
    if side and (image_size % side or image_size < side):
        low, high = max(side, image_size // side * side), (image_size // side + 1) * side
        raise UserError(
            f"backbone '{name}': image size {image_size} is not a multiple of its patch size {side}; "
            f"{low} or {high} would be"
        )
