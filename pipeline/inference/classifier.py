"""A kept model at work: probabilities for the images of any dataset folder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.evaluate.problem import Classify, Problem, Split, reproducible
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.inference.kept import Kept, require_sound
from pipeline.manifest import Manifest, damaged_files
from pipeline.specs import Resources
from pipeline.stages.finetune import make_problem
from pipeline.stages.work import Done, Work
from pipeline.targets import load_target
from pipeline.train.cpu import set_up_cpu
from shards import Index


class Classifier:
    """A kept model and what it was evaluated with.

    Its probabilities have the same bits as the fine-tuning's on the same images, on the same kind of device
    and with as many threads; ``knn`` alone may differ in the last ones.

    Raises:
        UserError: a file that it needs is missing or damaged.
    """

    def __init__(self, manifest: Manifest, model: Kept) -> None:
        require_sound(model)
        self.model = model
        resources = Resources.model_validate(model.task.resources)
        if model.receipt.device == "cpu" or not torch.cuda.is_available():
            resources = resources.model_copy(update={"device": "cpu"})
        set_up_cpu(resources.cpus_per_rank)
        work = Work(model.task, model.folder, inputs=_inputs(manifest, model), resources=resources)
        self.problem: Problem = make_problem(work, model.spec)
        module = PROTOCOLS[model.spec.protocol].target.partition(":")[0]
        self._classify: Classify = load_target(f"{module}:restore")(self.problem, model.model)

    @property
    def index(self) -> Index:
        """The dataset folder that it learned from."""
        return self.problem.index

    @property
    def classes(self) -> list[str]:
        return self.problem.index.classes

    @property
    def multilabel(self) -> bool:
        return self.problem.multilabel

    def probabilities(self, index: Index, rows: np.ndarray) -> np.ndarray:
        """float32 (N, K) for rows of a dataset folder, in their order."""
        targets = torch.zeros(len(rows), dtype=torch.int64)  # nobody looks at them
        with reproducible(self.problem.seed, self.problem.device):
            return self._classify(replace(self.problem, index=index), Split(rows, targets))


def _inputs(manifest: Manifest, model: Kept) -> dict[str, list[Done]]:
    """The shards and the backbone that a fine-tuning read, every file as its receipt says."""
    inputs: dict[str, list[Done]] = {}
    for need in map(manifest.task, model.task.needs):
        receipt, folder = manifest.receipt(need), manifest.folder(need)
        if receipt is None:
            raise UserError(f"{model.task.id} needs {need.id}, which is not in the store any more ({folder})")
        if problems := damaged_files(folder, receipt):
            raise UserError(f"{need.id} is damaged: {problems[0]}")
        inputs.setdefault(need.stage, []).append(Done(need, folder, receipt))
    return inputs
