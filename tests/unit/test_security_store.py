"""A store of several people: nothing in it hangs a command, is written through, or reaches a terminal raw."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import inspection, view
from pipeline.errors import UserError, one_line, printable
from pipeline.files import make_folder_below, odd_entries, read_regular
from pipeline.lock import Held, lock
from pipeline.manifest import Damaged, Manifest, Receipt, Task, read_error
from pipeline.metrics import are_sound
from pipeline.progress import read_progress
from pipeline.report.predictions import read_prediction
from pipeline.specs import Resources
from pipeline.stages.work import Entry
from pipeline.states import TaskState

pytestmark = pytest.mark.timeout(20)  # what hangs fails
ESCAPE = "\x1b]0;pwned\x07\x1b[31m\u202e"


def task(stage: str, *needs: str) -> Task:
    return Task(f"{stage}/x", stage, {}, needs, "0" * 64, Resources().model_dump(mode="json"))


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    stages = ("shard", "pretrain", "finetune", "aggregate")
    made = Manifest({"name": "x"}, str(tmp_path / "store"), tuple(map(task, stages)), cluster="local")
    made.write(tmp_path / "runs" / "x" / "manifest.json")
    for one in made.tasks:
        made.folder(one).mkdir(parents=True)
    return made


def put(kind: str, path: Path) -> None:
    """Something other than a file in its place."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/etc/passwd")


def receipt(one: Task, **changes) -> Receipt:
    said = dict(metrics={}, files={}, started="", ended="", seconds=1.0, hosts=["h"], world_size=1)
    return Receipt(**{"key": one.key, "task": one.id, "stage": one.stage, **said, **changes})


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "link"])
@pytest.mark.parametrize("name", ["receipt.json", "error.json", "progress.json", ".lock"])
def test_what_is_no_file_in_the_place_of_one_neither_hangs_nor_breaks_a_command(
    manifest, tmp_path, kind, name, capsys
):
    for one in manifest.tasks:
        put(kind, manifest.folder(one) / name)
    runs = tmp_path / "runs" / "x"
    assert inspection.status(runs) == 0
    inspection.verify(runs)
    with lock(runs / "manifest.lock"):
        pass
    if name == ".lock":
        with pytest.raises(Held), lock(manifest.folder(manifest.tasks[0]) / name):
            pass


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_manifest_and_lock_that_are_no_files_are_one_line(manifest, tmp_path, kind):
    runs = tmp_path / "runs" / "x"
    (runs / "manifest.json").unlink()
    put(kind, runs / "manifest.json")
    with pytest.raises(UserError, match="cannot read the manifest"):
        Manifest.read(runs / "manifest.json")
    put(kind, runs / "manifest.lock")
    with pytest.raises(Held, match=r"or remove .*manifest\.lock if it is gone"), lock(runs / "manifest.lock"):
        pass


ODD = (5, "text", [5], {"a": []}, None, True)


@pytest.mark.parametrize(
    ("stage", "name", "fits"),
    [
        ("shard", "warnings", []),
        ("shard", "classes", []),
        ("shard", "samples", []),
        ("shard", "task", ["text"]),
        ("search", "ranking", []),
        ("pretrain", "warnings", []),
        ("pretrain", "collapsed", []),
        ("pretrain", "backbones", []),
        ("finetune", "num_labels", [5]),
        ("finetune", "test", [{"a": []}]),
        ("aggregate", "unfinished", []),
    ],
)
def test_receipt_with_odd_types_does_not_count_however_well_it_is_summed(tmp_path, stage, name, fits):
    one = task(stage)
    for value in ODD:
        receipt(one, metrics={name: value}).write(tmp_path)
        assert (Receipt.read(tmp_path, one.key) is not None) == (value in fits), value
    assert are_sound(stage, {"something_new": {"of": ["a", "later", "version"]}})


def test_receipt_of_another_stage_does_not_count(manifest):
    one = manifest.tasks[-1]
    receipt(one, stage="shard", metrics={"unfinished": 5}).write(manifest.folder(one))
    assert manifest.receipt(one) is None and manifest.damaged_receipt(one)


