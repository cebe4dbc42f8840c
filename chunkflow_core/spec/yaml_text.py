"""YAML that people write: read fast, without silently repeated keys, errors told in a line."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as _FastLoader  # libyaml's is several times as fast
except ImportError:  # this PyYAML was built without it
    from yaml import SafeLoader as _FastLoader  # type: ignore[assignment]


class _Loader(_FastLoader):
    """A loader that refuses repeated keys."""


_MERGE = "tag:yaml.org,2002:merge"
_DEEP = 10_000
"""Levels of lists and mappings that are read; twice as many would end the process in libyaml."""
_TOO_DEEP = "lists or mappings are nested too deep"


def parse_yaml(text: str) -> Any:
    """The content of a YAML text; ``YAMLError`` if it can't be read, or if a key stands twice."""
    # No piece is nested deeper: each level is a bracket, or begins further to the right.
    depth = text.count("[") + text.count("{") + max(map(len, text.splitlines()), default=0)
    if depth >= _DEEP:
        _check_depth(text)
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError(_TOO_DEEP) from None


def _check_depth(text: str) -> None:
    """Raise a ``YAMLError`` where a text is nested too deep.

    Its events are read one after the other, at whatever depth.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_FastLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEP:
            raise yaml.YAMLError(_TOO_DEEP)


def problem_in_yaml(error: Exception) -> str:
    """Where in a text an error is and what it says, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    context, begin = getattr(error, "context", None), getattr(error, "context_mark", None)
    if context and begin and begin.line != mark.line:
        context += f" that begins in line {begin.line + 1}"
    parts = [part for part in (context, getattr(error, "problem", None)) if part]
    return f"line {mark.line + 1}, column {mark.column + 1}: {', '.join(parts)}"


def _mapping_without_repeats(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:  # what it brings gives way to what stands here
            continue
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a list or mapping can't be a key", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _whole_list(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    """A list with its content.

    By default the content comes later, so that a list nested too deep for Python would be given
    out.
    """
    return loader.construct_sequence(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG, _whole_list)
