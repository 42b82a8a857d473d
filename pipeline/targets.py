"""From ``module:name`` to what it names."""

from __future__ import annotations

import importlib
from typing import Any


def load_target(target: str) -> Any:
    """Import a module and take one of its names.

    Args:
        target: ``module:name``.
    """
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
