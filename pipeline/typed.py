"""The base of everything that is read from YAML and checked by pydantic. Imports no torch."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationInfo, field_validator


class Typed(BaseModel):
    """Where a number belongs, true is not taken for 1: YAML reads yes and on as true."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if _holds_truth(given) and _wants_numbers(cls, info.field_name):
            raise ValueError("expected a number, found true or false (YAML's yes, no, on and off)")
        return given


def _holds_truth(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_truth, value))
    if isinstance(value, dict):
        return any(map(_holds_truth, value.values()))
    return isinstance(value, bool)


@functools.cache
def _wants_numbers(model: type[BaseModel], field: str) -> bool:
    """Whether a field is of numbers and of nothing that true could be; other models see to their own."""
    types = set(_types(model.model_fields[field].annotation))
    if types & {Any, bool} or any(issubclass(one, BaseModel) for one in types):
        return False
    return bool(types & {int, float})


def _types(annotation: Any) -> list[Any]:
    """The types within an annotation, those of a literal's values among them."""
    if get_origin(annotation) is Literal:
        return [type(value) for value in get_args(annotation)]
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) is None:
        return [annotation]
    return [one for part in get_args(annotation) for one in _types(part)]
