"""From a method's name to its class."""

from __future__ import annotations

import importlib

from pipeline.errors import UserError
from pipeline.methods.base import Method, Search
from pipeline.methods.registry import method_info


def load_method(name: str) -> type[Method]:
    """The class that implements a registered method.

    Raises:
        UserError: no method of this name.
    """
    return _load(method_info(name).target)


def load_search(name: str) -> type[Search]:
    """The class that finds the value of an option of a registered method.

    Raises:
        UserError: no method of this name, or none that searches.
    """
    target = method_info(name).search
    if target is None:
        raise UserError(f"method {name} has no option that a search could decide")
    return _load(target)


def _load(target: str) -> type:
    module, _, cls = target.partition(":")
    return getattr(importlib.import_module(module), cls)
