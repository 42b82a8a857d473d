"""YAML whose plain words are what they look like, as YAML 1.2 has it.

YAML 1.1, which PyYAML reads, takes ``01234`` for an octal number, ``1:30`` for ninety, ``2026-01-01`` for a
date and ``no`` for false. Here numbers are decimal, without leading zeros; ``1e-3`` is one; truth is ``true``
and ``false``; all else is text as it is written.
"""

from __future__ import annotations

import functools
import re
from typing import Any

_TRUTH = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_WHOLE = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TAG = "tag:yaml.org,2002:"


@functools.cache
def plain_loader() -> type[Any]:
    """PyYAML's safe loader with these rules."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """See the module."""

    kept = ("null", "merge")  # of what PyYAML resolves by itself
    PlainLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag in {_TAG + name for name in kept}]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    PlainLoader.add_implicit_resolver(_TAG + "bool", _TRUTH, list("tTfF"))
    PlainLoader.add_implicit_resolver(_TAG + "int", _WHOLE, list("-+0123456789"))
    PlainLoader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
    return PlainLoader
