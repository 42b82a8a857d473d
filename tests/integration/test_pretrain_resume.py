"""A training that was killed ends with the same bits as one that was not."""

import time

import pytest
import torch
from pretrain_cases import Killed, assert_same_bits, make_loop, on_ranks, settings, weights, write_shards
from test_pretrain_stage import make_work

from pipeline.errors import UserError
from pipeline.stages import pretrain
from pipeline.stages.work import Interrupted
from pipeline.train.checkpoint import list_checkpoints
from pipeline.train.distributed import World
from pipeline.train.loop import Stopped

torch.set_num_threads(1)
CASES = [
    ("cass_vc", ("cnn", "vit"), "swa"),
    ("dino", ("vit",), "ema"),
    ("cass", ("cnn", "vit"), "none"),
    ("ibot", ("vit",), "none"),
    ("hssl", ("cnn",), "swa"),
    ("scatsimclr", ("cnn",), "swa"),  # killed before its pretext begins, and after
    ("selfpatch", ("vit",), "none"),
    ("cass_plus", ("cnn", "vit"), "none"),
    ("byol", ("vit",), "none"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def train(method, shards, folder, *, kill_at=None, world=None, **changed):
    archs = changed.pop("archs", ("cnn", "vit"))
    loop = make_loop(method, shards, folder, training=settings(**changed), world=world, archs=archs)
    loop.feed.kill_at = kill_at
    if kill_at is not None:
        with pytest.raises(Killed):
            loop.run()
        loop.state.settle()
        return None
    return loop.run()


@pytest.mark.parametrize(("method", "archs", "averaging"), CASES)
def test_resume_after_kill_gives_same_bits(method, archs, averaging, shards, tmp_path, capsys):
    whole = train(method, shards, tmp_path / "whole", archs=archs, averaging=averaging)
    for kill_at in (5, 8):
        train(method, shards, tmp_path / "killed", kill_at=kill_at, archs=archs, averaging=averaging)
    resumed = train(method, shards, tmp_path / "killed", archs=archs, averaging=averaging)
    assert_same_bits(weights(whole), weights(resumed))
    assert (tmp_path / "whole/log.jsonl").read_bytes() == (tmp_path / "killed/log.jsonl").read_bytes()
    assert whole.loss == resumed.loss
    said = [line[:21] for line in capsys.readouterr().out.splitlines()]
    assert said == ["going on after step 3", "going on after step 6"]


def test_stop_request_writes_a_checkpoint_at_the_next_step_and_goes_on_from_it(shards, tmp_path):
    whole = train("dino", shards, tmp_path / "whole", archs=("vit",))
    loop = make_loop(
        "dino", shards, tmp_path / "stopped", training=settings(checkpoint_steps=None), archs=("vit",)
    )
    asked = iter([False, False, True])
    loop.stop_requested = lambda: next(asked)
    with pytest.raises(Stopped, match="after step 3 of"):
        loop.run()
    assert [int(path.name[:9]) for path in list_checkpoints(tmp_path / "stopped" / "checkpoints")] == [3]
    resumed = train("dino", shards, tmp_path / "stopped", archs=("vit",))
    assert_same_bits(weights(whole), weights(resumed))


def test_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(shards, tmp_path, capsys):
    whole = train("dino", shards, tmp_path / "whole", archs=("vit",))
    train("dino", shards, tmp_path / "killed", kill_at=8, archs=("vit",))
    newest, before = list_checkpoints(tmp_path / "killed" / "checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed = train("dino", shards, tmp_path / "killed", archs=("vit",))
    said = capsys.readouterr().out
    assert (
        f"{newest} is damaged" in said and "going on after step 3" in said and before.name[:9] == "000000003"
    )
    assert_same_bits(weights(whole), weights(resumed))


def killed_at_8(shards, folder):
    """A training with checkpoints after steps 3 and 6, both on disk; then it was killed."""
    train("dino", shards, folder, kill_at=8, archs=("vit",))
    assert [int(path.name[:9]) for path in list_checkpoints(folder / "checkpoints")] == [6, 3]


LOGS = {  # what happens to a log of 8 lines, and the step that the training can go on from
    "missing": (lambda lines: None, 0),
    "empty": (lambda lines: [], 0),
    "first line changed": (lambda lines: [b"{}\n", *lines[1:]], 0),
    "cut in its fifth line": (lambda lines: [*lines[:4], lines[4][:-2]], 3),
    "fifth line changed": (lambda lines: [*lines[:4], lines[4].replace(b"loss", b"lost"), *lines[5:]], 3),
    "seventh line changed": (lambda lines: [*lines[:6], b"{}\n"], 6),
}


@pytest.mark.parametrize(("change", "goes_on"), LOGS.values(), ids=LOGS)
def test_a_checkpoint_is_used_only_with_the_log_that_belongs_to_it(change, goes_on, shards, tmp_path, capsys):
    whole = train("dino", shards, tmp_path / "whole", archs=("vit",))
    killed_at_8(shards, tmp_path / "killed")
    log = tmp_path / "killed" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.unlink()
    if (changed := change(lines)) is not None:
        log.write_bytes(b"".join(changed))
    resumed = train("dino", shards, tmp_path / "killed", archs=("vit",))
    assert_same_bits(weights(whole), weights(resumed))
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    said = capsys.readouterr().out.splitlines()
    passed_over = [line for line in said if "log.jsonl is missing, cut or changed; trying" in line]
    assert len(passed_over) == {0: 2, 3: 1, 6: 0}[goes_on]
    last = f"going on after step {goes_on}" if goes_on else "without one a training starts over"
    assert len(said) == len(passed_over) + 1 and last in said[-1]


def test_a_checkpoint_of_other_data_is_passed_over(shards, tmp_path, capsys):
    """The dataset was written again, under the same key, with other images."""
    other = write_shards(tmp_path / "data", count=36)
    whole = train("dino", other, tmp_path / "whole", archs=("vit",))
    killed_at_8(shards, tmp_path / "killed")
    resumed = train("dino", other, tmp_path / "killed", archs=("vit",))
    assert_same_bits(weights(whole), weights(resumed))
    assert (tmp_path / "whole/log.jsonl").read_bytes() == (tmp_path / "killed/log.jsonl").read_bytes()
    *passed_over, last = capsys.readouterr().out.splitlines()
    assert len(passed_over) == 2 and all("is of other data; trying the one before" in s for s in passed_over)
    assert "without one a training starts over" in last


def test_the_stage_goes_on_with_the_same_data_only(shards, tmp_path, capsys):
    other = write_shards(tmp_path / "data", count=36)
    for data, said in ((shards, ""), (shards, "going on after step 1"), (other, "is of other data")):
        work = make_work("cass", data, tmp_path / "run")
        work.stop_requested = lambda: True
        with pytest.raises(Interrupted):
            pretrain.run(work)
        assert said in capsys.readouterr().err


def test_checkpoint_seconds_saves_by_the_clock(shards, tmp_path):
    train(
        "dino",
        shards,
        tmp_path,
        kill_at=4,
        archs=("vit",),
        checkpoint_steps=None,
        checkpoint_seconds=1e-9,
        keep_checkpoints=3,
    )
    deadline = time.monotonic() + 10
    while (steps := [int(path.name[:9]) for path in list_checkpoints(tmp_path / "checkpoints")]) != [4, 3, 2]:
        assert time.monotonic() < deadline, steps
        time.sleep(0.05)


def test_loss_that_is_not_finite_stops_with_step_and_rank_and_keeps_the_checkpoint(shards, tmp_path):
    loop = make_loop("dino", shards, tmp_path, training=settings(), archs=("vit",))
    take = loop.stepper.take

    def spoiled(batches, now):
        if now.step == 4:
            with torch.no_grad():
                next(iter(loop.method.parameters())).fill_(float("nan"))
        return take(batches, now)

    loop.stepper.take = spoiled
    with pytest.raises(UserError, match=r"not finite at step 4 of \d+ on rank 0.*checkpoint is from step 3"):
        loop.run()
    assert [int(path.name[:9]) for path in list_checkpoints(tmp_path / "checkpoints")] == [3]


def seen(loop):
    """Every step's image counters, as this loop's feed gives them."""
    return {
        step: torch.cat([batch.counters for batch in batches]).tolist()
        for step, batches in enumerate(loop.feed.steps(0, loop.steps))
    }


def _some_steps(world, shards, folder, kill_at):
    train("dino", shards, folder, kill_at=kill_at, archs=("vit",), world=world)


def _the_rest(world, shards, folder):
    loop = make_loop("dino", shards, folder, training=settings(), archs=("vit",), world=world)
    trained = loop.run()
    torch.save((loop.first, loop.state.accumulate, seen(loop), trained.steps), folder / f"{world.rank}.pt")


@pytest.mark.slow
def test_fewer_ranks_go_on_with_the_same_images_a_step_in_more_parts(shards, tmp_path, capsys):
    on_ranks(2, _some_steps, shards, tmp_path, 5)
    _the_rest(World(), shards, tmp_path)
    first, accumulate, after, steps = torch.load(tmp_path / "0.pt")
    assert (first, accumulate, steps) == (3, 2, 10)
    alone = make_loop("dino", shards, tmp_path / "alone", training=settings(), archs=("vit",))
    assert after == seen(alone)
    assert "2 ranks before, 1 now" in capsys.readouterr().out


@pytest.mark.slow
def test_more_ranks_go_on_with_the_same_images_a_step(shards, tmp_path):
    _some_steps(None, shards, tmp_path, 5)
    on_ranks(2, _the_rest, shards, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [part[:2] for part in parts] == [(3, 1), (3, 1)]
    alone = make_loop("dino", shards, tmp_path / "alone", training=settings(), archs=("vit",))
    for step, counters in seen(alone).items():
        assert parts[0][2][step] + parts[1][2][step] == counters


class Poison:
    """Makes the loss of some steps not a number, each time they are computed."""

    def __init__(self, loop, steps):
        self.forward, self.steps = loop.method.forward, steps
        loop.method.forward = self

    def __call__(self, views, progress):
        outputs = self.forward(views, progress)
        if progress.step in self.steps:
            outputs["loss"] = outputs["loss"] * float("nan")
            for name, value in self.forward.__self__.state_dict().items():
                if "running" in name:  # batch statistics, as a forward pass with NaN leaves them
                    value.data.fill_(float("nan"))
        return outputs


def without(steps, shards, folder, **changed):
    """The weights of a training in which some steps' images are left out."""
    loop = make_loop("cass_vc", shards, folder, training=settings(**changed))
    loop.state.left_out = set(steps)
    return weights(loop.run())


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_a_loss_that_is_not_finite_costs_its_step_and_no_more(on_nan, shards, tmp_path, capsys):
    clean = without({4, 7}, shards, tmp_path / "clean")
    loop = make_loop("cass_vc", shards, tmp_path / "poisoned", training=settings(on_nan=on_nan))
    Poison(loop, {4, 7})
    assert_same_bits(clean, weights(loop.run()))
    said = capsys.readouterr().out
    assert "not finite at step 4" in said and "not finite at step 7" in said


def reads_late(loop):
    """Let a loop learn one step late of a loss that is not finite, and of what to log, as on a GPU."""
    loop.boundary.lag = True


def probe_after_step_4(loop):
    """A probe that is due right after step 4 and cannot look at weights that are not finite."""

    def probe(method, nets):
        assert all(weight.isfinite().all() for weight in method.parameters())
        return {"health": {"seen": 1.0}}

    loop.probe, loop.probe_every = probe, 5


@pytest.mark.parametrize("method", ["cass", "cass_plus", "dino", "selfpatch", "simclr", "hssl"])
def test_compiled_nets_are_used_and_train_to_the_same_bits(method, shards, tmp_path, monkeypatch):
    """Traced as for a compiler, then run as they are: no compiler is needed, and no bit changes."""
    compile_, called = torch.compile, []

    def traced(function, **how):
        fast = compile_(function, backend="eager", dynamic=how["dynamic"])
        return lambda *given, **more: (called.append(function.__self__), fast(*given, **more))[1]

    monkeypatch.setattr(torch, "compile", traced)
    archs = ("cnn", "vit") if method.startswith("cass") else ("cnn",) if method == "simclr" else ("vit",)
    trained = {}
    for way in (False, True):
        training = settings(epochs=1, compile=way)
        loop = make_loop(method, shards, tmp_path / str(way), training=training, archs=archs)
        trained[way] = weights(loop.run())
    assert {net.arch for net in called} == set(archs)
    assert_same_bits(trained[False], trained[True])


@pytest.mark.parametrize("probed", [False, True])
def test_a_log_written_one_step_late_has_the_same_bytes(probed, shards, tmp_path):
    for name in ("at_once", "late"):
        loop = make_loop("cass_vc", shards, tmp_path / name, training=settings(checkpoint_steps=3))
        loop.log_every = 2
        if probed:
            probe_after_step_4(loop)
        if name == "late":
            reads_late(loop)
        trained = loop.run()
        assert trained.loss is not None and trained.steps == 10
    late, at_once = ((tmp_path / name / "log.jsonl").read_bytes() for name in ("late", "at_once"))
    assert late == at_once and at_once.count(b'"kind": "step"') == 6


def test_late_news_of_a_loss_that_is_not_finite_comes_before_a_probe(shards, tmp_path):
    loop = make_loop("cass_vc", shards, tmp_path, training=settings())
    Poison(loop, {4})
    reads_late(loop)
    probe_after_step_4(loop)
    with pytest.raises(UserError, match=r"not finite at step 4 of 10 on rank 0.*checkpoint is from step 3"):
        loop.run()


def test_late_news_of_a_loss_that_is_not_finite_is_rolled_back_before_a_probe(shards, tmp_path):
    trained = []
    for name in ("clean", "poisoned"):
        loop = make_loop("cass_vc", shards, tmp_path / name, training=settings(on_nan="rollback"))
        probe_after_step_4(loop)
        if name == "clean":
            loop.state.left_out = {4}
        else:
            Poison(loop, {4})
            reads_late(loop)
        trained.append(weights(loop.run()))
    assert_same_bits(*trained)
    clean, poisoned = ((tmp_path / name / "log.jsonl").read_bytes() for name in ("clean", "poisoned"))
    assert clean == poisoned


def test_without_a_checkpoint_to_go_back_to_a_rollback_stops(shards, tmp_path):
    loop = make_loop("cass_vc", shards, tmp_path, training=settings(on_nan="rollback"))
    Poison(loop, {4})
    loop.say = lambda text: [path.unlink() for path in list_checkpoints(tmp_path / "checkpoints")]
    with pytest.raises(UserError, match=r"not finite at step 4 on rank 0.*no checkpoint to go back to"):
        loop.run()


def test_rollback_survives_a_kill(shards, tmp_path):
    clean = without({4}, shards, tmp_path / "clean")
    for kill_at in (8, None):
        loop = make_loop("cass_vc", shards, tmp_path / "poisoned", training=settings(on_nan="rollback"))
        Poison(loop, {4})
        loop.feed.kill_at = kill_at
        if kill_at:
            with pytest.raises(Killed):
                loop.run()
    assert_same_bits(clean, weights(loop.run()))


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_losses_that_are_never_finite_stop_the_training(on_nan, shards, tmp_path):
    training = settings(on_nan=on_nan, epochs=10, checkpoint_steps=1000)
    loop = make_loop("cass_vc", shards, tmp_path, training=training)
    Poison(loop, range(2, 100))
    with pytest.raises(UserError, match=r"not finite at step 12"):
        loop.run()


def _killed_and_resumed(world, method, archs, shards, folder):
    for name, kills in (("whole", []), ("killed", [5])):
        for kill_at in [*kills, None]:
            changed = {"world": world, "archs": archs, "batch_size": 12, "epochs": 5}
            trained = train(method, shards, folder / name, kill_at=kill_at, **changed)
        torch.save(weights(trained), folder / f"{name}-{world.rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "archs"),
    [
        ("cass_vc", ("cnn", "vit")),
        ("ibot", ("vit",)),
        ("hssl", ("cnn",)),
        ("scatsimclr", ("cnn",)),
        ("selfpatch", ("vit",)),
    ],
)
def test_three_ranks_resume_with_same_bits(method, archs, shards, tmp_path):
    """Of two numbers the sum has no order; three ranks' gradients have one."""
    on_ranks(3, _killed_and_resumed, method, archs, shards, tmp_path)
    loaded = [torch.load(tmp_path / f"{n}-{r}.pt") for n in ("whole", "killed") for r in range(3)]
    for other in loaded[1:]:
        assert_same_bits(loaded[0], other)
    assert (tmp_path / "whole/log.jsonl").read_bytes() == (tmp_path / "killed/log.jsonl").read_bytes()
