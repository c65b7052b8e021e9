"""YAML as users write it: one document of plain values, in which every key counts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode

__all__ = ["parse_yaml"]


class _Loader(yaml.SafeLoader):
    """YAML forbids a key to stand twice; PyYAML takes the last and loses what was said before."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:  # not quoted: it may be a secret in a wrong place
                raise ConstructorError(
                    problem="a key stands twice in one mapping", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> object:
    """The value of a text.

    Raises:
        ValueError: it is not valid YAML, has a key twice or a value out of range. The message says
            why and where, and quotes nothing, for a line may hold a key.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or 'syntax error'}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"a value is out of range ({type(error).__name__})") from None
