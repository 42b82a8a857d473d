"""Any input is taken, or refused with one line that names it: no other error, no hang, no write elsewhere."""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import CsvSource, InputError, ShardOptions, verify, write

SECONDS = 10  # longer than any input may take
EXAMPLES = {"manifest": 150, "index": 150, "samples": 100, "masked_samples": 60, "tar": 100}
EXAMPLES_OF_OTHERS = 200
MANY = 3  # times as many in the slow run; more: with atheris

# What has broken readers of such files elsewhere, or here.
# fmt: off
SNIPPETS = [
    "&a ", "*a", "<<: *a", "? ", "- ", ": ", "{", "}", "[", "]", "'", '"', "|", ">", "\t", "%YAML 9.9\n",
    "!!int ", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set ", "!!omap ", "---\n",
    "!!python/name:os.system ", ".inf", ".nan", "-1", "0", "1e999", "0x" + "f" * 5000, "9" * 5000,
    "2024-99-99", "1" + ":59" * 500, "~", "null", "\x00", "\x1b[31m", "\r", "\n", "\u2028", "\ufeff",
    "\\uD800", "é" * 200, "../" * 20, "/etc/passwd", "~nobody1/x", '""', ",,,,", ";", "x" * 300, "true",
    "[" * 500, "{a: " * 200, '{"a":' * 2000, "NaN", "Infinity", "1" * 400, "a: &a {b: *a}",
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b]\n",
]
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "a", "a\nb", "a\0b", "../../x", "/etc/passwd", "~nobody1/x", "\x1b[31m", "x" * 300, "$(id)", "1",
    "train", [], {}, [[]], ["a", "a"], [None], {"a": None}, {"": 1}, {"name": "x"}, [0.5, 0.5], [{}],
    {"a": {1: 2, "b": 3}},
]
# fmt: on


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Nothing beside ``folder`` is written, and the time is limited."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    def beside() -> set[str]:
        return set(os.listdir(folder.parent)) | set(os.listdir())

    before = beside()
    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert beside() == before


@st.composite
def edited_text(draw: Callable, text: str) -> bytes:
    """A sound text after a few cuts, copies and insertions."""
    for _ in range(draw(st.integers(1, 3))):
        begin, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        kind = draw(st.sampled_from(["insert", "insert", "value", "line", "cut", "copy", "any"]))
        if kind == "cut":
            text = text[:begin] + text[end:]
        elif kind == "copy":
            text = text[:end] + text[begin:]
        elif kind == "insert":
            text = text[:begin] + draw(st.sampled_from(SNIPPETS)) + text[begin:]
        elif kind == "value":  # in place of a word, where a value is most likely
            after = text.find(" ", begin) + 1
            text = (
                text[:after]
                + draw(st.sampled_from(SNIPPETS))
                + text[after:].lstrip("abcdefghijklmnopqrstuvwxyz0123456789_.")
            )
        elif kind == "line":
            after = text.find("\n", begin) + 1
            text = text[:after] + draw(st.sampled_from(SNIPPETS)) + "\n" + text[after:]
        else:
            text = text[:begin] + draw(st.text(max_size=8)) + text[end:]
    return text.encode("utf-8", "surrogatepass")


