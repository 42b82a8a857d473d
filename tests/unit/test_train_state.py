"""A training's state comes back from its newest checkpoint that is whole and belongs to its log and data."""

import pytest
import torch
from torch import nn

from pipeline.methods.base import Method
from pipeline.specs import Training
from pipeline.train.averaging import Averaging
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
    state.save(step, log_position=more.pop("log_position", 0), seconds=0.0, **more)
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
