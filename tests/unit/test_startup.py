"""What a command imports before it answers: what it needs, so that a login node answers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import slurm

CHECKED = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
PLANNED = CHECKED | {"yaml"}
LAUNCHING = {"pipeline.campaign", "pipeline.live", "pipeline.lock", "pipeline.preflight"}
CLUSTER = {"slurm.job", "slurm.local", "slurm.profiles", "slurm.states", "slurm.submission"}
STAGE = {"pipeline.stages.runner", "pipeline.stages.work", "shards"}
PLANNING = {"pipeline.experiment", "pipeline.plan", "pipeline.specs", "pipeline.strict_yaml"}

RUN = """
import json, sys
before = set(sys.modules)
from pipeline import launch
try:
    launch.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
new = {name: module for name, module in sys.modules.items() if name not in before}
files = {name: getattr(module, "__file__", None) or "" for name, module in new.items()}
installed = {name.split(".")[0].removeprefix("_") for name, file in files.items() if "site-packages" in file}
ours = [name for name in new if name.split(".")[0] in ("pipeline", "shards", "slurm")]
print(json.dumps([sorted(installed), ours]), file=sys.stderr)
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    quiet = {name: said for name, said in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=quiet)
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The options of an experiment that has a manifest."""
    from pipeline.experiment_file import load_experiment
    from pipeline.preview import planned

    folder = tmp_path_factory.mktemp("launched")
    planned(load_experiment("quickstart"), folder / "store").write(folder / "runs/quickstart/manifest.json")
    return ["--store", str(folder / "store"), "--runs", str(folder / "runs")]


@pytest.mark.parametrize(
    ("command", "packages", "not_ours"),
    [
        (["--help"], set(), {"pipeline.manifest"} | PLANNING | LAUNCHING | CLUSTER | STAGE),
        (["status"], CHECKED, PLANNING | LAUNCHING - {"pipeline.lock"} | CLUSTER | STAGE),
        (["plan"], PLANNED, LAUNCHING | CLUSTER | STAGE),
        (["plan", "--json"], PLANNED, LAUNCHING | CLUSTER | STAGE),
    ],
    ids=["help", "status", "plan", "plan as JSON"],
)
def test_a_command_imports_what_it_needs_and_no_more(launched, command, packages, not_ours):
    installed, ours = json.loads(run(RUN, *command, *launched).stderr.splitlines()[-1])
    assert set(installed) <= packages
    assert not_ours.isdisjoint(ours)


def test_no_plugins_of_pydantic_are_looked_for(launched):
    """To look through all that is installed takes longer than to check an experiment."""
    looked = "import importlib.metadata\nimportlib.metadata.entry_points = lambda **_: 1 / 0\n"
    assert "to run in" in run(looked + RUN, "plan", *launched).stdout


def test_what_is_left_at_the_end_is_not_looked_through():
    code = """
from pipeline.garbage import look_for_garbage_rarely
class Left:
    def __init__(self): self.itself = self
    def __del__(self): print("found")
Left()
"""
    assert run(code).stdout == "found\n"
    assert run(code + "look_for_garbage_rarely()").stdout == ""


def test_every_name_of_the_cluster_package_is_there_and_none_is_heavy():
    for name in slurm.__all__:
        assert getattr(slurm, name).__name__ == name
    code = (
        "import sys, slurm; [getattr(slurm, name) for name in slurm.__all__];"
        " print([name for name in ('torch', 'submitit', 'numpy') if name in sys.modules])"
    )
    assert run(code).stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="'slurm' has no attribute 'nothing'"):
        slurm.nothing  # noqa: B018
