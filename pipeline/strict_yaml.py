"""YAML as people mean it: every key once, nothing that unfolds into more than was written. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.errors import UserError

MOST_NODES = 100_000  # aliases of aliases can stand for more values than memory holds
MOST_LEVELS = 100

Key = tuple[str, ...]


def read_yaml(text: str, *, name: str) -> tuple[Any, dict[Key, int]]:
    """Read one YAML document.

    Args:
        text: the document.
        name: what errors call it: a path, or ``--set``.

    Returns:
        The value, and the line of every key (and list element) by its path of keys.

    Raises:
        UserError: no YAML, a key that stands there twice, aliases that unfold without end.
    """
    lines: dict[Key, int] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            for number, (key, line) in enumerate(_keys(root, (), name)):
                if number >= MOST_NODES:
                    raise UserError(f"{name}:{line}: its aliases unfold into more than {MOST_NODES} values")
                lines[key] = line
        return yaml.safe_load(text), lines
    except RecursionError:
        raise UserError(f"{name}: nested more than {MOST_LEVELS} levels deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        context = f" {error.context}" if error.context else ""
        raise UserError(f"{where}: not valid YAML: {error.problem}{context}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def _keys(node: yaml.Node, prefix: Key, name: str) -> Iterator[tuple[Key, int]]:
    """Every key and list element below a node, with its line."""
    if len(prefix) > MOST_LEVELS:
        raise UserError(
            f"{name}:{node.start_mark.line + 1}: nested more than {MOST_LEVELS} levels deep, or in itself"
        )
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            said, line = str(key.value), key.start_mark.line + 1
            here = (*prefix, said)
            if said in first and isinstance(key, yaml.ScalarNode):
                raise UserError(
                    f"{name}:{line}: {'.'.join(here)}: stands there twice, first in line {first[said]}"
                )
            first[said] = line
            yield here, line
            yield from _keys(value, here, name)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            here = (*prefix, str(position))
            yield here, value.start_mark.line + 1
            yield from _keys(value, here, name)
