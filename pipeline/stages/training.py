"""What the stages that train have in common: nets, images and the loop, as a specification says."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Literal

import numpy as np

from pipeline.data.feed import Feed, IndexedFeed, StreamedFeed
from pipeline.data.images import ImageSet
from pipeline.data.sampler import EpochSampler
from pipeline.data.squares import Fill, border
from pipeline.errors import UserError
from pipeline.methods.base import Method
from pipeline.methods.registry import method_info
from pipeline.nets.architectures import PLAIN_VIT
from pipeline.nets.backbone import Net, UnknownArg, create_backbone
from pipeline.nets.weights import shown
from pipeline.specs import PretrainSpec
from pipeline.stages.work import Interrupted, Work
from pipeline.train.distributed import World
from pipeline.train.loop import Loop, Probe, Stopped, Trained
from shards import Index


def make_nets(spec: PretrainSpec) -> dict[str, Net]:
    """The backbones with their initial weights, by architecture.

    Raises:
        UserError: what :func:`create_backbone` refuses; where it is timm arguments of the method's own, which
            the experiment may not name, in the method's name.
    """
    nets: dict[str, Net] = {}
    for arch, backbone in spec.backbones.items():
        own = method_info(spec.method).args.get(arch, {})
        try:
            nets[arch] = create_backbone(backbone, spec.train.image_size, seed=spec.seed, arch=arch)
        except UnknownArg as error:
            if error.arg not in own:
                raise
            raise UserError(
                f"backbone '{backbone.name}' does not take the args {shown(own)} that {spec.method} gives its"
                f" nets: expected {PLAIN_VIT}"
            ) from None
    return nets


def train_images(index: Index, spec: PretrainSpec, world: World, nets: Mapping[str, Net]) -> ImageSet:
    """All images of the train split. Borders that ``fit: pad`` adds have the first net's mean colour.

    Raises:
        UserError: there are none.
    """
    rows = index.rows("train")
    if not len(rows):
        raise UserError(f"dataset {spec.dataset} has no train images to pretrain on")
    return read_images(index, rows, spec, world, fill=border(next(iter(nets.values())).mean))


def read_images(index: Index, rows: np.ndarray, spec: PretrainSpec, world: World, *, fill: Fill) -> ImageSet:
    """The rows as the training reads them; streamed sets are not kept, only probed."""
    return ImageSet(
        index,
        rows,
        image_size=spec.train.image_size,
        fit=spec.train.fit,
        fill=fill,
        cache="none" if spec.train.reading == "streamed" else spec.train.cache,
        device=world.device,
        workers=spec.train.workers,
        ranks_on_node=world.local_world_size,
    )


def batch_warnings(images: ImageSet, spec: PretrainSpec) -> list[str]:
    """What a user should know of a batch that is larger than the set: ``warnings`` of the receipt."""
    if spec.train.batch_size <= len(images):
        return []
    return [
        f"batch_size {spec.train.batch_size} is more than the {len(images)} train images: a batch holds some"
        " more than once, which contrastive losses take for different ones"
    ]


def train(
    method: Method,
    images: ImageSet,
    *,
    work: Work,
    spec: PretrainSpec,
    world: World,
    steps: Literal["train", "forward"] = "train",
    probe: Probe | None = None,
) -> Trained:
    """Run the loop from the task's newest checkpoint, or from the start.

    Raises:
        Interrupted: asked to stop; the checkpoint is written.
        UserError: a batch that cannot be shared by the ranks; a loss that is not finite.
    """
    if world.is_first:
        for line in batch_warnings(images, spec):
            _say(f"warning: {line}")
    loop = Loop(
        method,
        _feed(images, spec, world),
        training=spec.train,
        world=world,
        folder=work.folder,
        seed=spec.seed,
        data=images.index.fingerprint,
        steps=steps,
        probe=probe,
        progress=work.progress,
        stop_requested=work.stop_requested,
        profile=work.resources.profile_steps,
        say=_say,
    )
    try:
        return loop.run()
    except Stopped as stopped:
        raise Interrupted(f"{work.task.id}: {stopped}") from None


def _feed(images: ImageSet, spec: PretrainSpec, world: World) -> Feed:
    train = spec.train
    if train.reading == "streamed":
        return StreamedFeed(
            images,
            "train",
            batch_size=train.batch_size,
            rank=world.rank,
            world_size=world.world_size,
            accumulate=train.accumulate,
            seed=spec.seed,
        )
    sampler = EpochSampler(
        len(images),
        batch_size=train.batch_size,
        rank=world.rank,
        world_size=world.world_size,
        accumulate=train.accumulate,
        seed=spec.seed,
    )
    return IndexedFeed(images, sampler)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
