"""Search stage: a short pretraining with several values of an option side by side → their ranking.

Writes ``log.jsonl`` and ``tensorboard/``; the ranking and the winner stand in the receipt, from where the
pretraining takes it. Runs on any number of ranks and under torchrun, as pretraining does.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: a mistake or an installation that cannot work is one line
    from pipeline.stages.command import main

    main("search")

from collections.abc import Iterator

from torch import Tensor

from pipeline.data.images import ImageSet
from pipeline.methods.base import Progress
from pipeline.methods.load import load_search
from pipeline.methods.registry import searched_option
from pipeline.specs import SearchSpec
from pipeline.stages.training import batch_warnings, make_nets, read_images, train, train_images
from pipeline.stages.work import Outcome, Work
from pipeline.train.distributed import World, join, peak_memory
from pipeline.train.loop import Trained
from pipeline.train.probe import HEALTH_IMAGES, evenly, plain
from pipeline.train.step import autocast
from shards import Index


def run(work: Work) -> Outcome:
    """Train all candidates together, and rank them on images that were not trained on.

    Raises:
        UserError: no such backbone, weights or device; a batch that cannot be shared; a loss that is not
        finite. Interrupted: asked to stop; the checkpoint is written, and the same task goes on from it.
    """
    spec = SearchSpec.model_validate(work.task.spec)
    with join(work.ranks, work.resources, on_lost=work.rank_lost) as world:
        index = Index.open(work.inputs["shard"][0].folder)
        nets = make_nets(spec)
        images = train_images(index, spec, world, nets)
        method = load_search(spec.method)(
            nets, spec.options, image_size=spec.train.image_size, seed=spec.seed
        )
        trained = train(method, images, work=work, spec=spec, world=world)
        ranking = []
        if world.is_first:
            with autocast(spec.train, world)():
                ranking = method.eval().rank(_held_out(index, images, spec, world), _end(trained, spec))
        return Outcome(
            metrics={
                "decides": searched_option(spec.options),
                "winner": ranking[0]["candidate"] if ranking else None,
                "ranking": ranking,
                "loss": trained.loss,
                "steps": trained.steps,
                "warnings": batch_warnings(images, spec),
                "images_per_second": round(trained.images_seen / trained.seconds, 3),
            },
            images_seen=trained.images_seen,
            device=world.device.type,
            device_seconds=trained.seconds * world.world_size,
            peak_memory_bytes=peak_memory(world),
            discard=("checkpoints",),
        )


def _end(trained: Trained, spec: SearchSpec) -> Progress:
    epochs = spec.train.epochs
    return Progress(
        step=trained.steps,
        steps=trained.steps,
        epoch=epochs,
        epochs=epochs,
    )


def _held_out(index: Index, images: ImageSet, spec: SearchSpec, world: World) -> Iterator[Tensor]:
    """Validation images without their labels, (B, 3, S, S) in [0, 1]; those of train where there are none."""
    rows = index.rows("val")
    if len(rows):
        chosen = rows[evenly(len(rows), HEALTH_IMAGES)]
        images = read_images(index, chosen, spec, world, fill=images.fill)
    yield from plain(images, evenly(len(images), HEALTH_IMAGES))
