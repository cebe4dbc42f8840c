"""Environment variables in a spec: ``${NAME}`` stands for a value, which is not told to anybody.

The value may be a secret, and records, reports and logs are read by many. They have the name of the
variable instead. What is made of the spec takes the text that the file has (``put_back``). In all
other texts, such as errors of storage clients, what variables have stood for in this process is
looked for and replaced (``conceal``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TextIO
from urllib.parse import quote

Place = tuple[Any, ...]
"""Where a text stands among nested values: keys of mappings, and indices of lists."""

SHORTEST = 8
"""Characters of a value that is looked for in other texts; less could be part of any word."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")


class _Known:
    """What variables have stood for in this process."""

    texts: Mapping[str, str] = MappingProxyType({})
    """Value → text with the variable."""
    pattern: re.Pattern[str] | None = None
    """Matches any of the values, the longest first."""


def names_in(text: str) -> list[str]:
    """Names of the variables in a text."""
    return _VARIABLE.findall(text)


def expand(text: str) -> str:
    """The text with the values of its variables.

    Those that are not set stay as they are.
    """
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)


def remember(texts: Collection[str]) -> None:
    """Have :func:`conceal` replace from now on what these texts and their variables stand for."""
    known = dict(_Known.texts)
    for text in (*texts, *(f"${{{name}}}" for part in texts for name in names_in(part))):
        value = expand(text)
        if len(value) >= SHORTEST and value != text:
            known |= dict.fromkeys(_forms(value), text)
    if known != _Known.texts:
        longest_first = sorted(known, key=len, reverse=True)
        _Known.texts, _Known.pattern = known, re.compile("|".join(map(re.escape, longest_first)))


def remembered() -> list[str]:
    """The values that :func:`conceal` replaces."""
    return list(_Known.texts)


def conceal(text: str) -> str:
    """The text with variables in place of what they have stood for in this process.

    Values of less than ``SHORTEST`` characters stay.
    """
    if _Known.pattern is None:
        return text
    return _Known.pattern.sub(lambda match: _Known.texts[match[0]], text)


def concealed(value: Any) -> Any:
    """Nested values whose texts and keys are as :func:`conceal` gives them."""
    if isinstance(value, str):
        return conceal(value)
    if isinstance(value, dict):
        return {concealed(key): concealed(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [concealed(part) for part in value]
    return value


def put_back(values: Any, texts: Mapping[Place, str]) -> Any:
    """Nested values with these texts in their places; places that there are not are passed over."""
    if () in texts:
        return texts[()]
    if not texts or not isinstance(values, dict | list | tuple):
        return values
    below: dict[Any, dict[Place, str]] = {}
    for place, text in texts.items():
        below.setdefault(place[0], {})[place[1:]] = text
    if isinstance(values, dict):
        return {key: put_back(value, below.get(key, {})) for key, value in values.items()}
    return [put_back(value, below.get(index, {})) for index, value in enumerate(values)]


class ConcealingStream:
    """A text stream that has the names of variables where their values are written to it."""

    def __init__(self, stream: TextIO) -> None:
        """Write to ``stream``."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        self._stream.write(conceal(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self._stream, name)


def _forms(value: str) -> set[str]:
    """The value, and how it stands in URLs, in JSON and among Python's quotes."""
    in_json = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    return {value, quote(value), quote(value, safe=""), repr(value)[1:-1], *in_json}
