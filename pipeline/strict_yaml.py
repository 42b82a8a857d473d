"""YAML as people mean it: every key once, words as written, nothing that unfolds without end. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.errors import UserError, one_line
from slurm.plain_yaml import plain_loader

MOST_NODES = 100_000  # aliases of aliases can stand for more values than memory holds
MOST_LEVELS = 100
MOST_DIGITS = 100  # Python refuses to print an integer of more than 4300 digits, and takes long to read one
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

Key = tuple[str, ...]


def read_yaml(text: str, *, name: str) -> tuple[Any, dict[Key, int]]:
    """Read one YAML document.

    Args:
        text: the document.
        name: what errors call it: a path, or ``--set``.

    Returns:
        The value, and the line of every key (and list element) by its path of keys.

    Raises:
        UserError: no YAML, a key that stands there twice or is no text, aliases that unfold without end, a
            number without end.
    """
    lines: dict[Key, int] = {}
    try:
        loader = plain_loader()(text)
        root = loader.get_single_node()
        if root is not None:
            for number, (key, line) in enumerate(_keys(root, (), name)):
                if number >= MOST_NODES:
                    raise UserError(f"{name}:{line}: its aliases unfold into more than {MOST_NODES} values")
                lines[key] = line
        return loader.construct_document(root) if root is not None else None, lines
    except RecursionError:
        raise UserError(f"{name}: nested more than {MOST_LEVELS} levels deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        context = f" {error.context}" if error.context else ""
        raise UserError(f"{where}: not valid YAML: {error.problem}{context}") from None
    except UserError:
        raise
    except Exception as error:  # PyYAML raises nearly anything on a value that its tag does not fit
        raise UserError(f"{name}: not valid YAML: {type(error).__name__}: {one_line(error)}") from None


def _keys(node: yaml.Node, prefix: Key, name: str) -> Iterator[tuple[Key, int]]:
    """Every key and list element below a node, with its line."""
    if len(prefix) > MOST_LEVELS:
        raise UserError(
            f"{name}:{node.start_mark.line + 1}: nested more than {MOST_LEVELS} levels deep, or in itself"
        )
    if isinstance(node, yaml.ScalarNode):
        _check_number(node, name)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{name}:{line}: not valid YAML: a list or mapping cannot be a key")
            _check_number(key, name)
            said = str(key.value)
            here = (*prefix, said)
            if said in first:
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


def _check_number(node: yaml.ScalarNode, name: str) -> None:
    if node.tag in NUMBERS and len(node.value) > MOST_DIGITS:
        line, digits = node.start_mark.line + 1, len(node.value)
        raise UserError(f"{name}:{line}: {node.value[:20]}… is a number of {digits} digits")
