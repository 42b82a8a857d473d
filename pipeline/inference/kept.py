"""The fine-tuned models of an experiment that are there, and which of them is meant. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError, nearest
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.manifest import Manifest, Receipt, Task, file_problem
from pipeline.report.models import validation_score
from pipeline.specs import FinetuneSpec
from pipeline.stages.work import MODEL

WHOLE = "finetune"  # of the protocols, the one whose model is meant where several are as good


@dataclass(frozen=True)
class Kept:
    """A finished fine-tuning whose model can be used.

    Attributes:
        folder: the task's.
        score: of validation, by the metric that picked its epoch or weight decay.
    """

    task: Task
    spec: FinetuneSpec
    folder: Path
    receipt: Receipt
    score: float

    @property
    def model(self) -> Path:
        """The folder in timm's local-dir layout, where the protocol leaves one."""
        return self.folder / MODEL

    @property
    def words(self) -> set[str]:
        """What ``--net`` may say of it."""
        spec = self.spec
        share = f"{100 * spec.fraction:g}pc"
        return {spec.dataset, spec.label, spec.arch, spec.protocol, share, f"s{spec.seed}", self.task.name}


def kept_models(manifest: Manifest) -> list[Kept]:
    """Every finished fine-tuning whose model is there, in plan order."""
    found = []
    for task in manifest.tasks:
        if task.stage != "finetune":
            continue
        spec = FinetuneSpec.model_validate(task.spec)
        receipt = manifest.receipt(task)
        if receipt is None or not PROTOCOLS[spec.protocol].restores:
            continue
        folder = manifest.folder(task)
        files = receipt.metrics.get("model", {})
        if (files and all((folder / MODEL / name).is_file() for name in files)) or is_lazy(spec.protocol):
            found.append(Kept(task, spec, folder, receipt, validation_score(spec, receipt)))
    return found


def is_lazy(protocol: str) -> bool:
    """Whether a protocol stores no model, since its answer is made of the training images themselves."""
    return protocol == "knn"


def choose(models: Sequence[Kept], wanted: str) -> Kept:
    """The model that some words mean: of those that all of them fit the best by validation.

    Args:
        models: at least those that may be meant.
        wanted: see :func:`fitting`.

    Raises:
        UserError: no model fits.
    """
    return max(
        fitting(models, wanted),
        key=lambda model: (model.score, model.spec.fraction, model.spec.protocol == WHOLE),
    )


def fitting(models: Sequence[Kept], wanted: str) -> list[Kept]:
    """The models that some words fit, in their order.

    Args:
        models: those that may be meant.
        wanted: words separated by spaces or commas: a method, ``cnn`` or ``vit``, a protocol, a fraction such
            as ``10pc``, a seed such as ``s0``, a data set, or a task's whole name. None: all models.

    Raises:
        UserError: no model is there, or none fits.
    """
    if not models:
        raise UserError(
            "no model is there: no fine-tuning is done, or finetune.keep is none, or its protocols keep none"
            f" ({', '.join(name for name, info in PROTOCOLS.items() if info.restores)} do)"
        )
    words = [word.removeprefix("finetune/") for word in wanted.replace(",", " ").split()]
    known = sorted(set().union(*(model.words for model in models)))
    for word in words:
        if word not in known:
            short = [name for name in known if len(name) < 40]
            raise UserError(
                f"--net: no model is of {word!r}{nearest(word, known)} (known: {', '.join(short)})"
            )
    found = [model for model in models if model.words >= set(words)]
    if not found:
        raise UserError(f"--net: no model is of all of {', '.join(words)}")
    return found


def winners(models: Sequence[Kept]) -> list[Kept]:
    """Of each cell's models the best by validation (of equals the first); with ``keep: all`` all of them."""
    best: dict[tuple, Kept] = {}
    for model in models:
        spec = model.spec
        cell = (spec.dataset, spec.label, spec.arch, spec.protocol, spec.fraction)
        if cell not in best or model.score > best[cell].score:
            best[cell] = model
    chosen = {model.task.id for model in best.values()}
    return [model for model in models if model.spec.settings.keep == "all" or model.task.id in chosen]


def require_sound(model: Kept) -> None:
    """Raises UserError where a file of the model is not what its receipt says."""
    for name, said in model.receipt.metrics.get("model", {}).items():
        if problem := file_problem(model.model / name, said):
            raise UserError(f"{model.task.id}: its model is damaged: {problem}")
