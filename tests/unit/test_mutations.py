"""The list of mutations fits the code: each finds its text once, and its test exists."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("mutations", ROOT / "tests" / "mutations.py")
assert spec is not None and spec.loader is not None
mutations = importlib.util.module_from_spec(spec)
sys.modules["mutations"] = mutations
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_can_be_made_and_its_test_exists(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.before) == 1
    file, _, test = mutation.test.partition("::")
    name = re.sub(r"\[.*", "", test)
    assert not name or f"def {name}(" in (ROOT / file).read_text()
