"""One step of a training: forward and backward over its parts, then the optimiser's and the method's own."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.feed import Batch
from pipeline.errors import UserError
from pipeline.methods.base import Method, Progress
from pipeline.nets.backbone import Net
from pipeline.specs import Training
from pipeline.train.distributed import World
from pipeline.train.profiling import NoProfile
from pipeline.train.state import Before
from pipeline.train.views import Views

MOST_BROKEN = 10  # losses that are not finite, one after another or after going back, before it stops
MOST_COMPILED = 64  # nets times sizes of view; PyTorch's 8 are fewer than CASS with teachers and crops has
DDP_SETTLES = 2  # steps with a static graph before DDP has laid out its buckets for good


class Stepper:
    """Takes the steps of a training.

    Args:
        method: on the device, its weights those of step ``first``.
        optimizer: None for forward passes that only refresh batch statistics.
        views: made of each batch.
        training: the settings.
        world: the ranks and this rank's device.
        accumulate: parts of a step.
        first: the first step that will be taken.
        profile: told what its parts are.
        say: told of steps that are not taken.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer | None,
        views: Views,
        *,
        training: Training,
        world: World,
        accumulate: int,
        first: int,
        profile: NoProfile,
        say: Callable[[str], None],
    ) -> None:
        self.method, self.optimizer, self.views = method, optimizer, views
        self.training, self.world, self.profile, self.say = training, world, profile, say
        self.autocast = autocast(training, world)
        self.broken = 0  # losses not finite in a row
        self.model: torch.nn.Module = method
        self.rehearsals = 0
        nets = [part for part in method.modules() if isinstance(part, Net)]
        for net in nets if training.recompute else ():
            net.recompute()
        self.graphs = training.compile == "graphs" and world.device.type == "cuda"
        if training.compile:
            kept = torch._dynamo.config
            kept.cache_size_limit = max(kept.cache_size_limit, MOST_COMPILED)
        for net in nets if training.compile else ():
            net.compile_passes(graphs=self.graphs)
        if world.world_size > 1 and optimizer is not None:
            whole = accumulate == 1  # a static graph cannot leave out the synchronisation
            self.model = DistributedDataParallel(
                method,
                static_graph=whole,
                find_unused_parameters=not whole,
                gradient_as_bucket_view=True,
            )
            self.rehearsals = min(first, DDP_SETTLES) if whole else 0

    def rehearse(self, batch: Batch, progress: Callable[[int], Progress]) -> None:
        """Once, the first passes again: they leave nothing behind but DDP's order of gradients.

        DDP lays its buckets out anew after its first steps, in the order in which gradients came. Where more
        than two ranks add up, a gradient's place decides in which order that is: a resumed training would
        differ in the last bits of some steps from one that was never interrupted.

        Args:
            batch: any.
            progress: where the training stood at a step.
        """
        for step in range(self.rehearsals):
            before, now = Before(self.method, self.world.device), progress(step)
            self._begin_step()
            with self.autocast():
                outputs = self.model(self.views(batch, self.method.views_needed(now)), now)
            outputs["loss"].backward()
            self.method.zero_grad(set_to_none=True)
            before.restore()
        self.rehearsals = 0

    def take(self, batches: list[Batch], now: Progress) -> dict[str, Tensor] | None:
        """Forward and backward over all accumulations, then one optimiser step.

        Returns:
            Means to log; None if a loss was not finite and the step was therefore not taken.

        Raises:
            UserError: too many steps in a row were not taken.
        """
        learns = self.optimizer is not None
        self._begin_step()
        totals: dict[str, Tensor] = {}
        skips = self.training.on_nan == "skip" and learns
        before = Before(self.method, self.world.device) if skips else None
        for number, batch in enumerate(batches, start=1):
            with self.profile.part("augment"):
                views = self.views(batch, self.method.views_needed(now))
            with self._synchronised(number == len(batches)), torch.set_grad_enabled(learns):
                with self.profile.part("forward, heads and loss"), self.autocast():
                    outputs = self.model(views, now)
                if learns:
                    with self.profile.part("backward"):
                        (outputs["loss"] / len(batches)).backward()
            for name, value in outputs.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / len(batches)
        with self.profile.part("optimiser"):
            taken = self._update(totals["loss"], now, before)
        return totals if taken else None

    def _begin_step(self) -> None:
        """CUDA graphs may write over what the step before gave."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _update(self, loss: Tensor, now: Progress, before: Before | None) -> bool:
        """The optimiser's step and the method's own.

        Args:
            loss: of the step.
            now: where the training stands.
            before: what to go back to where the loss or a gradient is not finite; None: it is not looked at.

        Returns:
            Whether the step was taken.
        """
        if self.optimizer is None:
            return True
        self.method.after_backward(now)
        norm = torch.ones(())
        if self.training.clip_grad is not None or before is not None:
            most = self.training.clip_grad or math.inf
            norm = torch.nn.utils.clip_grad_norm_(self.method.parameters(), most)
        if before is not None:
            if self._is_broken(loss, norm):
                before.restore()
                self.optimizer.zero_grad(set_to_none=True)
                self._count_skipped(now.step)
                return False
            self.broken = 0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(now)
        return True

    def _is_broken(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether a loss or a gradient is not finite on any rank. It waits for the device."""
        broken = ~(loss.isfinite() & norm.to(loss.device).isfinite())
        return bool(self.world.maximum(broken.to(torch.int64)).item())

    def _count_skipped(self, step: int) -> None:
        self.broken += 1
        if self.broken > MOST_BROKEN:
            raise UserError(
                f"the loss is not finite at step {step}, nor at the {MOST_BROKEN} before: stopped"
            )
        if self.world.is_first:
            self.say(f"the loss is not finite at step {step}: the step is skipped")

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over ranks once a step: in the last accumulation."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()


def autocast(training: Training, world: World) -> Callable[[], contextlib.AbstractContextManager]:
    """bf16 where asked for, and by default on GPUs that have it; else full precision."""
    device = world.device.type
    wanted = training.precision == "bf16"
    if training.precision == "auto":
        wanted = device == "cuda" and torch.cuda.is_bf16_supported()
    return functools.partial(torch.autocast, device, dtype=torch.bfloat16, enabled=wanted)
