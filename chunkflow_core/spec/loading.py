"""Volume specs from YAML files or environment variables.

Errors name file, key, value and what was expected.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from chunkflow_core.errors import SpecError
from chunkflow_core.spec.runner import RUNNERS
from chunkflow_core.spec.transport import FROM_ENVIRONMENT, check_transportable, from_environment
from chunkflow_core.spec.volume import VolumeSpec
from chunkflow_core.spec.yaml_text import parse_yaml, problem_in_yaml
from chunkflow_core.variables import Place, conceal, expand, names_in, put_back, remember

_ALIAS = re.compile(r"\*[\w-]")
_LARGEST = 1_000_000
"""Characters that the aliases or the variables of a spec may stand for; nobody writes as many."""
_PUBLIC: tuple[Place, ...] = (("name",), ("output", "compression"))
"""Places whose values are no secrets: what the DAG is called, and one of four words that
``prepare`` looks up in the layer's provenance.
"""


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> VolumeSpec:
    """Read a spec file.

    Args:
        path: YAML file; values may contain ``${ENVIRONMENT_VARIABLE}``. Or ``env:CHUNKFLOW_SPEC``:
            what ``transport.to_environment`` gave, in which they have been replaced already.
        overrides: ``key.sub=value`` texts, the value in YAML; they replace what the file says.

    Raises:
        SpecError: The spec can't be read, or is wrong. The message names file, key, value and what
            was expected.
    """
    if str(path).startswith(FROM_ENVIRONMENT):
        return _load_from_environment(str(path), overrides)
    path = Path(path)
    try:
        data = _parsed(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise SpecError(f"{path}: cannot read the volume spec: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {problem_in_yaml(error)}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected keys and values (name, input, output, …), got {data!r:.60}")
    for override in overrides:
        _apply(data, override)
    _check_variables(data, str(path))
    folder, values = str(path.resolve().parent), _substitute(data, str(path))
    return parse_spec(values, source=str(path), folder=folder, texts=_with_variables(data))


def _load_from_environment(source: str, overrides: Iterable[str]) -> VolumeSpec:
    data, texts = from_environment(source.removeprefix(FROM_ENVIRONMENT))
    for override in overrides:
        _apply(data, override)
    standing = dict(_texts(data))  # an override is taken as it is, and replaces what was there
    texts = {place: text for place, text in texts.items() if standing.get(place) == text}
    spec = parse_spec(_substitute(data, source, texts), source=source, texts=texts)
    check_transportable(spec, source=source)
    return spec


def parse_spec(
    data: dict[str, Any], *, source: str = "spec", folder: str = ".", texts: Mapping[Place, str] | None = None
) -> VolumeSpec:
    """Validate the content of a spec.

    Args:
        data: Keys and values, as YAML gives them.
        source: Where the content came from, for messages.
        folder: Folder to which the model's paths are relative.
        texts: What stood in places of ``data`` before variables were replaced.

    Raises:
        SpecError: The spec is wrong. The message names source, key, value and what was expected.
    """
    if "folder" in data:
        raise SpecError(f"{source}: folder: unknown key")
    secret = {place: text for place, text in (texts or {}).items() if place not in _PUBLIC}
    try:
        return VolumeSpec.model_validate({**data, "folder": folder}).came_from(secret)
    except ValidationError as error:  # not as the cause: a traceback would show values
        told = "\n".join(f"{source}: {_explain(problem, secret)}" for problem in error.errors())
    raise SpecError(told)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {override}: expected key=value, such as model.threads=2")
    try:
        value = _parsed(text, f"--set {key}")
    except (yaml.YAMLError, UnicodeEncodeError) as error:  # the latter: bytes of a command line that are no text
        value = text  # such as @daily or */5 * * * *, which in YAML would need quotes
        if text.startswith(("[", "{", '"', "'")):
            raise SpecError(f"--set {override}: the value is not valid YAML: {problem_in_yaml(error)}") from error
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:  # not there, or a section without keys
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise SpecError(f"--set {override}: {parent} is a value, it has no keys below it")
    data[last] = value


def _parsed(text: str, source: str) -> Any:
    """The content of a YAML text.

    Raises:
        YAMLError: The text can't be read.
        SpecError: Its aliases stand for too much.
    """
    if _ALIAS.search(text):
        _check_aliases(text, source)
    return parse_yaml(text)


def _check_aliases(text: str, source: str) -> None:
    """Refuse a text whose aliases stand for more than anybody writes.

    Ten lines of nine aliases each can stand for 9¹⁰ values. What each anchor stands for is counted
    once, as the text goes by, and before anything is built of it: merge keys (``<<``) are written
    out by the parser itself.
    """
    total, sizes = 0, dict[str | None, int]()
    begun: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor, 0)  # an anchor that isn't there, or not complete, is told later
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1 + len(event.value)
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            sizes[anchor] = total - before
        if total > _LARGEST:
            raise SpecError(f"{source}: with its aliases (*name) written out, it has more than {_LARGEST} characters")


def _check_variables(data: dict[str, Any], source: str) -> None:
    """Refuse a spec whose variables stand for more than anybody writes."""
    names = (name for _, text in _texts(data) for name in names_in(text))
    if sum(len(os.environ.get(name, "")) for name in names) > _LARGEST:
        raise SpecError(f"{source}: its environment variables stand for more than {_LARGEST} characters")


def _texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """All texts among values, however deep, each after its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(part, (*place, key))


