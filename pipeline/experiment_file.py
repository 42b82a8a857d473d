"""The experiment file: read and checked. Every error names the key and, where there is one, the line.

Imports no torch, so that ``plan``, ``show`` and ``--help`` answer at once on a login node.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources as package_files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.batches import check_batch
from pipeline.errors import UserError, UserErrors, nearest, raise_all
from pipeline.evaluate.protocols import ALL_METRICS, PROTOCOLS, check_metric
from pipeline.experiment import Experiment, Json
from pipeline.methods.registry import METHODS, OptionError, searched_option
from pipeline.specs import Dataset, Training
from pipeline.strict_yaml import read_yaml

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")  # in a name


def ready_experiments() -> dict[str, Path]:
    """The experiment files that come with the package, by name."""
    folder = package_files.files("pipeline.experiments")
    return {Path(str(file)).stem: Path(str(file)) for file in folder.iterdir() if file.name.endswith(".yaml")}


def load_experiment(name: str, settings: Sequence[str] = ()) -> Experiment:
    """Read an experiment by the name of a ready one or by the path of a file.

    Args:
        name: ``quickstart``, or ``my/experiment.yaml``.
        settings: ``dotted.key=value`` strings that override the file; values are YAML.

    Raises:
        UserError: anything wrong, with file, line, key and what was expected.
    """
    path = _find(name)
    given, origin = _read(path, expected="an experiment (keys such as name, dataset, methods)")
    given.setdefault("name", path.stem)
    for setting in settings:
        origin.overridden.append(_apply(given, setting))
    return _validate(given, origin)


def load_dataset(name: str) -> Dataset:
    """Read a data set alone: a file with its keys, or with them below ``dataset``, or a whole experiment.

    Args:
        name: the file, or a ready experiment.

    Returns:
        The data set, named: by its own name, the experiment's, or the file's.

    Raises:
        UserError: anything wrong, with file, line, key and what was expected.
    """
    path = _find(name)
    given, origin = _read(path, expected="a data set (keys such as source, root)")
    if given.keys() & {"methods", "backbones", "datasets"}:
        found = load_experiment(name).all_datasets
        if len(found) > 1:
            names = ", ".join(one.name for one in found)
            raise origin.error(("datasets",), f"expected one data set, found {names}: put one into a file")
        return found[0]
    where: tuple[str, ...] = ()
    if "dataset" in given:
        where = ("dataset",)
        others = [key for key in given if key not in ("dataset", "name")]
        raise_all(
            [origin.error((key,), "unknown key beside dataset (known here: dataset, name)") for key in others]
        )
        given = given["dataset"]
        if not isinstance(given, dict):
            raise origin.error(where, f"expected keys such as source, root, found {given!r}")
    try:
        dataset = Dataset.model_validate(given)
    except ValidationError as error:
        raise_all(_errors(error, Dataset, where, origin))
        raise
    return dataset.model_copy(update={"name": dataset.name or _UNSAFE.sub("_", path.stem).lstrip("_.-")})


def _read(path: Path, *, expected: str) -> tuple[Json, _Origin]:
    """The mapping that a YAML file holds, and where its keys are."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the experiment {path}: {why}") from None
    given, lines = read_yaml(text, name=str(path))
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected {expected}, found no mapping")
    return given, _Origin(path, lines)


class _Origin:
    """Where a key was written: a line of the file, or ``--set``."""

    def __init__(self, path: Path, lines: dict[tuple, int]) -> None:
        self.path, self.lines = path, lines
        self.overridden: list[tuple[str, ...]] = []

    def of(self, location: Sequence[Any]) -> str:
        parts = tuple(map(str, location))
        if any(parts[: len(key)] == key for key in self.overridden):
            return "--set"
        lines = [self.lines[parts[:n]] for n in range(len(parts), 0, -1) if parts[:n] in self.lines]
        place = f"{self.path}:{lines[0]}" if lines else str(self.path)
        within = any(key[: len(parts)] == parts for key in self.overridden)
        return f"{place} with --set" if within else place

    def error(self, location: Sequence[Any], message: str) -> UserError:
        return UserError(f"{self.of(location)}: {'.'.join(map(str, location)) or 'experiment'}: {message}")


