"""From a method's name to its class."""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.methods.base import Method, Search
from pipeline.methods.registry import method_info
from pipeline.targets import load_target


def load_method(name: str) -> type[Method]:
    """The class that implements a registered method.

    Raises:
        UserError: no method of this name.
    """
    return load_target(method_info(name).target)


def load_search(name: str) -> type[Search]:
    """The class that finds the value of an option of a registered method.

    Raises:
        UserError: no method of this name, or none that searches.
    """
    target = method_info(name).search
    if target is None:
        raise UserError(f"method {name} has no option that a search could decide")
    return load_target(target)
