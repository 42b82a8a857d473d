"""The training loop: one for every method, any number of ranks, resumable to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.data.feed import Feed
from pipeline.errors import UserError
from pipeline.methods.base import Method, Progress
from pipeline.nets.backbone import Net
from pipeline.specs import Training
from pipeline.train.averaging import Averaging, refresh_batch_norm
from pipeline.train.boundary import Agreed, Boundary, Fetched
from pipeline.train.distributed import World
from pipeline.train.logs import LOG, Log, read_log
from pipeline.train.optim import make_optimizer, set_schedule
from pipeline.train.profiling import NoProfile, Profile
from pipeline.train.state import State
from pipeline.train.step import MOST_BROKEN, Stepper
from pipeline.train.syncbn import synchronise_batch_norm
from pipeline.train.views import Views

Probe = Callable[[Method, dict[str, Net]], dict[str, dict[str, Any]]]  # lines for the log, by kind
LINES_PER_EPOCH = 10
MOST_STEPS_A_LINE = 50


class Stopped(Exception):
    """The training was asked to stop and has written its checkpoint."""


class _Broken(Exception):
    """A loss was not finite on some rank; every rank raises it for the same step."""

    def __init__(self, rank: int, step: int) -> None:
        super().__init__(rank, step)
        self.rank, self.step = rank, step


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        nets: the backbones to export, in eval mode; averaged ones where weights were averaged.
        loss: mean of the logged losses of the last epoch; None without training, and on ranks other than 0.
        steps: taken, over all interruptions.
        images_seen: over all ranks and interruptions.
        seconds: of training, without probes, over all interruptions.
        probe: what the probe said of ``nets``.
    """

    nets: dict[str, Net]
    loss: float | None
    steps: int
    images_seen: int
    seconds: float
    probe: dict[str, dict[str, Any]]