def _find(name: str) -> Path:
    ready = ready_experiments()
    if name in ready:
        return ready[name]
    path = Path(name)
    if os.path.isfile(path):  # unlike Path.is_file, false too where the name is too long
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise UserError(f"no experiment file {name}")
    raise UserError(
        f"no experiment {name!r}{nearest(name, ready)} (ready: {', '.join(sorted(ready))}; or give a file)"
    )


def _apply(given: Json, setting: str) -> tuple[str, ...]:
    """Put one ``dotted.key=value`` into the experiment; returns the key's parts."""
    dotted, equals, text = setting.partition("=")
    parts = tuple(dotted.split("."))
    if not equals or not all(parts):
        raise UserError(f"--set {setting}: expected KEY=VALUE, such as pretrain.epochs=20")
    value, _ = read_yaml(text, name=f"--set {dotted}")
    place: Any = given
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place.get(part), list) and part == "methods":
            place[part] = {str(name): {} for name in place[part]}
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise UserError(f"--set {setting}: {'.'.join(parts[: depth + 1])} has no keys below it")
    place[parts[-1]] = value
    return parts


def _validate(given: Json, origin: _Origin) -> Experiment:
    try:
        experiment = Experiment.model_validate(given)
    except ValidationError as error:
        raise_all(_errors(error, Experiment, (), origin))
        raise
    found: list[UserError] = []
    for label in experiment.methods:
        found += _collected(_check_method, experiment, label, origin)
    if not found:  # what follows needs methods that are known
        for label in experiment.methods:
            found += _collected(_check_batches, experiment, label, origin)
    for check in (_check_metrics, _check_protocols, _check_baseline, _check_repeats):
        found += _collected(check, experiment, origin)
    raise_all(found)
    return experiment


def _collected(check: Callable[..., None], *arguments: Any) -> list[UserError]:
    """What a check refuses."""
    try:
        check(*arguments)
    except UserErrors as errors:
        return errors.errors
    except UserError as error:
        return [error]
    return []


def _check_method(experiment: Experiment, label: str, origin: _Origin) -> None:
    """Refuse a method that is unknown, its options and settings, and nets that it cannot train."""
    entry, name = experiment.methods[label], experiment.method_of(label)
    where = ("methods", label)
    if name not in METHODS:
        raise origin.error(where, f"unknown method{nearest(name, METHODS)} (known: {', '.join(METHODS)})")
    found: list[UserError] = []
    try:
        experiment.options_of(label)
    except OptionError as error:
        option = () if error.option is None else (error.option,)
        found.append(origin.error((*where, "options", *option), str(error)))
    try:
        Training.model_validate(entry.train)
    except ValidationError as error:
        found += _errors(error, Training, (*where, "train"), origin)
    raise_all(found)
    missing = set(METHODS[name].archs) - set(experiment.backbones_of(label))
    if METHODS[name].joint and missing:
        raise origin.error(("backbones",), f"the method {name} needs both a cnn and a vit")
    for arch in entry.backbones:
        if arch not in METHODS[name].archs:
            raise origin.error((*where, "backbones", arch), f"the method {name} trains no {arch}")
    if missing == set(METHODS[name].archs):
        raise origin.error(where, f"the method {name} trains a {' or '.join(METHODS[name].archs)} only")


def _check_repeats(experiment: Experiment, origin: _Origin) -> None:
    """Refuse repeated splits of a table that gives the split."""
    for dataset in experiment.all_datasets:
        if dataset.splits.repeats > 1 and dataset.split_column is not None:
            where = ("dataset",) if experiment.dataset is not None else ("datasets", dataset.name)
            raise origin.error(
                (*where, "splits", "repeats"),
                f"the splits of {dataset.name} are given by split_column ({dataset.split_column}), and are"
                " the same each time: leave out one of the two",
            )


def _check_baseline(experiment: Experiment, origin: _Origin) -> None:
    baseline = experiment.report.baseline
    if baseline not in experiment.methods:
        raise origin.error(
            ("report", "baseline"),
            f"{baseline!r} is not one of the methods ({', '.join(experiment.methods)})"
            + nearest(baseline, experiment.methods),
        )


