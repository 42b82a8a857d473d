"""The time left: within half of it right after a fifth of the tasks, never nothing while some remain."""

from __future__ import annotations

import heapq
import random

import pytest

from pipeline.eta import Durations, JobRun, in_words, seconds_left
from pipeline.experiment_file import load_experiment
from pipeline.jobs import Job, pack
from pipeline.manifest import Manifest, Receipt, Task
from pipeline.preview import planned

IMAGES = {"train": 1257, "val": 180, "test": 360}
SLOW = ["methods={supervised: {}, simclr: {}, cass_vc: {}}", "pretrain.epochs=40", "seeds=[0, 1]"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, Manifest]:
    store = tmp_path_factory.mktemp("store")
    first, each = "pretrain.seeds=first", "pretrain.seeds=each"
    alone = "resources.finetune.tasks_per_job=1"
    settings = {
        "as shipped": [],
        "one pretraining": [first],
        "long pretrainings": [*SLOW, first],
        "long pretrainings, each seed": [*SLOW, each],
        "a job a task": [alone, first],
        "a job a task, each seed": [alone, each],
    }
    return {name: planned(load_experiment("quickstart", sets), store) for name, sets in settings.items()}


def truth(task: Task, chance: random.Random) -> tuple[float, float, int]:
    """Seconds, seconds of training and images of a task, by costs of nets that the estimate does not know."""
    noise = chance.lognormvariate(0, 0.15)
    spec = task.spec
    if task.stage == "finetune":
        per_image = {"cnn": 0.8e-3, "vit": 1.7e-3}[spec["arch"]]
        if spec["protocol"] == "finetune":
            seen = min(100, 30 * max(1, int(IMAGES["train"] * spec["fraction"]) // 32)) * 32
            training = seen * per_image * noise
            return 0.4 + training, training, seen
        return {"linear": 0.9, "knn": 0.2}[spec["protocol"]] * noise, 0.0, 0
    if task.stage == "pretrain":
        per_image = sum({"cnn": 2.0e-3, "vit": 4.2e-3}[arch] for arch in spec["backbones"])
        steps = {"supervised": 0.0, "bn_refresh": 0.2}.get(spec["method"], 1.0)
        seen = int(IMAGES["train"] * spec["train"]["epochs"]) if steps else 0
        training = seen * per_image * steps * noise
        return 2.0 + training, training, seen
    return (1.5 if task.stage == "shard" else 6.0) * noise, 0.0, 0


def simulated(manifest: Manifest, *, cpus: int, startup: float, seed: int) -> list[tuple[float, float]]:
    """Run a plan on an imagined machine: after each task estimate (NaN: none), and what really was left."""
    chance = random.Random(seed)
    took = {task.id: truth(task, chance) for task in manifest.tasks}
    jobs = pack(manifest.tasks)
    begun, ends = _schedule(jobs, took, cpus=cpus, startup=startup)
    moments = []
    for job in jobs:
        clock = begun[job.name] + startup
        for task in job.tasks:
            clock += took[task.id][0]
            moments.append((clock, task.id))
    moments.sort()
    receipts: dict[str, Receipt | None] = {}
    said = []
    for clock, task_id in moments[:-1]:
        receipts[task_id] = _receipt(manifest.task(task_id), *took[task_id])
        left = [job for job in jobs if ends[job.name] > clock]
        names = {job.name for job in left}
        runs = [
            JobRun(
                job.name,
                job.tasks,
                frozenset(names & set(job.after)),
                job.resources.cpus_per_rank,
                elapsed=clock - begun[job.name] if begun[job.name] <= clock else None,
                progress=_progress(job, clock - begun[job.name] - startup, took),
            )
            for job in left
        ]
        eta = seconds_left(runs, Durations(manifest.tasks, receipts), cpus=cpus, startup=startup)
        said.append((float("nan") if eta is None else eta, max(ends.values()) - clock))
    return said


def _schedule(jobs: list[Job], took: dict, *, cpus: int, startup: float) -> tuple[dict, dict]:
    begun: dict[str, float] = {}
    ends: dict[str, float] = {}
    running: list[tuple[float, str]] = []
    waiting, clock, free = list(jobs), 0.0, cpus
    while waiting or running:
        for job in list(waiting):
            ready = all(name in ends and ends[name] <= clock for name in job.after)
            if ready and (job.resources.cpus_per_rank <= free or not running):
                waiting.remove(job)
                begun[job.name] = clock
                ends[job.name] = clock + startup + sum(took[task.id][0] for task in job.tasks)
                heapq.heappush(running, (ends[job.name], job.name))
                free -= job.resources.cpus_per_rank
            elif ready:
                break
        clock, name = heapq.heappop(running)
        free += next(job for job in jobs if job.name == name).resources.cpus_per_rank
    return begun, ends


def _progress(job: Job, spent: float, took: dict) -> float | None:
    """The share that a training says it has done, as ``progress.json`` does."""
    if spent <= 0 or len(job.tasks) > 1 or job.stage != "pretrain":
        return None
    return min(1.0, spent / took[job.tasks[0].id][0])


def _receipt(task: Task, seconds: float, training: float, seen: int) -> Receipt:
    return Receipt(
        key=task.key,
        task=task.id,
        stage=task.stage,
        metrics={"samples": IMAGES} if task.stage == "shard" else {},
        files={},
        started="",
        ended="",
        seconds=seconds,
        hosts=[],
        world_size=1,
        images_seen=seen,
        device_seconds=training,
    )


@pytest.mark.parametrize(
    "plan",
    [
        "as shipped",
        "one pretraining",
        "long pretrainings",
        "long pretrainings, each seed",
        "a job a task",
        "a job a task, each seed",
    ],
)
@pytest.mark.parametrize(("cpus", "startup"), [(2, 1.5), (8, 6.0)])
def test_time_left_is_right_within_half_of_it_after_a_fifth_of_the_tasks(plans, plan, cpus, startup, request):
    if (plan, cpus) == ("as shipped", 8):
        reason = "up to 2.7 times too long for some six of 295 tasks, when the first fine-tunings end"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    manifest = plans[plan]
    for seed in range(3):
        said = simulated(manifest, cpus=cpus, startup=startup, seed=seed)
        for eta, really in said[len(manifest.tasks) // 5 :: 7]:
            if really > 10:
                assert 0.5 * really <= eta <= 1.5 * really, (plan, cpus, seed, eta, really)
        assert all(eta >= 1 for eta, _ in said if eta == eta), "never nothing while a task remains"


def test_time_left_follows_a_training_that_takes_longer_than_others_did(plans):
    manifest = plans["long pretrainings"]
    task = next(task for task in manifest.tasks if task.id.endswith("simclr-cnn-s0"))
    shard = manifest.tasks[0]
    durations = Durations(manifest.tasks, {shard.id: _receipt(shard, 1.0, 0.0, 0)})
    nothing_known = [JobRun("a", [task], elapsed=10.0)]
    assert seconds_left(nothing_known, durations, cpus=1) is None
    half = [JobRun("a", [task], elapsed=105.0, progress=0.5)]
    assert seconds_left(half, durations, cpus=1, startup=5.0) == pytest.approx(100, rel=0.05)
    late = [JobRun("a", [shard], elapsed=1e6)]
    assert seconds_left(late, Durations([shard], {}), cpus=1) is None
    overdue = [JobRun("a", [task], elapsed=1e6, progress=0.99)]
    assert seconds_left(overdue, durations, cpus=1) >= 1


def test_time_of_two_nets_together_is_shared_out_among_them(plans):
    """Pretrainings of the convolutional net, of the other, of both: 20 s, 50 s and 70 s."""
    manifest = plans["long pretrainings"]
    pretrainings = [
        task for task in manifest.tasks if task.stage == "pretrain" and "supervised" not in task.id
    ]
    cnn, vit, both = pretrainings
    shard = manifest.tasks[0]
    known = {shard.id: _receipt(shard, 1.0, 0.0, 0)}
    seen = IMAGES["train"] * 40
    took = {cnn.id: 20.0, vit.id: 50.0, both.id: 70.0}
    for missing in pretrainings:
        receipts = known | {
            task.id: _receipt(task, took[task.id], took[task.id], seen)
            for task in pretrainings
            if task != missing
        }
        expected = Durations(manifest.tasks, receipts).expected(missing)
        assert expected == pytest.approx(took[missing.id], rel=0.05), missing.id


def test_running_training_tells_what_others_of_its_kind_will_take(plans):
    manifest = plans["long pretrainings, each seed"]
    one, other = (task for task in manifest.tasks if task.id.startswith("pretrain/digits-simclr-vit"))
    shard = manifest.tasks[0]
    durations = Durations(manifest.tasks, {shard.id: _receipt(shard, 1.0, 0.0, 0)})
    jobs = [JobRun("a", [one], elapsed=105.0, progress=0.5), JobRun("b", [other])]
    assert seconds_left(jobs[1:], durations, cpus=1, startup=5.0) is None
    assert seconds_left(jobs, durations, cpus=1, startup=5.0) == pytest.approx(305, rel=0.05)


def test_jobs_wait_for_those_before_them_and_for_room(plans):
    tables = plans["as shipped"].tasks[-1]
    durations = Durations([tables], {})
    each = durations.expected(tables) + 5
    chain = [
        JobRun("a", [tables]),
        JobRun("b", [tables], frozenset("a")),
        JobRun("c", [tables], frozenset("b")),
    ]
    assert seconds_left(chain, durations, cpus=8) == pytest.approx(3 * each)
    beside = [JobRun(name, [tables]) for name in "abcd"]
    assert seconds_left(beside, durations, cpus=4) == pytest.approx(each)
    assert seconds_left(beside, durations, cpus=2) == pytest.approx(2 * each)
    gpus = [JobRun(name, [tables], gpus=1) for name in "abcd"]
    assert seconds_left(gpus, durations, cpus=8, gpus=1) == pytest.approx(4 * each)


def test_time_left_in_words():
    assert in_words(None) == "ETA –"
    assert [in_words(seconds) for seconds in (0, 0.2, 59.5, 187, 8100)] == [
        "ETA 0:01",
        "ETA 0:01",
        "ETA 1:00",
        "ETA 3:07",
        "ETA 2:15:00",
    ]