@st.composite
def edited_bytes(draw: Callable, data: bytes) -> bytes:
    """A sound file after a few changed, lost or doubled bytes."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "change", "cut", "shorten", "double"]))
        if kind == "change":
            data = data[:begin] + draw(st.binary(min_size=1, max_size=4)) + data[begin + 4 :]
        elif kind == "cut":
            data = data[:begin] + data[begin + draw(st.integers(1, 600)) :]
        elif kind == "shorten":
            data = data[:begin]
        else:
            data = data[:begin] + data[max(0, begin - 512) :]
    return data


@st.composite
def edited_tree(draw: Callable, tree: Any) -> Any:
    """Mappings and lists with a few values replaced, keys renamed, lost or added, anywhere within."""
    tree = copy.deepcopy(tree)
    values = st.sampled_from(VALUES).map(copy.deepcopy) | st.text(max_size=5) | st.integers() | st.floats()
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "lose", "rename", "add", "wrap"]))
        if kind == "replace":
            holder[key] = draw(values)
        elif kind == "lose":
            del holder[key]
        elif kind == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}, [holder[key]] * 2]))
        elif isinstance(holder, dict):
            name = draw(st.sampled_from([str(key)[:-1], f"{key}s", "", "a\nb", "../x", 1, None, True]))
            holder[name] = holder.pop(key) if kind == "rename" else draw(values)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries):
        yield tree, key
        yield from _places(value)


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False).encode()


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Bytes for a target: any at all, or a sound input with damage of the kind its format allows."""
    sound = TARGETS[name].sound()
    if name in ("tar", "image", "mask"):
        return edited_bytes(sound) | st.binary(max_size=600)
    text = edited_text(sound.decode())
    if name in ("experiment", "profile"):
        return st.one_of(edited_tree(yaml.safe_load(sound)).map(as_yaml), text, st.binary(max_size=100))
    if name in ("index", "manifest", "receipt", "leftovers", "coco", "stored_boxes"):
        return st.one_of(edited_tree(json.loads(sound)).map(as_json), text, st.binary(max_size=100))
    if name == "setting":
        keys = st.sampled_from(
            ["seeds", "methods", "pretrain.epochs", "dataset.root", "a.b", "", "backbones.cnn", "."]
        )
        pairs = st.tuples(keys, st.sampled_from(SNIPPETS) | st.text(max_size=20)).map("=".join)
        return pairs.map(lambda text: text.encode("utf-8", "surrogatepass")) | text
    return text | st.binary(max_size=100)


def holds(name: str, folder: Path, examples: int) -> Callable[[], None]:
    """The property of a target, as a test of so many inputs, the same ones each time."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(name))
    def run(data: bytes) -> None:
        with watched(folder / "own"):
            TARGETS[name].run(folder / "own", data)

    (folder / "own").mkdir()
    return run


@pytest.mark.parametrize("name", TARGETS)
def test_sound_input_is_taken(name, tmp_path, monkeypatch):
    """Else the property below would hold for a reader that refuses everything."""
    monkeypatch.setattr("fuzz_targets.refusal", lambda *names: nullcontext())
    TARGETS[name].run(tmp_path, TARGETS[name].sound())


@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_is_refused_in_one_line(name, tmp_path):
    holds(name, tmp_path, EXAMPLES.get(name, EXAMPLES_OF_OTHERS))()


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_at_length(name, tmp_path):
    holds(name, tmp_path, MANY * EXAMPLES.get(name, EXAMPLES_OF_OTHERS))()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number in range(16):
        Image.new("RGB", (4, 4), (16 * number, 0, 9)).save(root / f"{number}.png")
    return root


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(labels=st.lists(st.text(max_size=6), min_size=2, max_size=2), group=st.text(max_size=6))
def test_any_text_in_a_csv_is_read_back_from_the_dataset(pictures, labels, group):
    """Or refused: nothing that is written is read as something else."""
    with open(pictures / "labels.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        rows.writerow(["path", "label", "group"])
        rows.writerows([f"{number}.png", labels[number % 2], f"{group}{number}"] for number in range(16))
    with watched(pictures), tempfile.TemporaryDirectory(dir=pictures) as out:
        try:
            index = write(CsvSource(pictures, group_column="group"), Path(out, "dataset"), ShardOptions())
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) <= 2000
            return
        found = dict(zip(index.samples["path"], index.samples["labels"]))
        groups = dict(zip(index.samples["path"], index.samples["group"]))
        assert found == {f"{number}.png": labels[number % 2].strip() for number in range(16)}
        assert groups == {f"{number}.png": f"{group}{number}".strip() for number in range(16)}
        assert verify(index.folder) == []
