"""What the metrics of a receipt must look like, stage by stage, before anything relies on them.

A receipt's checksum tells damage from what was written; a store may hold what somebody else has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

Number = float | int | None


class _Warned(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    warnings: list[str]


class ShardMetrics(_Warned, total=False):
    task: str
    classes: list[str]
    samples: dict[str, int]


class Candidate(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    candidate: Any
    loss: NotRequired[Number]


class SearchMetrics(_Warned, total=False):
    decides: str
    winner: Any
    ranking: list[Candidate]
    loss: Number
    steps: int
    images_per_second: Number


class PretrainMetrics(_Warned, total=False):
    loss: Number
    collapsed: dict[str, bool]
    health: dict[str, dict[str, Any]]
    knn: dict[str, Any]
    backbones: dict[str, dict[str, Any]]
    steps: int
    images_per_second: Number


class FinetuneMetrics(_Warned, total=False):
    num_labels: int
    num_groups: int | None
    fraction_drawn: Number
    num_val: int
    num_test: int
    val: dict[str, Any]
    test: dict[str, Any]
    model: dict[str, Any]


class AggregateMetrics(_Warned, total=False):
    unfinished: list[str]


_MODELS: Mapping[str, Any] = {
    "shard": ShardMetrics,
    "search": SearchMetrics,
    "pretrain": PretrainMetrics,
    "finetune": FinetuneMetrics,
    "aggregate": AggregateMetrics,
}
_SCORES = ("val", "test")  # their values are numbers, or lists and dicts of them


def are_sound(stage: str, metrics: Mapping[str, Any]) -> bool:
    """Whether every metric that is known of this stage has its type; others may be there too."""
    if stage not in _MODELS:
        return False
    try:
        _adapter(stage).validate_python(dict(metrics))
    except ValidationError:
        return False
    return stage != "finetune" or all(_is_score(metrics.get(split, {})) for split in _SCORES)


@cache
def _adapter(stage: str) -> TypeAdapter[Any]:
    return TypeAdapter(_MODELS[stage])


def _is_score(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_score, value.values()))
    if isinstance(value, list):
        return all(map(_is_score, value))
    return value is None or isinstance(value, (int, float))
