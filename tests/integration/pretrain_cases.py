"""Small real trainings for the tests beside this file: images, methods, one or more ranks."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image

from pipeline.data.feed import Batch, IndexedFeed
from pipeline.data.images import ImageSet
from pipeline.data.sampler import EpochSampler
from pipeline.methods.load import load_method
from pipeline.methods.registry import METHODS, resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.ranks import Ranks
from pipeline.specs import Backbone, Resources, Training
from pipeline.train.distributed import World, join
from pipeline.train.loop import Loop, Trained
from shards import FolderSource, Index, ShardOptions, write

SIZE = 16
BACKBONES = {
    "cnn": Backbone(name="resnet10t", args={"channels": [16, 16, 32, 32]}),
    "vit": Backbone(
        name="vit_tiny_patch16_224",
        args={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2},
    ),
}
OPTIONS = {
    "cass": {},
    "cass_vc": {"projector_hidden": 32, "projector_dim": 16},
    "cass_plus": {  # with all that it can be asked for
        "projector_hidden": 32,
        "projector_dim": 16,
        "pairs": "cross+self",
        "local_size": 8,
        "teacher": True,
        "auxiliary": True,
        "patch_weight": 0.5,
    },
    "byol": {"hidden": 32, "out_dim": 16},
    "dino": {"n_local": 2, "local_size": 8, "out_dim": 64, "hidden": 32, "bottleneck": 16},
    "selfpatch": {
        "n_local": 2,
        "local_size": 8,
        "out_dim": 64,
        "hidden": 32,
        "bottleneck": 16,
        "patch_out_dim": 32,
        "patch_chunk": 50,
    },
    "ibot": {"n_local": 1, "local_size": 8, "out_dim": 64, "hidden": 32, "bottleneck": 16},
    "hssl": {"head": "swin", "n_local": 1, "local_size": 8, "out_dim": 64, "hidden": 32, "bottleneck": 16},
    "simclr": {"hidden": 32, "out_dim": 16},
    "scatsimclr": {"hidden": 32, "out_dim": 16, "pretext_hidden": [16, 8]},
    "bn_refresh": {},
    "supervised": {},
}


OWN_BACKBONES = {"scatsimclr": {"cnn": Backbone(name="test_scatnet")}}


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


class Feed(IndexedFeed):
    """Dies before a step, and can spoil one rank's images."""

    kill_at: int | None = None

    def steps(self, first: int, stop: int) -> Iterator[list[Batch]]:
        for step, batches in enumerate(super().steps(first, stop), start=first):
            if step == self.kill_at:
                raise Killed(f"at step {step}")
            yield batches


def write_shards(folder: Path, *, count: int = 30, shard_samples: int = 8) -> Path:
    """Two classes of noisy 16-pixel images, in train, val and test."""
    rng = np.random.default_rng(0)
    for number in range(count):
        label = ("dark", "bright")[number % 2]
        pixels = rng.integers(0, 128, (SIZE, SIZE, 3)) + 100 * (number % 2)
        path = folder / "images" / label / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    options = ShardOptions(shard_samples=shard_samples, processes=1)
    write(FolderSource(folder / "images"), folder / "shards", options)
    return folder / "shards"


def settings(**changed) -> Training:
    base = {
        "epochs": 4,
        "batch_size": 8,
        "image_size": SIZE,
        "lr": 1e-3,
        "warmup_epochs": 1,
        "clip_grad": 3.0,
        "checkpoint_steps": 3,
        "probe_epochs": None,
    }
    return Training(**(base | changed))


def make_loop(
    method: str,
    shards: Path,
    folder: Path,
    *,
    training: Training,
    world: World | None = None,
    archs=("cnn", "vit"),
    cache="ram",
) -> Loop:
    world = world or World()
    index = Index.open(shards)
    rows = index.rows("train")
    images = ImageSet(index, rows, image_size=SIZE, cache=cache, device=world.device)
    sampler = EpochSampler(
        len(images),
        batch_size=training.batch_size,
        rank=world.rank,
        world_size=world.world_size,
        accumulate=training.accumulate,
        seed=1,
    )
    own = BACKBONES | OWN_BACKBONES.get(method, {})
    specs = {arch: METHODS[method].with_args(arch, own[arch]) for arch in archs}
    nets = {arch: create_backbone(spec, SIZE, seed=1, arch=arch) for arch, spec in specs.items()}
    options = resolve_options(method, OPTIONS[method])
    folder.mkdir(parents=True, exist_ok=True)
    return Loop(
        load_method(method)(nets, options, image_size=SIZE, seed=1),
        Feed(images, sampler),
        training=training,
        world=world,
        folder=folder,
        seed=1,
        data=index.fingerprint,
        steps="forward" if method == "bn_refresh" else "train",
    )


def weights(trained: Trained) -> dict[str, torch.Tensor]:
    return {f"{a}.{n}": v for a, net in trained.nets.items() for n, v in net.state_dict().items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def on_ranks(world_size: int, job, *arguments) -> None:
    """Run ``job(world, *arguments)`` in one process a rank; a failure of one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_on_rank, (world_size, port, job, arguments), nprocs=world_size)


def _on_rank(rank: int, world_size: int, port: int, job, arguments) -> None:
    ranks = Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_port=port,
    )
    with join(ranks, Resources(ranks_per_node=world_size, device="cpu")) as world:
        job(world, *arguments)
