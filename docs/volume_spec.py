"""Writes what ``docs/volume-spec.md`` says of each key, and the JSON schema for editors.

    python docs/volume_spec.py

Both come from the models that check a spec, in ``chunkflow_core/spec/``: the keys, types and
defaults from their fields, the texts from the docstring below each field.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chunkflow_core.spec import VolumeSpec
from chunkflow_core.spec.runner import InferResources, KubernetesRunner, LocalRunner, PodResources, PodVolume

Model = type[BaseModel]

DOCS = Path(__file__).parent
PAGE = DOCS / "volume-spec.md"
SCHEMA = DOCS / "volume-spec.schema.json"

_TABLE = re.compile(r"(<!-- keys of (\w+), by docs/volume_spec\.py -->\n).*?(<!-- end -->)", re.DOTALL)
_DEFAULT = re.compile(r" Default: (.*)\.$")


def page(text: str) -> str:
    """The page with its tables made anew, given the page."""
    tables = {"volumes": volume_rows, "pods": pod_rows}

    def table(match: re.Match[str]) -> str:
        rows = [f"| `{key}` | {default} | {what} |" for key, default, what in tables[match[2]]()]
        return "\n".join([match[1].rstrip(), "", "| key | default | what |", "|---|---|---|", *rows, "", match[3]])

    return _TABLE.sub(table, text)


def schema() -> dict[str, Any]:
    """The JSON schema of a spec as users write it, with what the page says of each key."""
    found = VolumeSpec.model_json_schema()
    del found["properties"]["folder"]  # loading sets it
    models = {model.__name__: model for model in _models(VolumeSpec)}
    for name, part in [("VolumeSpec", found), *found["$defs"].items()]:
        for key, value in part["properties"].items():
            value.pop("title", None)
            value["description"] = _plain(_texts(models[name]).get(key, ""))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def volume_rows() -> Iterator[tuple[str, str, str]]:
    """Key, default and text of each key that is not only for pods."""
    for key, field in VolumeSpec.model_fields.items():
        section = LocalRunner if key == "runner" else _model_in(field)
        if section is None and key != "folder":
            yield _row(VolumeSpec, key)
        elif section is not None:
            if key == "schedule":  # may also be a word
                yield _row(VolumeSpec, key)
            yield from _rows(section, f"{key}.", optional=field.default is None)


def pod_rows() -> Iterator[tuple[str, str, str]]:
    """Key, default and text of each key that is only for pods."""
    for key in KubernetesRunner.model_fields:
        if key not in LocalRunner.model_fields:
            name, default, text = _row(KubernetesRunner, key, "runner.")
            yield name, "" if key in ("infer", "blend") else default, text
        if key == "blend":
            for need in PodResources.model_fields:
                name, blend, text = _row(PodResources, need, "….")
                infer = _row(InferResources, need)[1]
                yield name, infer if infer == blend else f"{infer}; blend: {blend}", text
        if key == "volumes":
            yield from _rows(PodVolume, "runner.volumes.0.", optional=True)


def _rows(model: Model, prefix: str, *, optional: bool = False) -> Iterator[tuple[str, str, str]]:
    """The rows of a section, its kind first; ``optional`` if the whole section may be left out."""
    for key, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "kind"):
        inner = _model_in(field)
        if inner is not None and len(inner.model_fields) > 1:  # one key alone is told in the text
            yield from _rows(inner, f"{prefix}{key}.", optional=field.default is None)
        else:
            name, default, text = _row(model, key, prefix)
            yield name, "required there" if optional and default == "required" else default, text


def _row(model: Model, key: str, prefix: str = "") -> tuple[str, str, str]:
    text = _plain(_texts(model)[key])
    told = _DEFAULT.search(text)
    default = told[1] if told else _default(model.model_fields[key])
    linked = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", _DEFAULT.sub("", text))
    return prefix + key, default, linked.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "–"
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_number(v) for v in value)}]"
    return _number(value)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """A docstring in one line, as Markdown."""
    return " ".join(text.split()).replace("``", "`")


@cache
def _texts(model: Model) -> dict[str, str]:
    """The docstrings below the fields of a model and its bases.

    Pydantic could read them itself (``use_attribute_docstrings``), but whenever the models are
    imported, which takes a quarter longer then.
    """
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = ast.literal_eval(text.value)
    return found


def _model_in(field: FieldInfo) -> Model | None:
    """The first model that a field's value may be."""
    return next(_kinds(field.annotation), None)


def _models(model: Model) -> Iterator[Model]:
    """A model and all that its fields' values may be."""
    yield model
    for field in model.model_fields.values():
        for kind in _kinds(field.annotation):
            yield from _models(kind)


def _kinds(annotation: Any) -> Iterator[Model]:
    """All models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def main() -> int:
    """Write both files."""
    PAGE.write_text(page(PAGE.read_text()))
    SCHEMA.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