class Loop:
    """A training, where its newest sound checkpoint left it or at its start; also torch's random state is.

    A checkpoint counts only with the data and the log that belong to it.

    Args:
        method: on the CPU or the device, with its initial weights.
        feed: training images; ``training.batch_size`` a step over all ranks.
        training: the settings.
        world: the ranks and this rank's device.
        folder: of the task: gets ``log.jsonl``, ``tensorboard/`` and ``checkpoints/``.
        seed: of augmentation and of what is random in the nets.
        data: tells the dataset from another: its index's fingerprint.
        steps: ``train``, or ``forward`` for forward passes that only refresh batch statistics.
        probe: evaluates the backbones on rank 0 each ``probe_epochs``.
        progress: told (done, total, text).
        stop_requested: asked at every step boundary.
        profile: steps that a profile of rank 0 looks at, in ``profile/``; 0: none.
        say: told of what a person should know, one line each.
    """

    def __init__(
        self,
        method: Method,
        feed: Feed,
        *,
        training: Training,
        world: World,
        folder: Path,
        seed: int,
        data: str,
        steps: Literal["train", "forward"] = "train",
        probe: Probe | None = None,
        progress: Callable[[float, float, str], None] = lambda done, total, text: None,
        stop_requested: Callable[[], bool] = lambda: False,
        profile: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.feed, self.training, self.world, self.folder = feed, training, world, folder
        self.learns = steps == "train"
        self.probe, self.progress, self.stop_requested, self.say = probe, progress, stop_requested, say
        self.steps_per_epoch = feed.n / training.batch_size
        self.steps = max(1, round(training.epochs * self.steps_per_epoch))
        self.log_every = max(1, min(MOST_STEPS_A_LINE, round(self.steps_per_epoch / LINES_PER_EPOCH)))
        probe_epochs = training.probe_epochs or training.epochs
        self.probe_every = max(1, round(probe_epochs * self.steps_per_epoch))

        if training.sync_bn:
            synchronise_batch_norm(method, world)
        layout = torch.channels_last if training.channels_last else torch.contiguous_format
        self.method = method.to(world.device).to(memory_format=layout)
        self.views = Views(
            method.views, seed=seed, recipe=training.augment, channels_last=training.channels_last
        )
        self.optimizer = make_optimizer(method, training) if self.learns else None
        self.averaging = Averaging(method, training)
        self.state = State(
            method,
            self.optimizer,
            self.averaging,
            world=world,
            folder=folder / "checkpoints",
            keep=training.keep_checkpoints,
            seed=seed,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            say=say,
            log=folder / LOG,
            data=data,
        )
        self.first = self.state.restore() or 0
        feed.cut(self.state.accumulate)
        self.broken = 0  # times that it has gone back
        self.boundary = Boundary(world)
        self.unwritten: tuple[Fetched, list[str], dict[str, float], Progress, float] | None = None
        self.profile = NoProfile()
        if profile and world.is_first:
            nets = [] if training.compile else [part for part in method.modules() if isinstance(part, Net)]
            self.profile = Profile(nets, folder / "profile", steps=profile, device=world.device, say=say)
        self.stepper = Stepper(
            method,
            self.optimizer,
            self.views,
            training=training,
            world=world,
            accumulate=self.state.accumulate,
            first=self.first,
            profile=self.profile,
            say=say,
        )

    def run(self) -> Trained:
        """Train from the newest sound checkpoint, or from the start.

        Raises:
            Stopped: asked to stop; the checkpoint is written.
            UserError: a loss was not finite, and ``on_nan`` does not help.
            OSError: a checkpoint could not be written; those before it are as they were.
        """
        self._begin()
        if self.first == 0:
            self._probe(0, self.method.exported())
            if self.training.on_nan == "rollback":
                self._save(0)
        while True:
            try:
                self._train()
                return self._finish()
            except _Broken as broken:
                self._roll_back(broken)

    def _begin(self) -> None:
        self.log: Log | None = None
        if self.world.is_first:
            self.log = Log(self.folder, position=self.state.log_position, step=self.first)
        self.saved_at = self.clock = time.monotonic()

    def _train(self) -> None:
        self.method.train()
        batches_of_steps = self.profile.reading(self.feed.steps(self.first, self.steps))
        for step, batches in enumerate(batches_of_steps, start=self.first):
            if step in self.state.left_out:
                continue
            self.stepper.rehearse(batches[0], self._progress)
            now = self._progress(step)
            rates = self._set_rates(step)
            scalars = self.stepper.take(batches, now)
            if scalars is None:
                continue
            self.averaging.update(self.method, now)
            self._write_line()
            if step % self.log_every == 0 or step + 1 == self.steps:
                self._log(scalars, rates, now)
            agreed = self._agree(scalars["loss"], step)
            self.profile.step_done()
            if self._is_probe_due(step + 1):
                self._refuse_broken(self.boundary.settle())
                self._probe(step + 1, self.method.exported())
            if self._is_checkpoint_due(step + 1, agreed):
                self._save(step + 1)
            if agreed.stop and step + 1 < self.steps:
                self._stop(step + 1)
        self.profile.close()
        self._refuse_broken(self.boundary.settle())

    def _progress(self, step: int) -> Progress:
        return Progress(
            step=step,
            steps=self.steps,
            epoch=step / self.steps_per_epoch,
            epochs=self.training.epochs,
        )

    def _set_rates(self, step: int) -> dict[str, float]:
        if self.optimizer is None:
            return {}
        return set_schedule(
            self.optimizer, self.training, step=step, steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )

    def _log(self, scalars: dict[str, Tensor], rates: dict[str, float], now: Progress) -> None:
        means = Fetched(self.world.mean(torch.stack(list(scalars.values()))))
        speed = (now.step + 1) * self.training.batch_size / max(1e-9, self._seconds())
        self.unwritten = means, list(scalars), rates, now, speed
        if not self.boundary.lag:
            self._write_line()

    def _write_line(self) -> None:
        """The line of a step, on a GPU once the next step is under way: nothing waits for it.

        A training that an error ends in between lacks its last line.
        """
        if self.unwritten is None:
            return
        means, names, rates, now, speed = self.unwritten
        self.unwritten = None
        if self.log is None:
            return
        values = dict(zip(names, means.read(), strict=True))
        self.log.write("step", step=now.step, epoch=now.epoch, **values, **rates)
        self.log.speed(speed, step=now.step)
        self.progress(now.step + 1, self.steps, f"loss {values['loss']:.4g}, {speed:.0f} images/s")

    def _agree(self, loss: Tensor, step: int) -> Agreed:
        self.state.settle(wait=False)
        due = time.monotonic() - self.saved_at >= self.training.checkpoint_seconds
        agreed = self.boundary.exchange(loss, step=step, stop=self.stop_requested(), save=due)
        self._refuse_broken(agreed)
        return agreed

    def _refuse_broken(self, agreed: Agreed) -> None:
        if agreed.broken is not None:
            self._write_line()
            rank, step = agreed.broken
            if self.training.on_nan == "rollback" and self.broken < MOST_BROKEN:
                raise _Broken(rank, step)
            raise UserError(
                f"the loss is not finite at step {step} of {self.steps} on rank {rank}: training stopped"
                " (a smaller train.lr, a longer train.warmup_epochs or train.clip_grad help);"
                f" the last checkpoint is from step {self.state.saved_step}"
            )

    def _roll_back(self, broken: _Broken) -> None:
        """Go back to the last checkpoint, and leave out the step whose loss was not finite."""
        self.broken += 1
        self.boundary.settle()
        self.state.settle()
        if self.log is not None:
            self.log.close()
            self.say(f"the loss is not finite at step {broken.step} on rank {broken.rank}: going back")
        self.state.left_out.add(broken.step)
        self.optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        done = self.state.restore()
        if done is None:
            raise UserError(
                f"the loss is not finite at step {broken.step} on rank {broken.rank}, and there is no"
                " checkpoint to go back to: training stopped"
            )
        self.first = done
        self._begin()

    def _is_probe_due(self, done: int) -> bool:
        return done % self.probe_every == 0 and done < self.steps

    def _is_checkpoint_due(self, done: int, agreed: Agreed) -> bool:
        every = self.training.checkpoint_steps
        asked = agreed.stop or agreed.save or (every is not None and done % every == 0)
        return asked and done < self.steps

    def _save(self, done: int) -> None:
        self._refuse_broken(self.boundary.settle())
        self._write_line()
        log: dict[str, Any] = {}
        if self.log is not None:
            position, sha256 = self.log.position(), self.log.sha256()
            log = {"log_position": position, "log_sha256": sha256, "first": self.log.sync}
        self.state.save(done, seconds=self._seconds(), **log)
        self.saved_at = time.monotonic()

    def _stop(self, done: int) -> None:
        self.state.settle()
        if self.log is not None:
            self.log.close()
        raise Stopped(f"stopped after step {done} of {self.steps}")

    def _seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.clock

    def _probe(self, done: int, nets: dict[str, Net]) -> dict[str, dict[str, Any]]:
        """All ranks evaluate; rank 0 logs it."""
        if self.probe is None:
            return {}
        self._write_line()
        began = time.monotonic()
        self.method.eval()
        lines = self.probe(self.method, nets)
        if self.log is not None:
            for kind, values in lines.items():
                self.log.write(kind, step=done, epoch=done / self.steps_per_epoch, **values)
        self.method.train()
        self.clock += time.monotonic() - began
        return lines

    def _finish(self) -> Trained:
        self.state.settle()
        self._write_line()
        nets = self.averaging.nets(self.method)
        if self.averaging.model is not None:
            epoch = self.feed.steps(0, math.ceil(self.steps_per_epoch))
            refresh_batch_norm(nets, (self.views(batch, 1)[0] for batches in epoch for batch in batches))
        seconds = self._seconds()
        lines = self._probe(self.steps, nets)
        loss: float | None = None
        if self.log is not None:
            self.log.close()
            since = self.steps - max(1, self.steps_per_epoch)  # a batch may hold more than an epoch
            last = [line for line in read_log(self.folder, "step") if line["step"] >= since]
            loss = sum(line["loss"] for line in last) / len(last) if last else None  # all steps left out
        for net in nets.values():
            net.eval()
        return Trained(
            nets=nets,
            loss=loss,
            steps=self.steps,
            images_seen=self.steps * self.training.batch_size,
            seconds=seconds,
            probe=lines,
        )