def _check_batches(experiment: Experiment, label: str, origin: _Origin) -> None:
    """Refuse a batch that the ranks of a method's trainings cannot share."""
    if METHODS[experiment.method_of(label)].steps == "none":
        return
    train = experiment.training_of(label)
    key = "accumulate" if train.accumulate > 1 else "batch_size"
    section = ("methods", label, "train") if key in experiment.methods[label].train else ("pretrain",)
    stages = {"pretrain": experiment.resources.pretrain}
    if searched_option(experiment.options_of(label)):
        stages["search"] = experiment.resources.search
    for stage, resources in stages.items():
        ranks = resources.nodes * resources.ranks_per_node
        try:
            check_batch(train.batch_size, world_size=ranks, accumulate=train.accumulate)
        except UserError as error:
            raise origin.error((*section, key), f"in {stage}, {error}") from None


def _check_protocols(experiment: Experiment, origin: _Origin) -> None:
    """Refuse a data set without a protocol, and one for outlines where no object can have any."""
    where = ("finetune", "protocols")
    for name in experiment.finetune.protocols:
        of_kind = [data for data in experiment.all_datasets if data.kind == PROTOCOLS[name].kind]
        if of_kind and not any(PROTOCOLS[name].is_for(data) for data in of_kind):
            raise origin.error(
                where,
                f"{name} needs outlines of objects, and those of {of_kind[0].name} ({of_kind[0].source}) are"
                " boxes only; detect needs no more",
            )
    for dataset in experiment.all_datasets:
        if not experiment.protocols_of(dataset):
            fitting = ", ".join(name for name, info in PROTOCOLS.items() if info.is_for(dataset))
            raise origin.error(where, f"none is for {dataset.kind}, which {dataset.name} is ({fitting})")


def _check_metrics(experiment: Experiment, origin: _Origin) -> None:
    """Refuse a metric that is unknown, or that the labels of some data set do not have."""
    for where, metric in (
        (("finetune", "select_by"), experiment.finetune.select_by),
        (("report", "metric"), experiment.report.metric),
    ):
        if metric not in ALL_METRICS:
            hint = nearest(metric, ALL_METRICS) or f" (known: {', '.join(ALL_METRICS)})"
            raise origin.error(where, f"unknown metric {metric!r}{hint}")
        for dataset in experiment.all_datasets:
            try:
                check_metric(metric, task=dataset.labels, key=".".join(where))
            except UserError as error:
                raise UserError(f"{origin.of(where)}: {error}; '{dataset.name}' is such data") from None


def _errors(
    error: ValidationError, model: type[BaseModel], prefix: tuple, origin: _Origin
) -> list[UserError]:
    """All of pydantic's errors, one line each, the most telling first."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] == "extra_forbidden")
    found: dict[tuple, UserError] = {}
    for problem in problems:  # of the members of a union the first says enough
        location = tuple(part for part in problem["loc"] if part != "[key]")
        found.setdefault(location[:4], _line_of(problem, location, model, prefix, origin))
    return list(found.values())


def _line_of(
    problem: Any, location: tuple, model: type[BaseModel], prefix: tuple, origin: _Origin
) -> UserError:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        hint = nearest(str(location[-1]), known)
        message = "unknown key" + (hint or f" (known here: {', '.join(known)})")
    elif problem["type"] == "missing":
        message = "missing"
    elif problem["type"] == "string_pattern_mismatch":  # of all patterns there is only that of names
        said = repr(problem["input"])
        message = f"expected letters, digits, '_', '.' and '-', the first a letter or digit, found {said}"
    elif problem["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, found {problem['input']!r}"[:300]
    return origin.error((*prefix, *location), message)


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that a model allows at a place such as ('resources', 'pretrain')."""
    current: Any = model
    for part in location:
        fields: Mapping[str, Any] = getattr(current, "model_fields", {})
        annotation = fields[part].annotation if part in fields else current
        current = _model_within(annotation)
        if current is None:
            return []
    return list(getattr(current, "model_fields", {}))


def _model_within(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _model_within(part)
        if found is not None:
            return found
    return None
