"""``launch predict``: a kept model's answer for images, as a table."""

from __future__ import annotations

import csv
import io
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.evaluate.metrics import THRESHOLD
from pipeline.files import write_atomically
from pipeline.inference.classifier import Classifier
from pipeline.inference.kept import Kept, choose, kept_models
from pipeline.inference.unseen import ImagesSource, find_images, write_like
from pipeline.manifest import Manifest
from pipeline.printing import say
from pipeline.specs import ShardSpec
from shards.index import REJECTED
from shards.sources import SEPARATOR


def predict(
    runs: Path, *, images: Path, wanted: str = "", out: Path | None = None, device: str = "auto"
) -> int:
    """Predict every image below a folder, or of a table, with one model of an experiment.

    Args:
        runs: the experiment's folder, with its manifest.
        images: a folder, a file, or a table with a column of paths.
        wanted: which model; see :func:`pipeline.inference.kept.choose`.
        out: the table to write; None: standard output.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``; see :class:`Classifier`.

    Returns:
        The exit code: 1 where an image could not be read. Its row has no scores, and says why.

    Raises:
        UserError: no such images or model, or a damaged one.
        shards.InputError: none of the images can be read.
    """
    manifest = Manifest.read(runs / "manifest.json")
    model = choose(kept_models(manifest), wanted)
    files = find_images(images, path_column=_path_column(manifest, model))
    classifier = Classifier(manifest, model, device=device)
    metric = model.spec.settings.select_by
    say(f"model: {model.task.id} (validation {metric} {model.score:.3f})", stderr=True)
    with tempfile.TemporaryDirectory(prefix="predict-") as folder:
        index = write_like(ImagesSource(files, classifier.index), Path(folder), classifier.index)
        probabilities = classifier.probabilities(index, np.arange(len(index)))
        answers = dict(zip(index.samples["path"], probabilities, strict=True))
        rejected = _rejected(Path(folder) / REJECTED)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows(_table(list(files), answers, rejected, classifier))
    if out is None:
        sys.stdout.write(text.getvalue())
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text.getvalue().encode())
        say(f"{len(answers)} images predicted: {out}", stderr=True)
    if rejected:
        first = next(iter(rejected.items()))
        said = f"{len(rejected)} of {len(files)} images could not be read, such as {': '.join(first)}"
        say(f"warning: {said}", stderr=True)
    return int(bool(rejected))


def _path_column(manifest: Manifest, model: Kept) -> str:
    shard = next(task for task in map(manifest.task, model.task.needs) if task.stage == "shard")
    return ShardSpec.model_validate(shard.spec).dataset.path_column


def _rejected(path: Path) -> dict[str, str]:
    """Images that could not be read, with the reason."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def _table(
    names: Sequence[str],
    answers: Mapping[str, np.ndarray],
    rejected: Mapping[str, str],
    classifier: Classifier,
) -> Iterator[list[str]]:
    """The lines of the table, docs/predict.md."""
    header = answer_columns(classifier)
    yield ["path", *header, "error"]
    for name in names:
        if name in answers:
            yield [name, *answer_cells(answers[name], classifier), ""]
        else:
            yield [name, *("" for _ in header), rejected[name]]


def answer_columns(classifier: Classifier) -> list[str]:
    """The columns of a model's answer for an image."""
    above = ["above_threshold"] if classifier.thresholds else []
    return ["predicted", *above, *(f"score_{name}" for name in classifier.classes)]


def answer_cells(scores: np.ndarray, classifier: Classifier) -> list[str]:
    """The cells of :func:`answer_columns`. Scores are written so that they read back to the same bits.

    Args:
        scores: float32 (K,).
    """
    classes, thresholds = classifier.classes, classifier.thresholds
    if classifier.multilabel:
        predicted = SEPARATOR.join(one for one, score in zip(classes, scores) if score > THRESHOLD)
    else:
        predicted = classes[int(scores.argmax())]
    reached = [SEPARATOR.join(n for n, s, least in zip(classes, scores, thresholds) if s > least)]
    return [predicted, *(reached if thresholds else []), *(str(score) for score in scores)]