def test_what_files_say_reaches_the_terminal_without_control_characters(manifest, tmp_path, capsys):
    shard, pretrain, finetune, aggregate = manifest.tasks
    receipt(shard, metrics={"warnings": [ESCAPE], "classes": [ESCAPE]}).write(manifest.folder(shard))
    odd = {"message": ESCAPE, "kind": ESCAPE, "log": ESCAPE, "user_error": "yes", "traceback": 7}
    (manifest.folder(pretrain) / "error.json").write_text(json.dumps(odd))
    (manifest.folder(finetune) / "error.json").write_text(json.dumps({"message": ["no", "text"], "log": 5}))
    said = {"done": 1, "total": 2, "text": ESCAPE}
    (manifest.folder(aggregate) / "progress.json").write_text(json.dumps(said))
    log = tmp_path / "job.err"
    log.write_bytes(f"error: pretrain/x: {ESCAPE}\n{ESCAPE}\n".encode() + b"\x9b31m\xff\n")
    inspection.status(tmp_path / "runs" / "x")
    view.print_outcome(manifest, tmp_path / "runs" / "x", manifest.tasks, {"finetune/x": [log]})
    view.print_states(manifest, [TaskState(shard, "failed", ESCAPE, log=ESCAPE)])
    progress = read_progress(manifest.folder(aggregate))
    text = "".join(capsys.readouterr()) + str(progress) + one_line(ValueError(ESCAPE))
    assert "pwned" in text and not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_lock_of_an_odd_holder_is_one_line_without_control_characters(tmp_path):
    path = tmp_path / "held"
    for holder in (
        {"user": ESCAPE, "host": "elsewhere", "pid": "../../1"},
        {"pid": [1]},
        {"pid": 10**30},
        [],
    ):
        path.write_text(json.dumps(holder))
        with pytest.raises(Held) as caught, lock(path):
            pass
        assert printable(str(caught.value)) == str(caught.value)


def test_printable_leaves_letters_and_spaces_of_every_language():
    text = "naïve – Größe\u00a0µm 日本\u3000 हिन्दी\u200d 😀\n"
    assert printable(text) == text
    assert printable("a\tb\x1b\x7f\u2028") == "a\\tb\\x1b\\x7f\\u2028"


def test_folders_are_made_below_the_store_and_through_no_link(tmp_path):
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert make_folder_below(store, "shard/x") == store / "shard" / "x"
    (store / "pretrain").symlink_to(elsewhere)
    with pytest.raises(UserError, match="pretrain is a link"):
        make_folder_below(store, "pretrain/x")
    (store / "shard" / "y").symlink_to(elsewhere)
    with pytest.raises(UserError, match="y is a link"):
        make_folder_below(store, "shard/y")
    (store / "finetune").touch()
    with pytest.raises(UserError, match="finetune is a file"):
        make_folder_below(store, "finetune/x")
    assert not list(elsewhere.iterdir())
    linked = tmp_path / "linked"
    linked.symlink_to(store)  # the user's own
    assert make_folder_below(linked, "shard/z").is_dir()


def test_odd_entries_are_found_at_any_depth_and_no_link_is_followed(tmp_path):
    inside = tmp_path / "folder" / "deep"
    inside.mkdir(parents=True)
    (inside / "file").touch()
    for kind in ("pipe", "device", "loop", "link"):
        put(kind, inside / kind)
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    assert [path.name for path in odd_entries(tmp_path / "folder")] == [
        "device",
        "link",
        "loop",
        "pipe",
        "up",
    ]


def test_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "error.json").open("wb") as file:
        file.truncate(1 << 40)
    assert read_error(tmp_path) is None
    with pytest.raises(OSError, match="larger"):
        read_regular(tmp_path / "error.json")


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def npz(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, member in members.items():
            archive.writestr(f"{name}.npy", member)
    return content.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **options)
    return content.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


ROWS = npy(np.arange(2))
GOOD = {"targets": npy(np.zeros(2, int)), "rows": ROWS}


@pytest.mark.parametrize(
    "content",
    [
        b"no zip",
        npz(**GOOD),
        npz(**GOOD, probabilities=npy(np.zeros((3, 2)))),
        npz(**GOOD, probabilities=npy(np.zeros(2))),
        npz(**GOOD, probabilities=npy(np.array([["a"], ["b"]]))),
        npz(**GOOD, probabilities=header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}\n")),
        npz(
            **GOOD,
            probabilities=header("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 2)}\n"),
        ),
        npz(zipfile.ZIP_DEFLATED, **GOOD, probabilities=npy(np.zeros((2, 1 << 22)))),
    ],
    ids=["text", "lacking", "longer", "flat", "words", "objects", "huge", "bomb"],
)
def test_predictions_that_are_none_are_named_as_damaged(tmp_path, content):
    (tmp_path / "predictions.npz").write_bytes(content)
    files = {"predictions.npz": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    one = task("finetune")
    with pytest.raises(Damaged, match=r"no predictions as docs/formats\.md says"):
        read_prediction(Entry(one, tmp_path, receipt(one, files=files), None))


def test_pickled_predictions_are_not_run(tmp_path):
    trap = tmp_path / "trap"
    pickled = header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n") + pickle.dumps([Runs(trap)])
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = npz(method, **GOOD, probabilities=pickled)
        (tmp_path / "predictions.npz").write_bytes(content)
        files = {"predictions.npz": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
        one = task("finetune")
        with pytest.raises(Damaged):
            read_prediction(Entry(one, tmp_path, receipt(one, files=files), None))
    assert not trap.exists()
