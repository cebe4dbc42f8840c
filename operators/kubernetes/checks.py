"""Strict checks of Kubernetes objects that users write, against the models of the official client.

The client itself drops unknown keys in silence, and the cluster would tell them only when the first
pod is made.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache
from types import SimpleNamespace
from typing import Any

_COLLECTION = re.compile(r"(list\[|dict\[str, )(.+)\]")
_PRIMITIVES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text; numbers and true, false, dates in quotes"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "datetime": ((str, datetime), "a time"),
}
_QUANTITIES = ("requests", "limits", "overhead", "size_limit")
"""Attributes with quantities, which may be numbers though the models say texts.

Source: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
"""
_CHOICES = {
    # of the keys that decide where a pod runs; everything else is the cluster's to check
    ("V1Toleration", "effect"): ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    ("V1Toleration", "operator"): ("Exists", "Equal", "Lt", "Gt"),
    ("V1NodeSelectorRequirement", "operator"): ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
    ("V1LabelSelectorRequirement", "operator"): ("In", "NotIn", "Exists", "DoesNotExist"),
}
_VALIDATING = SimpleNamespace(client_side_validation=True)


def problems(value: Any, type_name: str, where: str) -> Iterator[str]:
    """What is wrong with an object in the form of a manifest, one line for each problem.

    Told are unknown keys, wrong types and missing keys.

    Args:
        value: The object, as read from YAML; ``None`` counts as left out, as it does for
            Kubernetes.
        type_name: As the client names it, such as ``V1Toleration`` or ``list[V1Toleration]``.
        where: The object's place, with which the lines begin; after one that ends with a space no
            dot is put.
    """
    if value is None or type_name == "object":
        return
    if collection := _COLLECTION.fullmatch(type_name):
        yield from _problems_of_collection(value, collection[1] == "list[", collection[2], where)
    elif type_name in _PRIMITIVES:
        types, expected = _PRIMITIVES[type_name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield f"{where}: {_shown(value)}: expected {expected}"
    elif not isinstance(value, dict):
        yield f"{where}: {_shown(value)}: expected keys and values ({', '.join(_keys(type_name))})"
    else:
        yield from _problems_of_object(value, type_name, where)


def _problems_of_collection(value: Any, is_list: bool, type_name: str, where: str) -> Iterator[str]:
    if not isinstance(value, list if is_list else dict):
        yield f"{where}: {_shown(value)}: expected {'a list' if is_list else 'keys and values'}"
        return
    elements: Iterable[tuple[Any, Any]] = enumerate(value) if isinstance(value, list) else value.items()
    for key, element in elements:
        if not is_list and not isinstance(key, str):
            yield f"{where}: {_shown(key)}: expected a text as key; put it in quotes"
        elif is_list and element is None:
            yield f"{_below(where, key)}: empty"
        else:
            yield from problems(element, type_name, _below(where, key))


def _problems_of_object(value: dict[Any, Any], type_name: str, where: str) -> Iterator[str]:
    keys = _keys(type_name)
    for key, element in value.items():
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            yield f"{_below(where, key)}: unknown key; " + (
                f"did you mean {near[0]}?" if near else f"expected {_one_of(keys)}"
            )
            continue
        attribute = keys[key]
        if attribute in _QUANTITIES:
            element = _with_texts(element)
        yield from problems(element, _model(type_name).openapi_types[attribute], _below(where, key))
        choices = _CHOICES.get((type_name, attribute), ())
        if choices and isinstance(element, str) and element not in choices:
            yield f"{_below(where, key)}: {_shown(element)}: expected {_one_of(choices)}"
    for key, attribute in keys.items():
        if value.get(key) is None and _is_required(type_name, attribute):
            yield f"{_below(where, key)}: missing; this key is required"


def _with_texts(quantities: Any) -> Any:
    """Quantities as texts, which the models want: numbers are good too, truth values are not."""
    if isinstance(quantities, dict):
        return {key: _with_texts(quantity) for key, quantity in quantities.items()}
    return str(quantities) if isinstance(quantities, int | float) and not isinstance(quantities, bool) else quantities


@cache
def _model(type_name: str) -> Any:
    from kubernetes.client import models  # half a second: only where there is something to check

    return getattr(models, type_name)


@cache
def _keys(type_name: str) -> dict[str, str]:
    """Keys as in a manifest, and the client's attributes for them."""
    return {key: attribute for attribute, key in _model(type_name).attribute_map.items()}


@cache
def _is_required(type_name: str, attribute: str) -> bool:
    """Whether the client's setter refuses ``None``: the models say it nowhere else."""
    model = _model(type_name)
    blank = model.__new__(model)
    blank.local_vars_configuration = _VALIDATING
    try:
        setattr(blank, attribute, None)
    except ValueError:
        return True
    return False


def _below(where: str, key: object) -> str:
    return f"{where}{key}" if where.endswith(" ") else f"{where}.{key}"


def _one_of(choices: Iterable[str]) -> str:
    return f"one of {', '.join(choices)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "..."
