"""``launch evaluate``: kept models on another data set, with intervals (external validation)."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.errors import printable
from pipeline.evaluate.protocols import METRICS
from pipeline.files import write_atomically
from pipeline.inference.classifier import Classifier, device_of
from pipeline.inference.external_text import render
from pipeline.inference.kept import Kept, fitting, kept_models, winners
from pipeline.inference.other import OtherSource
from pipeline.inference.predict import answer_cells, answer_columns
from pipeline.inference.score import Scorer
from pipeline.inference.unseen import write_like
from pipeline.manifest import Manifest
from pipeline.printing import say
from pipeline.report.predictions import Classified, read_prediction
from pipeline.report.statistics import FEW_GROUPS, FEWEST_GROUPS
from pipeline.report.tables import write_csv
from pipeline.specs import AggregateSpec, Dataset, ReportSettings
from pipeline.stages.shard import source_of
from pipeline.stages.work import Entry
from shards import Index
from shards.index import REJECTED

MODEL = ["dataset", "method", "backbone", "arch", "protocol", "fraction", "seed"]
SCORE = ["metric", "class", "threshold", "value", "low", "high", "groups", "images", "test"]
OWN = {
    "resize",
    "intensity",
    "splits",
    "seed",
    "duplicates",
    "near_duplicates",
    "unlabelled",
    "shard_samples",
}


@dataclass(frozen=True)
class _Tried:
    """The other data set as one training's models see it."""

    index: Index
    source: OtherSource
    scorer: Scorer


def evaluate(
    runs: Path, dataset: Dataset, *, wanted: str = "", out: Path | None = None, device: str = "auto"
) -> int:
    """Try the kept models of an experiment on another data set and write tables of it.

    Args:
        runs: the experiment's folder, with its manifest.
        dataset: the other data set; its images are stored and decoded as those of the training were.
        wanted: which models; see :func:`pipeline.inference.kept.fitting`.
        out: the folder for the tables; None: ``evaluate/NAME`` in ``runs``.
        device: see :class:`pipeline.inference.classifier.Classifier`.

    Returns:
        The exit code.

    Raises:
        UserError: no such model or device, or a damaged model.
        shards.InputError: whatever is wrong with the data set, or classes that the models do not know.
    """
    manifest = Manifest.read(runs / "manifest.json")
    models = winners(fitting(kept_models(manifest), wanted))
    device_of(device)
    settings = _report_settings(manifest)
    out = out or runs / "evaluate" / dataset.name
    by_shard: dict[str, list[Kept]] = {}
    for model in models:
        shard = next(need for need in model.task.needs if manifest.task(need).stage == "shard")
        by_shard.setdefault(shard, []).append(model)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    ignored = ", ".join(sorted(OWN & dataset.model_fields_set))
    notes = [f"without effect here, as the models have their own: {ignored}"] if ignored else []
    for shard, some in by_shard.items():
        with tempfile.TemporaryDirectory(prefix=".images-", dir=out) as folder:
            where = "predictions.csv" if len(by_shard) == 1 else f"predictions-{shard.partition('/')[2]}.csv"
            rows += _try(manifest, some, dataset, Path(folder), out / where, settings, device, notes)
    table = pd.DataFrame(rows, columns=[*MODEL, *SCORE])
    table["threshold"] = table["threshold"].astype("float64")
    write_csv(table, out / "external.csv")
    metric = settings.metric if settings.metric in set(table["metric"]) else METRICS[0]
    title = f"{dataset.name}: models of {runs.name} on another data set"
    text = render(
        title, table, metric=metric, confidence=settings.confidence, notes=list(dict.fromkeys(notes))
    )
    write_atomically(out / "external.md", printable(text).encode())
    say(text.partition("\n\n")[2].rstrip())
    say(f"\n{len(models)} models on {dataset.name}: {out / 'external.csv'}, external.md and predictions")
    return 0


