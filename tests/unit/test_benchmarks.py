"""The benchmarks still run, on small sizes; nothing is timed here."""

from __future__ import annotations

import pytest
import torch

from benchmarks import (
    augment,
    checkpoints,
    end_to_end,
    grid,
    probes,
    reading,
    roofline,
    scaling,
    selfpatch,
    sharding,
    startup,
    steps,
    time_to_score,
)
from benchmarks.__main__ import main, names
from benchmarks.compute import compute
from benchmarks.figures import Figure
from benchmarks.pairs import in_turn, ratio
from benchmarks.pictures import write_folder
from benchmarks.time_to_score import Course


def test_checkpoints():
    figures = {figure.name: figure for figure in checkpoints.measure(checkpoints.SMALL, size=160)}
    assert figures["checkpoint: size"].value > 1 and figures["checkpoint: copy"].value > 0
    assert figures["checkpoint: share of the time"].unit == "%"


def test_scattering():
    pytest.importorskip("kymatio")
    from benchmarks.scattering import measure

    figures = measure(32, 1, 4, device=torch.device("cpu"), images=2, pairs=1)
    assert [figure.value > 0 for figure in figures] == [True] * 4 and figures[-1].value < 1


@pytest.mark.parametrize(
    ("name", "gmac"), [("scatnet8", 0.95), ("scatnet12", 2.8), ("scatnet16", 3.5), ("resnet18", 0.33)]
)
def test_multiply_adds_of_an_image_of_96_pixels(name, gmac):
    figures = {figure.name: figure.value for figure in compute(name, size=96)}
    assert float(f"{figures[f'{name}: 96 px']:.2g}") == gmac
    assert (f"{name}: 96 px, scattering" in figures) == name.startswith("scat")


def test_selfpatch():
    first, *ratios = selfpatch.measure(selfpatch.SMALL, batch=2, rounds=2)
    assert first.unit == "s" and [ratio.unit for ratio in ratios] == ["x", "x"]
    assert all(figure.value > 0 for figure in (first, *ratios))


def test_every_benchmark_is_listed_with_what_it_measures(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and text for name, text in names().items())
    assert {"scattering", "reading", "probes", "startup"} < set(names()) and "figures" not in names()
    assert main(["scaterring"]) == 2 and "did you mean 'scattering'?" in capsys.readouterr().err


def test_alternatives_run_in_turn_and_every_other_round_backwards():
    ran = []
    ticks = iter(range(100))
    alternatives = {"a": lambda: ran.append("a"), "b": lambda: (ran.append("b"), next(ticks))}
    seconds = in_turn(alternatives, 3, clock=lambda: float(next(ticks)))
    assert "".join(ran) == "abbaab" and seconds == {"a": [1, 1, 1], "b": [2, 2, 2]}
    assert ratio([2, 9, 4], [1, 3, 4]) == 2


@pytest.mark.parametrize(
    ("aim", "words"),
    [
        ({}, ""),
        ({"aim": 2}, "at most 2 s"),
        ({"aim": 1}, "at most 1 s: missed"),
        ({"at_least": 3}, "at least 3 s: missed"),
    ],
)
def test_a_figure_says_when_its_aim_is_missed(aim, words):
    assert Figure("a", 2, "s", **aim).aimed == words


def test_startup(tmp_path):
    figures = {figure.name: figure.value for figure in startup.measure(tmp_path, 1)}
    assert figures["startup: plan over bare"] > 1 < figures["startup: status over bare"]


def test_reading(tmp_path):
    folder = write_folder(tmp_path / "images", 24, width=96, height=64)
    figures = reading.measure("x", folder, tmp_path / "shards", size=32, workers=1, rounds=1)
    assert [figure.value > 0 for figure in figures] == [True] * 11


def test_probes():
    made = probes.make(300, 16, 100, val=100)
    figures = {figure.name: figure.value for figure in probes.measure(made, 1)}
    for name in probes.PROBES:
        ours, theirs = figures[f"{name}: accuracy"], figures[f"{name}: accuracy of scikit-learn"]
        assert ours == pytest.approx(theirs, abs=3) and ours > 20, "10 classes"


