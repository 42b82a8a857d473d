"""A training's state comes back from its newest checkpoint that is whole and belongs to its log and data."""

import hashlib

import pytest
from torch import nn

from pipeline.errors import UserError
from pipeline.methods.base import Method
from pipeline.specs import Training
from pipeline.train import state as module
from pipeline.train.averaging import Averaging
from pipeline.train.checkpoint import list_checkpoints
from pipeline.train.distributed import World
from pipeline.train.state import State


class Alone(World):
    """Rank 0 of many, without the others."""

    def gather(self, values):
        return [values] * self.world_size

    def from_first(self, value):
        return value


def make_state(folder, *, ranks=1, **changed):
    method = Method({}, {}, image_size=8, seed=0)
    method.layer = nn.Linear(2, 3)
    said = []
    settings = {"keep": 2, "seed": 0, "batch_size": 8, "accumulate": 1, "say": said.append} | changed
    state = State(
        method,
        None,
        Averaging(method, Training()),
        world=Alone(world_size=ranks),
        folder=folder / "checkpoints",
        **settings,
    )
    return state, said


def save(state, step, **more):
    state.save(step, seconds=0.0, **more)
    state.settle()


@pytest.mark.parametrize(("ranks", "accumulate", "then"), [(4, 1, 4), (2, 2, 4), (8, 1, 8)])
def test_parts_of_a_step_stay_as_small_however_often_it_is_resumed(tmp_path, ranks, accumulate, then):
    first, _ = make_state(tmp_path, ranks=ranks, accumulate=accumulate)
    save(first, 1)
    for step in (1, 2, 3):
        alone, _ = make_state(tmp_path, accumulate=accumulate)
        assert alone.restore() == step and alone.accumulate == then
        save(alone, step + 1)
    back, _ = make_state(tmp_path, ranks=ranks, accumulate=accumulate)
    assert back.restore() == 4 and back.accumulate == accumulate


def test_a_checkpoint_of_another_version_is_refused_in_one_line_and_stays(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", module.FORMAT - 1)
        save(make_state(tmp_path)[0], 1)
    state, said = make_state(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint \S+ has format \d+; this version reads \d+ .*remove it"):
        state.restore()
    assert said == [] and len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_what_belongs_together_is_the_data_and_the_log_up_to_its_position(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"one\ntwo\nthree\n")
    for step, lines in ((1, b"one\n"), (2, b"one\ntwo\n"), (3, b"one\nzwei\n")):
        first, _ = make_state(tmp_path, log=log, data="a", keep=3)
        save(first, step, log_position=len(lines), log_sha256=hashlib.sha256(lines).hexdigest())
    same, said = make_state(tmp_path, log=log, data="a")
    assert same.restore() == 2 and same.log_position == 8 and len(said) == 2
    assert "000000003-" in said[0] and f"{log} is missing, cut or changed; trying the one before" in said[0]
    other, said = make_state(tmp_path, log=log, data="b")
    assert other.restore() is None and other.log_position == 0
    assert [("is of other data" in line) for line in said] == [True, True, True, False]
    assert "without one a training starts over" in said[-1]


def test_a_first_start_says_nothing(tmp_path):
    state, said = make_state(tmp_path)
    assert state.restore() is None and said == []
