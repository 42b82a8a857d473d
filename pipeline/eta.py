"""How long an experiment will still take: from what its finished tasks took, and what the others will work.

A task is expected to take as long as finished ones of its kind: those that differ in seeds alone, else those
with the same net, protocol and labels. Of a kind that has not run yet, the images that pass through its nets
are counted (backward counts as two forward), and multiplied by what such a pass took with each of the nets,
or with any: that of a task with several nets is shared out among them. A running task that says how far it
is tells what others of its kind will take. Jobs are then placed on the machine in their order, each after
those it waits for.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.manifest import Receipt, Task
from pipeline.stages import TRAINING_STAGES

FORWARD, TRAIN = 1.0, 3.0  # passes of an image: forward alone, forward and backward
VIEWS = 2.0  # of an image in a step of a pretraining
SHARED = 6.0  # frozen protocols of one job that use features which are computed once
STARTUP_S = 5.0  # of a job, until one has ended
TELLS = 0.05  # the least share of a running task that tells what the whole will take
ROUNDS = 50  # of sharing out the time of tasks with several nets
LEAST_S = 1.0
Kind = tuple[Any, ...]


@dataclass
class JobRun:
    """A job that has not ended.

    Attributes:
        tasks: in the order in which it runs them; those that are done have a receipt.
        after: the names of the unfinished jobs that it waits for.
        cpus, gpus: what it takes of the machine.
        elapsed: seconds since its start; None: it waits.
        progress: the share of its only task that is done, where that is known.
    """

    name: str
    tasks: Sequence[Task]
    after: frozenset[str] = frozenset()
    cpus: int = 1
    gpus: int = 0
    elapsed: float | None = None
    progress: float | None = None


@dataclass
class Durations:
    """What tasks are expected to take.

    Args:
        tasks: of the experiment.
        receipts: of those that are done, by task id.
        running: seconds that running tasks will take in all, by task id, where their progress tells.
    """

    tasks: Sequence[Task]
    receipts: Mapping[str, Receipt | None]
    running: Mapping[str, float] = field(default_factory=dict)
    _images: dict[str, dict[str, int]] = field(init=False, default_factory=dict)
    _took: dict[Kind, list[float]] = field(init=False, default_factory=dict)
    _likely: dict[Kind, list[float]] = field(init=False, default_factory=dict)  # as _took, of running tasks
    _a_pass: dict[tuple[str, str], float] = field(
        init=False, default_factory=dict
    )  # stage and net, or "" → seconds
    _beside: dict[str, list[float]] = field(
        init=False, default_factory=dict
    )  # stage → seconds that are no training

    def __post_init__(self) -> None:
        done = [(task, receipt) for task in self.tasks if (receipt := self.receipts.get(task.id)) is not None]
        for task, receipt in done:
            if task.stage == "shard":
                self._images[task.name] = receipt.metrics.get("samples", {})
        trained: dict[Kind, tuple[float, float]] = {}  # (stage, net, …) → seconds, passes
        for task, receipt in done:
            for kind in _kinds(task):
                self._took.setdefault(kind, []).append(receipt.seconds)
            training = receipt.device_seconds / max(1, receipt.world_size)
            self._beside.setdefault(task.stage, []).append(max(0.0, receipt.seconds - training))
            passes = receipt.images_seen * _passes_an_image(task)
            if passes and training:
                _add(trained, (task.stage, *_nets(task)), training, passes)
        for task in self.tasks:
            if (seconds := self.running.get(task.id)) is None:
                continue
            for kind in _kinds(task)[:-1]:
                self._likely.setdefault(kind, []).append(seconds)
            if passes := self._passes(task):
                _add(trained, (task.stage, *_nets(task)), seconds, passes)
        self._a_pass = _share_out(trained)

    def expected(self, task: Task) -> float | None:
        """Seconds; None while nothing has run that tells."""
        kinds = _kinds(task)
        for kind in kinds[:-1]:
            if found := self._took.get(kind) or self._likely.get(kind):
                return _mean(found)
        passes, nets = self._passes(task), list(_nets(task))
        each = [self._seconds_a_pass(task.stage, net) for net in nets]
        if passes and None not in each:
            training = sum(passes / len(nets) * seconds for seconds in each if seconds is not None)
            return _mean(self._beside.get(task.stage, [LEAST_S])) + training
        if kinds[-1] in self._took:
            return _mean(self._took[kinds[-1]])
        if task.stage == "aggregate":
            return 2.0 + 0.02 * len(self.tasks)
        return None

    def _seconds_a_pass(self, stage: str, net: str) -> float | None:
        """Of an image through a net: in this stage, in any, or of any net; None: nothing was trained."""
        for known in ((stage, net), ("", net), ("", "")):
            if known in self._a_pass:
                return self._a_pass[known]
        return None

    def _passes(self, task: Task) -> float:
        """Images through nets, as forward passes; 0 where a task computes with none, or nothing is known."""
        spec = task.spec
        split = next((counts for name, counts in self._images.items() if name == spec.get("dataset")), {})
        train, val, test = (_number(split.get(name), 0) for name in ("train", "val", "test"))
        if task.stage in TRAINING_STAGES:
            epochs = _number(_of(spec, "train").get("epochs"), 1)
            return train * epochs * _passes_an_image(task)
        if task.stage != "finetune":
            return 0.0
        labelled = train * _number(spec.get("fraction"), 1)
        settings = _of(spec, "settings")
        if _is_frozen(spec.get("protocol")):
            return FORWARD * (labelled + val + test) / SHARED
        batch = max(1.0, _number(settings.get("batch_size"), 32))
        an_epoch = max(1.0, math.ceil(labelled / batch))
        most = _number(settings.get("max_steps"), math.inf)
        return TRAIN * min(_number(settings.get("epochs"), 1) * an_epoch, most) * batch


def seconds_left(
    jobs: Sequence[JobRun], durations: Durations, *, cpus: int, gpus: int = 0, startup: float = STARTUP_S
) -> float | None:
    """Seconds until the last of some jobs has ended, never less than one; None: nothing has run that tells.

    Args:
        jobs: all that have not ended, in the order in which they start.
        cpus, gpus: what the machine has for them.
        startup: seconds that a job takes besides its tasks.
    """
    seen = {job.tasks[0].id: whole for job in jobs if (whole := _seen(job, startup)) is not None}
    durations = replace(durations, running=seen) if seen else durations
    lengths: dict[str, float] = {}
    for job in jobs:
        length = _length(job, durations, startup)
        if length is None:
            return None
        lengths[job.name] = length
    ends = _place(jobs, lengths, cpus=cpus, gpus=gpus)
    return max([LEAST_S, *ends.values()])


def _length(job: JobRun, durations: Durations, startup: float) -> float | None:
    """Seconds that a job still takes once it runs."""
    receipts = [durations.receipts.get(task.id) for task in job.tasks]
    spent = sum(receipt.seconds for receipt in receipts if receipt is not None)
    undone = [task for task, receipt in zip(job.tasks, receipts, strict=True) if receipt is None]
    expected = [durations.expected(task) for task in undone]
    elapsed = 0.0 if job.elapsed is None else job.elapsed
    seen = _seen(job, startup)
    if seen is not None and job.progress and undone:
        before = expected[0]
        whole = seen if before is None else job.progress * seen + (1 - job.progress) * before
        return max((1 - job.progress) * whole, LEAST_S)
    if any(seconds is None for seconds in expected):
        return None
    left = sum(seconds for seconds in expected if seconds is not None)
    whole = startup + spent + left
    # What takes longer than expected is taken to need a quarter of a task more.
    return max(whole - elapsed, 0.25 * left / max(1, len(undone)), LEAST_S)


def _seen(job: JobRun, startup: float) -> float | None:
    """Seconds that the only task of a running job will take in all by its progress; None: unknown."""
    if not job.progress or job.progress < TELLS or job.elapsed is None or len(job.tasks) != 1:
        return None
    return max(0.0, job.elapsed - min(startup, job.elapsed / 2)) / job.progress


def _place(jobs: Sequence[JobRun], lengths: Mapping[str, float], *, cpus: int, gpus: int) -> dict[str, float]:
    """When each job ends, from now, if it starts as soon as what it waits for has ended and there is room."""
    ends = {job.name: lengths[job.name] for job in jobs if job.elapsed is not None}
    running = [(ends[job.name], number) for number, job in enumerate(jobs) if job.elapsed is not None]
    heapq.heapify(running)
    ended: set[str] = set()
    known = {job.name for job in jobs}
    waiting = [number for number, job in enumerate(jobs) if job.elapsed is None]
    clock = 0.0
    while waiting:
        free = [cpus - sum(jobs[number].cpus for _, number in running)]
        free.append(gpus - sum(jobs[number].gpus for _, number in running))
        for number in list(waiting):
            job = jobs[number]
            if not ended.issuperset(job.after & known):
                continue
            if running and (job.cpus > free[0] or job.gpus > free[1]):
                break
            waiting.remove(number)
            ends[job.name] = clock + lengths[job.name]
            heapq.heappush(running, (ends[job.name], number))
            free = [free[0] - job.cpus, free[1] - job.gpus]
        if not running:  # what is left waits for what never comes
            break
        clock, number = heapq.heappop(running)
        ended.add(jobs[number].name)
    return ends


def in_words(seconds: float | None) -> str:
    """Such as ``ETA 3:07`` or ``ETA 2:15:00``; a dash where nothing is known yet."""
    if seconds is None:
        return "ETA –"
    minutes, rest = divmod(max(1, math.ceil(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"ETA {hours}:{minutes:02d}:{rest:02d}" if hours else f"ETA {minutes}:{rest:02d}"


def _add(trained: dict[Kind, tuple[float, float]], kind: Kind, seconds: float, passes: float) -> None:
    before = trained.get(kind, (0.0, 0.0))
    trained[kind] = (before[0] + seconds, before[1] + passes)


def _share_out(trained: Mapping[Kind, tuple[float, float]]) -> dict[tuple[str, str], float]:
    """Seconds a pass, by stage and net; of all stages and of all nets under ``""``.

    What several nets took together is shared out by what each is thought to take, again and again, until that
    agrees with what was measured (the EM algorithm for sums of Poisson variables: Shepp and Vardi 1982).

    Args:
        trained: (stage, net, …) → seconds of all these nets together, passes through all of them.
    """
    found: dict[tuple[str, str], float] = {}
    for stage in ("", *dict.fromkeys(kind[0] for kind in trained)):
        seen = [
            (kind[1:], seconds, passes / (len(kind) - 1))
            for kind, (seconds, passes) in trained.items()
            if stage in ("", kind[0]) and len(kind) > 1
        ]
        if not seen:
            continue
        mean = sum(seconds for _, seconds, _ in seen) / sum(each * len(nets) for nets, _, each in seen)
        rates = {net: mean for nets, _, _ in seen for net in nets}
        for _ in range(ROUNDS if any(len(nets) > 1 for nets, _, _ in seen) else 1):
            took = dict.fromkeys(rates, 0.0)
            passed = dict.fromkeys(rates, 0.0)
            for nets, seconds, each in seen:
                whole = sum(rates[net] for net in nets)
                for net in nets:
                    took[net] += seconds * rates[net] / whole if whole else seconds / len(nets)
                    passed[net] += each
            rates = {net: took[net] / passed[net] for net in rates}
        found |= {(stage, net): rate for net, rate in rates.items()}
        if not stage:
            found["", ""] = mean
    return found


def _kinds(task: Task) -> list[Kind]:
    """What tasks have in common that take about as long, the nearest first; the last is its stage."""
    spec = task.spec
    nets = tuple(_nets(task))
    if task.stage == "finetune":
        what = (spec.get("protocol"), spec.get("fraction"))
        return [
            (task.stage, spec.get("dataset"), nets, *what, spec.get("label")),
            (task.stage, spec.get("dataset"), nets, *what),
            (task.stage,),
        ]
    if task.stage in TRAINING_STAGES:
        return [(task.stage, spec.get("dataset"), nets, spec.get("label")), (task.stage,)]
    return [(task.stage, spec.get("dataset", {}).get("name") if task.stage == "shard" else ""), (task.stage,)]


def _nets(task: Task) -> Iterable[str]:
    """The nets of a task, by all that says how large they are."""
    if task.stage == "finetune":
        return (_net(task.spec.get("backbone")),)
    return tuple(_net(net) for net in _of(task.spec, "backbones").values())


def _net(backbone: Any) -> str:
    said = backbone if isinstance(backbone, dict) else {}
    return f"{said.get('name')} {said.get('args')}"


def _passes_an_image(task: Task) -> float:
    """Forward passes that a step takes for each of its images, over all nets of the task."""
    if task.stage == "finetune":
        return TRAIN
    if task.stage not in TRAINING_STAGES:
        return 0.0
    each = {"train": VIEWS * TRAIN, "forward": FORWARD}.get(_steps_of(task.spec.get("method")), 0.0)
    return each * max(1, len(list(_nets(task))))


def _steps_of(method: Any) -> str:
    """``train``, ``forward``, or nothing for a method that takes no steps."""
    from pipeline.methods.registry import METHODS

    steps = METHODS[method].steps if method in METHODS else "train"
    return "" if steps == "none" else steps


def _is_frozen(protocol: Any) -> bool:
    return protocol in ("knn", "linear", "seg_linear")


def _of(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = spec.get(name)
    return value if isinstance(value, dict) else {}


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value is not None else otherwise


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