@pytest.mark.parametrize("recipe", augment.RECIPES)
def test_augment(recipe, monkeypatch):
    monkeypatch.setattr(augment, "BATCHES", 1)
    figures = augment.measure(recipe, size=32, batch=4, rounds=1, device=torch.device("cpu"))
    assert [figure.value > 0 for figure in figures] == [True] * 5


@pytest.mark.parametrize("name", steps.NETS)
def test_steps(name):
    pytest.importorskip("lightly")
    figures = steps.measure(
        name, small=True, size=64, batch=4, rounds=1, device=torch.device("cpu"), compiled=False
    )
    assert all(figure.value > 0 for figure in figures) and " over " in figures[-1].name


def test_the_model_of_communication():
    """Two ranks send as much as the gradients are, many twice that."""
    assert scaling.predict(1.0, 100.0, 100.0, ranks=2) == 0.5
    assert scaling.predict(1.0, 100.0, 100.0, ranks=200) == pytest.approx(1 / 2.99)
    assert scaling.predict(1.0, 100.0, 100.0, ranks=2, hidden=0.5) == pytest.approx(1 / 1.5)
    assert scaling.predict(1.0, 10.0, 100.0, ranks=2, hidden=0.5) == 1


def test_time_to_a_score_is_that_of_the_first_look_with_all_nets_there():
    course = Course([0.0, 1.0, 2.0, 3.0], {"cnn": [0.9, 0.4, 0.6, 0.7], "vit": [0.9, 0.6, 0.5, 0.6]})
    assert course.until({"cnn": 0.6, "vit": 0.6}) == 3 and course.until({"cnn": 0.4, "vit": 0.5}) == 1
    assert course.until({"cnn": 0.8, "vit": 0.0}) == float("inf")


def test_time_to_score(tmp_path):
    figures = {
        figure.name: figure.value
        for figure in time_to_score.measure("pbc", time_to_score.SMALL, ["cass_plus"], tmp_path, looks=2)
    }
    assert figures["time to score, pbc: dino, seed 0, cnn"] > 20, "10 classes"
    assert figures["time to score, pbc: cass_plus over dino, middle of the seeds"] > 0


def test_roofline():
    figures = roofline.measure(
        size=64, batch=2, rounds=1, device=torch.device("cpu"), compiled=False, small=True
    )
    assert all(figure.value > 0 for figure in figures)
    assert {figure.unit for figure in figures} == {"TFLOP/s", "GB/s", "ms", "%"}


def test_traffic_counts_what_an_operation_reads_and_writes_but_no_views():
    one = torch.ones(4, 6)
    with roofline.Traffic() as traffic:
        one.t() + 1.0
    assert traffic.bytes == 2 * 24 * 4


def test_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setitem(end_to_end.NETS["small"], "batch", 8)
    figures = end_to_end.measure("cass", "small", tmp_path, steps=2, rounds=1)
    assert [figure.value > 0 for figure in figures] == [True] * 3


def test_sharding(tmp_path):
    folder = write_folder(tmp_path / "images", 24, width=64, height=48)
    figures = sharding.measure(folder, tmp_path, rounds=1)
    assert [figure.value > 0 for figure in figures[:10]] == [True] * 10


@pytest.mark.slow
def test_grid(tmp_path):
    whole = grid.SMALL | {"finetune.protocols": "[knn]", "finetune.fractions": "[1.0]"}
    assert (grid.count(grid.WHOLE), grid.count(whole)) == (360, 4)
    packed, apart, _ = grid.measure(tmp_path, whole, whole | {"seeds": "[0]"}, together=4)
    assert 0 < packed.value < apart.value


@pytest.mark.slow
def test_scaling():
    figures = {
        figure.name.split(": ")[1]: figure.value
        for figure in scaling.measure("cass", "small", steps=1, rounds=1)
    }
    assert figures["step of one rank"] > 0 and figures["gradients"] > 10 and figures["efficiency"] > 0
