"""On a GPU: what a training there must not do."""

import pytest
import torch
from pretrain_cases import OPTIONS, make_loop, settings, write_shards

from pipeline.train import boundary
from pipeline.train import loop as trainloop
from pipeline.train.distributed import World
from pipeline.train.logs import read_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ONE_NET = {"dino", "selfpatch", "ibot", "hssl", "simclr", "byol", "scatsimclr"}
ARCHS = {"scatsimclr": ("cnn",), "simclr": ("cnn",), "byol": ("cnn",)}
UNTRAINED = {"bn_refresh", "supervised"}
SETTLED = 2  # steps after which buffers and kernels are there


@pytest.mark.parametrize(
    ("method", "cache"), [("cass", "ram"), *((name, "gpu") for name in OPTIONS if name not in UNTRAINED)]
)
def test_no_step_waits_for_the_gpu(method, cache, tmp_path, monkeypatch):
    archs = ARCHS.get(method, ("vit",)) if method in ONE_NET else ("cnn", "vit")
    training = settings(epochs=3, checkpoint_steps=None, checkpoint_seconds=3600)
    world = World(device=torch.device("cuda", 0))
    shards = write_shards(tmp_path)
    loop = make_loop(
        method, shards, tmp_path / "run", training=training, world=world, archs=archs, cache=cache
    )
    take, finish, taken, ages = loop.stepper.take, loop._finish, [], []

    class Watched(boundary.Fetched):
        """How many steps have been taken since a value was sent home when it is waited for."""

        def __init__(self, values):
            self.sent = len(taken)
            super().__init__(values)

        def read(self):
            ages.append(len(taken) - self.sent)
            return super().read()

    monkeypatch.setattr(boundary, "Fetched", Watched)
    monkeypatch.setattr(trainloop, "Fetched", Watched)

    def watched(batches, now):
        if now.step == SETTLED:
            torch.cuda.set_sync_debug_mode("error")
        taken.append(now.step)
        return take(batches, now)

    def finished():
        assert ages and min(ages[:-1]) >= 1, "but the very last flags, which are settled"
        torch.cuda.set_sync_debug_mode("default")
        return finish()

    loop.stepper.take, loop._finish = watched, finished
    try:
        loop.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(taken) > SETTLED + 3


@pytest.mark.parametrize("method", ["cass_plus", "dino"])
def test_graphs_train_as_without_them(method, tmp_path):
    shards, losses = write_shards(tmp_path), {}
    for way in (False, "graphs"):
        archs = ("vit",) if method in ONE_NET else ("cnn", "vit")
        training = settings(epochs=3, precision="fp32", compile=way)
        folder, world = tmp_path / str(way), World(device=torch.device("cuda", 0))
        loop = make_loop(method, shards, folder, training=training, world=world, archs=archs, cache="gpu")
        loop.log_every = 1
        assert loop.stepper.graphs == (way == "graphs")
        torch._dynamo.utils.counters.clear()
        loop.run()
        assert bool(torch._dynamo.utils.counters["inductor"]) == (way == "graphs")
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        losses[way] = torch.tensor([line["loss"] for line in read_log(folder, "step")])
    assert len(losses[False]) >= 8
    torch.testing.assert_close(losses["graphs"], losses[False], rtol=2e-3, atol=2e-3)
