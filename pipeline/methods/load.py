"""From a method's name to its class."""

from __future__ import annotations

import importlib

from pipeline.methods.base import Method
from pipeline.methods.registry import method_info


def load_method(name: str) -> type[Method]:
    """The class that implements a registered method.

    Raises:
        UserError: no method of this name.
    """
    module, _, cls = method_info(name).target.partition(":")
    return getattr(importlib.import_module(module), cls)
