"""Whether nets and methods can be built as an experiment has them, tried out on torch's meta device.

There tensors have shapes and no values, so that a ViT-B with all its heads takes a second and no memory. What
depends on values cannot be tried so: timm's own weights, and what a training does.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.errors import UserError, one_line
from pipeline.methods.load import load_method, load_search
from pipeline.methods.registry import searched_option
from pipeline.nets.backbone import Net, create_backbone, evaluating
from pipeline.nets.weights import shown
from pipeline.specs import Backbone, FinetuneSpec, PretrainSpec
from pipeline.stages.training import make_nets


def check_buildable(trained: Iterable[PretrainSpec], tuned: Iterable[FinetuneSpec]) -> None:
    """Build every method with its nets, and every net for the images that it is fine-tuned on, once.

    What the meta device cannot do is passed over with a line on stderr.

    Raises:
        UserError: what the task itself would end with: args that a timm model does not take, images or crops
            that cannot be cut into its patches, a file of weights that does not fit, a method's options that
            are not for such a net.
    """
    done: set[str] = set()
    for spec in trained:
        size = spec.train.image_size
        if _is_new(done, spec.method, spec.options, *_shapes(spec.backbones.values()), size):
            with _building(spec.label):
                _method(spec)
        for arch, backbone in spec.backbones.items():
            path = backbone.weights not in ("random", "imagenet")
            if path and _is_new(done, backbone.model_dump(), arch, size):
                with _building(spec.label):
                    create_backbone(backbone, size, seed=0, arch=arch)
    for tuned_spec in tuned:
        size_ = tuned_spec.settings.image_size  # None: that of the pretraining
        if size_ and _is_new(done, *_shapes([tuned_spec.backbone]), tuned_spec.arch, size_):
            with _building(tuned_spec.label, key="finetune.image_size"):
                plain = _plain(tuned_spec.backbone)
                _see(create_backbone(plain, size_, seed=0, arch=tuned_spec.arch), plain)


def _is_new(done: set[str], *what: Any) -> bool:
    key = json.dumps(what, sort_keys=True)
    new = key not in done
    done.add(key)
    return new


def _plain(backbone: Backbone) -> Backbone:
    """With random weights, which on the meta device are none."""
    return backbone.model_copy(update={"weights": "random"})


def _shapes(backbones: Iterable[Backbone]) -> Iterator[Any]:
    return (_plain(backbone).model_dump() for backbone in backbones)


def _method(spec: PretrainSpec) -> None:
    """A method, or the search before it, whose nets see images of the training's size."""
    plain = {arch: _plain(backbone) for arch, backbone in spec.backbones.items()}
    nets = make_nets(spec.model_copy(update={"backbones": plain}))
    for net, backbone in zip(nets.values(), plain.values()):
        if spec.train.recompute:
            net.recompute()
        _see(net, backbone)
    load = load_search if searched_option(spec.options) else load_method
    load(spec.method)(nets, spec.options, image_size=spec.train.image_size, seed=spec.seed)


def _see(net: Net, backbone: Backbone) -> None:
    """A forward pass of images of the size that a net is built for; what fails is done again on the CPU."""
    if _refusal(net) is None:
        return
    with torch.device("cpu"):
        refusal = _refusal(create_backbone(backbone, net.image_size, seed=0, arch=net.arch))
    if refusal is not None:
        raise refusal
    raise NotImplementedError(f"backbone '{net.name}' does not run on the meta device")


@torch.no_grad()
def _refusal(net: Net) -> UserError | None:
    size = net.image_size
    try:
        with evaluating(net):
            features = net.features(torch.zeros(2, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        said = one_line(error)[:120]
        return UserError(f"backbone '{net.name}' cannot take images of {size} pixels ({said})")
    if features.shape != (2, net.num_features):
        return UserError(
            f"backbone '{net.name}' gives features of the shape {tuple(features.shape[1:])} where a vector of"
            f" {net.num_features} is expected: its args {shown(net.args)} leave out pooling"
        )
    return None


@contextmanager
def _building(label: str, *, key: str = "") -> Iterator[None]:
    """Within it tensors have no values; an error says of which method it is.

    Args:
        label: the method's.
        key: the setting that is tried out, where it is not the method's own.
    """
    where = f"{key} with method {label}" if key else f"method {label}"
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*to a meta parameter.*is a no-op")
            yield
    except Exception as error:
        if not isinstance(error, UserError) or _is_meta(error):
            said = one_line(error)[:150]
            print(f"{where} could not be tried out before the launch: {said}", file=sys.stderr)
            return
        raise UserError(f"{where}: {error}") from error


def _is_meta(error: BaseException | None) -> bool:
    """Whether it is the meta device that something cannot be done on."""
    while error is not None:
        if re.search(r"\bmeta\b", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False