def _try(
    manifest: Manifest,
    models: Sequence[Kept],
    dataset: Dataset,
    folder: Path,
    predictions: Path,
    settings: ReportSettings,
    device: str,
    notes: list[str],
) -> list[dict[str, Any]]:
    """Rows of external.csv for the models of one training's data set."""
    tried: _Tried | None = None
    rows: list[dict[str, Any]] = []
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    for model in models:
        classifier = Classifier(manifest, model, device=device)
        if tried is None:
            tried = _store(dataset, classifier, folder, settings, notes)
            _keep_rejected(folder, predictions.parent)
            above = ["above_threshold"] if any("above" in name for name in answer_columns(classifier)) else []
            scores = [f"score_{name}" for name in classifier.classes]
            lines.writerow([*MODEL, "path", "group", "label", "predicted", *above, *scores])
        index = tried.index
        probabilities = classifier.probabilities(index, np.arange(len(index)))
        known = [classifier.classes.index(name) for name in tried.source.scored]
        columns = known if classifier.multilabel else list(range(len(classifier.classes)))
        thresholds = [classifier.thresholds[k] for k in columns] if classifier.thresholds else []
        found = list(tried.scorer.scores(probabilities[:, columns], thresholds))
        inside = _internal(model, columns, thresholds, classifier.classes)
        rows += [
            _identity(model)
            | {"metric": score.metric, "class": score.of, "threshold": score.threshold}
            | {"value": score.value, "low": score.low, "high": score.high}
            | {"groups": score.groups, "images": score.images, "test": inside[score.metric, score.of]}
            for score in found
        ]
        mine = list(_identity(model).values())
        samples = index.samples
        for place in np.argsort(samples["path"].to_numpy(object)).tolist():
            said = [samples[name].iat[place] for name in ("path", "group", "labels")]
            lines.writerow([*mine, *map(_cell, said), *answer_cells(probabilities[place], classifier)])
    write_atomically(predictions, written.getvalue().encode())
    return rows


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _store(
    dataset: Dataset, classifier: Classifier, folder: Path, settings: ReportSettings, notes: list[str]
) -> _Tried:
    """Write the other data set as a training's was written, and say what the user should know of it."""
    like = classifier.index
    source = OtherSource(source_of(dataset), dataset.name, like, dataset.exclude)
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    index = write_like(source, folder, like, max_rejected=dataset.max_rejected, processes=processes)
    notes.append(f"{dataset.name}: {source.taken}")
    notes += [*source.notes, *_rejected(folder), *_common(index, like), *_greys(index, like)]
    groups = index.samples["group"].fillna("").to_numpy(object)
    columns = [like.classes.index(name) for name in source.scored]
    targets = index.targets(np.arange(len(index)))
    scorer = Scorer(
        targets[:, columns].astype(np.int64) if like.task == "multilabel" else targets,
        list(groups) if groups.any() else None,
        classes=source.scored if like.task == "multilabel" else like.classes,
        settings=settings,
    )
    if scorer.units < FEWEST_GROUPS:
        notes.append(f"{scorer.units} groups or images are too few for intervals (from {FEWEST_GROUPS} on)")
    elif scorer.units < FEW_GROUPS:
        notes.append(f"the intervals rest on {scorer.units} groups or images only")
    return _Tried(index, source, scorer)


def _rejected(folder: Path) -> Iterator[str]:
    with (folder / REJECTED).open(encoding="utf-8", newline="") as file:
        rejected = list(csv.DictReader(file))
    if rejected:
        first = f"{rejected[0]['path']}: {rejected[0]['reason']}"
        yield f"{len(rejected)} images could not be read and count nowhere (rejected.csv), such as {first}"


def _keep_rejected(folder: Path, out: Path) -> None:
    """Put the list of unreadable images beside the tables; that of an earlier run goes."""
    content = (folder / REJECTED).read_bytes()
    if content.count(b"\n") > 1:
        write_atomically(out / REJECTED, content)
    else:
        (out / REJECTED).unlink(missing_ok=True)


def _common(index: Index, like: Index) -> Iterator[str]:
    """Images that the models were trained or chosen on, by their pixels."""
    learned = like.samples[like.samples["split"] != "test"]
    shared = index.samples["pixel_hash"].isin(set(learned["pixel_hash"])).to_numpy()
    if shared.any():
        yield (
            f"{int(shared.sum())} images are those of the training's train and val split, such as"
            f" {index.samples['path'][shared].iloc[0]}: scores on them promise too much"
        )


def _greys(index: Index, like: Index) -> Iterator[str]:
    new = sorted(set(index.meta["intensity"]) - set(like.meta["intensity"]))
    if new:
        yield (
            f"images of more than 8 bits a channel ({', '.join(new)}), which the training had none of: black"
            " and white are found in this data set"
        )


def _internal(
    model: Kept, columns: Sequence[int], thresholds: Sequence[float], classes: Sequence[str]
) -> dict[tuple[str, str], float]:
    """What the same model has on its own test split, by metric and class; NaN where that does not exist."""
    stored = read_prediction(Entry(model.task, model.folder, model.receipt, None))
    assert isinstance(stored, Classified)
    test = model.receipt.metrics["test"]
    several = stored.targets.ndim == 2
    targets = stored.targets[:, columns].astype(np.int64) if several else stored.targets
    scorer = Scorer(
        targets,
        None,
        classes=[classes[k] for k in columns],
        settings=ReportSettings(bootstrap=10),
    )
    found: dict[tuple[str, str], float] = {
        (score.metric, score.of): score.value
        for score in scorer.scores(stored.probabilities[:, columns], thresholds)
    }
    if len(columns) == len(classes):  # of some labels alone the receipt says nothing
        found |= {(name, ""): float(test.get(name, math.nan)) for name, of in found if not of}
    return found


def _identity(model: Kept) -> dict[str, Any]:
    spec = model.spec
    values = (
        spec.dataset,
        spec.label,
        spec.backbone.name,
        spec.arch,
        spec.protocol,
        spec.fraction,
        spec.seed,
    )
    return dict(zip(MODEL, values, strict=True))


def _report_settings(manifest: Manifest) -> ReportSettings:
    """Those of the experiment's tables."""
    for task in manifest.tasks:
        if task.stage == "aggregate":
            return AggregateSpec.model_validate(task.spec).report
    return ReportSettings()