def _with_variables(data: Any) -> dict[Place, str]:
    """All texts that have variables, by place."""
    return {place: text for place, text in _texts(data) if names_in(text)}


def _substitute(data: Any, source: str, texts: Mapping[Place, str] | None = None) -> Any:
    """The content of a spec with the values of variables, in these places; default: in all.

    Raises:
        SpecError: A variable is not set. The message names source, key and variable.
    """
    texts = _with_variables(data) if texts is None else texts
    for place, text in texts.items():
        for name in names_in(text):
            if name not in os.environ:
                key = ".".join(map(str, place))
                raise SpecError(f"{source}: {key}: {text}: the environment variable {name} is not set")
    remember([text for place, text in texts.items() if place not in _PUBLIC])
    return put_back(data, {place: expand(text) for place, text in texts.items()})


def _explain(error: Any, texts: Mapping[Place, str]) -> str:
    """One line for one of pydantic's errors: key, value, what was expected.

    ``texts`` are told in place of the values that came from variables.
    """
    location = [str(part) for part in error["loc"] if part not in ("int", "str")]
    kind = location.pop(1) if location[:1] == ["runner"] and len(location) > 1 else "local"
    key, message, value = ".".join(location), conceal(error["msg"].removeprefix("Value error, ")), error["input"]
    if error["type"] == "missing":
        return f"{key}: missing; this key is required"
    if error["type"] == "model_type":
        message = f"expected a section with keys below it ({', '.join(_fields(location, kind))})"
    if error["type"] == "extra_forbidden":
        known = _fields(location[:-1], kind)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    # of a whole section: the message begins with the key
    if error["type"] == "value_error" and isinstance(value, dict) and _fields(location, kind):
        return f"{key}.{message}" if key else message
    depth = len(location)
    below = {place[depth:]: text for place, text in texts.items() if [*map(str, place[:depth])] == location}
    value = put_back(value, below)
    try:
        shown = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # a key that JSON doesn't know, such as a date
        shown = repr(value)
    return f"{key}: {shown if len(shown) < 80 else shown[:77] + '...'}: {message[:1].lower() + message[1:]}"


def _fields(location: Sequence[str], runner: str) -> list[str]:
    """Keys of the section at a location; none if there is a value.

    ``runner`` is the kind of the runner section.
    """
    section: Any = VolumeSpec
    for name in location:
        fields = getattr(section, "model_fields", {})
        if name.isdigit() or name not in fields:  # an element of a list, or a key of a mapping
            section = next((part for part in get_args(section) if hasattr(part, "model_fields")), None)
        else:
            section = RUNNERS[runner] if (section, name) == (VolumeSpec, "runner") else fields[name].annotation
            if isinstance(section, UnionType):  # such as Section | None
                section = next((part for part in get_args(section) if hasattr(part, "model_fields")), None)
    return [name for name in getattr(section, "model_fields", ()) if name != "folder"]
