"""The stages, in the order in which they run. Each has a module with ``run(work)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = ("shard", "search", "pretrain", "finetune", "aggregate")
TRAINING_STAGES = ("search", "pretrain")  # on any number of ranks, and resumable
GPU_STAGES = (*TRAINING_STAGES, "finetune")  # that may compute on a GPU; the others never ask for one


def computes_on_gpu(stage: str, spec: Mapping[str, Any]) -> bool:
    """Whether a task asks for a GPU where there is one: not if its method takes no steps.

    Args:
        spec: the task's specification.
    """
    if stage != "pretrain":
        return stage in GPU_STAGES
    from pipeline.methods.registry import METHODS

    method = spec.get("method")
    return method not in METHODS or METHODS[method].steps != "none"
