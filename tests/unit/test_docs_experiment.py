"""docs/experiment.md names every key of an experiment file, and its defaults are the true ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.data.recipes import RECIPES
from pipeline.experiment import Experiment, FinetuneSection, MethodEntry, PretrainSection
from pipeline.specs import Backbone, Dataset, ReportSettings, Resources

PAGE = (Path(__file__).parents[2] / "docs" / "experiment.md").read_text(encoding="utf-8")
SECTIONS = {
    "dataset": Dataset,
    "backbones": Backbone,
    "methods": MethodEntry,
    "pretrain": PretrainSection,
    "finetune": FinetuneSection,
    "report": ReportSettings,
    "resources": Resources,
}
SAID_OTHERWISE = {"name", "seeds", "minutes", "cpus_per_rank", "tasks_per_job", "protocols", "fit", "version"}


def rows(section: str) -> dict[str, str]:
    """The default of each key, as the page says it."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            _, keys, default, *_ = line.split("|")
            names = re.findall(r"`(\w+)`", keys)
            values = re.split(r", (?![^{\[]*[}\]])", default.strip())
            found |= dict(zip(names, values if len(values) == len(names) else [default.strip()] * len(names)))
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_row(section):
    assert set(rows(section)) == set(SECTIONS[section].model_fields)


@pytest.mark.parametrize("section", ["dataset", "pretrain", "finetune", "report", "resources"])
def test_defaults_are_true(section):
    compared = 0
    for name, said in rows(section).items():
        default = SECTIONS[section].model_fields[name].default
        if name in SAID_OTHERWISE or not isinstance(default, str | int | float | list) or default == "":
            continue
        shown = str(default).lower() if isinstance(default, bool) else str(default).replace("'", "")
        assert said.strip("`") == shown, name
        compared += 1
    assert compared > 3


def test_every_section_and_every_recipe_is_named():
    for name in [*Experiment.model_fields, *RECIPES]:
        assert f"`{name}" in PAGE or f"{name}:" in PAGE, name
