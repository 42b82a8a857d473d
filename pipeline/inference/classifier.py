"""A kept model at work: probabilities for the images of any dataset folder."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.evaluate.problem import Classify, Problem, Split, reproducible
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.evaluate.thresholds import thresholds
from pipeline.inference.kept import Kept, is_lazy, require_sound
from pipeline.manifest import Manifest, damaged_files
from pipeline.nets.weights import read_config
from pipeline.specs import Resources
from pipeline.stages.finetune import make_problem
from pipeline.stages.work import Done, Work
from pipeline.targets import load_target
from pipeline.train.cpu import set_up_cpu
from shards import Index


class Classifier:
    """A kept model and what it was evaluated with.

    Its probabilities have the same bits as the fine-tuning's on the same images, on the same kind of device
    and with as many threads.

    Args:
        device: ``cpu``, ``cuda`` or one GPU such as ``cuda:1``; ``auto``: of the kind that the fine-tuning
            ran on, or the CPU where there is no GPU.

    Raises:
        UserError: a file that it needs is missing or damaged, or there is no such device.
    """

    def __init__(self, manifest: Manifest, model: Kept, *, device: str = "auto") -> None:
        require_sound(model)
        self.model = model
        where = device_of(device, model.receipt.device)
        resources = Resources.model_validate(model.task.resources)
        resources = resources.model_copy(update={"device": "cpu"})  # the problem is then moved to its own
        set_up_cpu(resources.cpus_per_rank)
        work = Work(model.task, model.folder, inputs=_inputs(manifest, model), resources=resources)
        self.problem: Problem = replace(make_problem(work, model.spec), device=where)
        module = PROTOCOLS[model.spec.protocol].target.partition(":")[0]
        self._classify: Classify = load_target(f"{module}:restore")(self.problem, model.model)

    @cached_property
    def thresholds(self) -> list[float]:
        """The operating points that validation chose, one a class; none where the model has none."""
        if is_lazy(self.model.spec.protocol):
            val = self.problem.val
            return thresholds(self.probabilities(self.index, val.rows), val.targets.numpy())
        return list(read_config(self.model.model).get("training", {}).get("thresholds", []))

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


def device_of(asked: str, trained: str = "cpu") -> torch.device:
    """The device that ``--device`` means.

    Args:
        asked: auto, cpu, cuda, or a GPU such as cuda:1.
        trained: the kind that the model was fine-tuned on, which ``auto`` takes where it is there.

    Raises:
        UserError: no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return torch.device("cuda", 0) if trained == "cuda" and count else torch.device("cpu")
    if asked == "cpu":
        return torch.device("cpu")
    kind, colon, number = asked.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdigit() and len(number) < 4)):
        raise UserError(f"--device: {asked!r} is no device (expected auto, cpu, cuda, or cuda:1)")
    if int(number or 0) >= count:
        gpus = f"there are {count} GPUs, from cuda:0 on" if count else "PyTorch finds no GPU here"
        raise UserError(f"--device: {asked}: {gpus} (auto takes what is there)")
    return torch.device("cuda", int(number or 0))


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
