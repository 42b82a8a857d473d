"""Nothing in the store or in a user's file is run: which calls the code may not hold, what such files do."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone
from pipeline.train.checkpoint import load_checkpoint
from slurm import SlurmError, load_profile

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "shards", "slurm")
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "torch.hub.load", "torch.jit.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load"),
    "yaml.unsafe_load_all",
}
UNSAFE_LOADERS = {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader"}


def offences(source: str, name: str) -> Iterator[str]:
    """Each place of a source text that could run what a file holds, as ``name:line: what``."""
    tree = ast.parse(source)
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                shown = alias.asname or alias.name.split(".")[0]
                full_names[shown] = alias.name if alias.asname else shown
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full_names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def full_name(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return full_names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        for found in _offences_of(node, full_name):
            yield f"{name}:{node.lineno}: {found}"  # type: ignore[attr-defined]


def _offences_of(node: ast.AST, full_name) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
        yield str(node.module)
    elif isinstance(node, (ast.Attribute, ast.Name)) and full_name(node) in UNSAFE_LOADERS:
        yield full_name(node)
    elif isinstance(node, ast.Call):
        called = full_name(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in FORBIDDEN or called.endswith((".read_pickle", ".to_pickle")):
            yield called
        if called == "torch.load" and not _is(given.get("weights_only"), True):
            yield "torch.load without weights_only=True"
        for keyword in ("shell", "allow_pickle"):
            if keyword in given and not _is(given[keyword], False):
                yield f"{called}({keyword}=…)"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_runs_what_a_file_holds():
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 80
    found = [line for f in files for line in offences(f.read_text(), str(f.relative_to(ROOT)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "import joblib.numpy_pickle",
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "from os import system as run\nrun('ls')",
        "import subprocess as s\ns.run('ls', shell=True)",
        "import subprocess\nsubprocess.Popen(text, shell=needed)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import yaml\nyaml.compose(text, Loader=yaml.Loader)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load as read\nread(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(path)",
        "table.to_pickle(path)",
    ],
)
def test_each_such_call_would_be_named(source):
    assert list(offences(source, "x.py")), source


@pytest.mark.parametrize(
    "source",
    [
        "net.eval()",
        "import yaml\nyaml.safe_load(text)\nyaml.compose(text, Loader=yaml.SafeLoader)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
    ],
)
def test_what_is_safe_is_left_alone(source):
    assert not list(offences(source, "x.py"))


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    """A folder that a bomb makes; it must never be there."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a file's content was run"


def test_bomb_goes_off_where_pickle_loads_it(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").is_dir()


def test_weights_that_hold_code_are_refused(tmp_path, canary):
    weights = tmp_path / "weights.pth"
    torch.save({"model": Bomb(canary)}, weights)
    with pytest.raises(UserError, match="cannot be read as tensors"):
        create_backbone(Backbone(name="test_resnet", weights=str(weights)), 32, seed=0)


def test_checkpoint_that_holds_code_is_not_loaded(tmp_path, canary):
    torch.save({"step": Bomb(canary)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "state.pt")


def test_yaml_that_makes_objects_is_refused(tmp_path, canary):
    text = f"name: !!python/object/apply:os.mkdir [{json.dumps(str(canary))}]\n"
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="not valid YAML"):
        load_experiment(str(path))
    with pytest.raises(UserError, match="not valid YAML"):
        load_experiment("quickstart", [f"name={text.partition(': ')[2]}"])
    with pytest.raises(SlurmError, match="no YAML"):
        load_profile(path)
