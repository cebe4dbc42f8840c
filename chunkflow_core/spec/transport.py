"""Volume specs in environment variables: how a spec gets into a pod.

A pod sees none of the files around the spec's own. The spec travels as it was validated, variables
substituted, as base64 of zlib-compressed JSON, cut in pieces, since Linux takes no single variable
of 128 KiB (MAX_ARG_STRLEN)::

    CHUNKFLOW_SPEC, CHUNKFLOW_SPEC_1, CHUNKFLOW_SPEC_2, …

``load_spec("env:CHUNKFLOW_SPEC")`` reads it. Imported whenever Airflow parses its DAG files, so it
stays light.
"""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Iterator
from itertools import count
from typing import Any

from chunkflow_core.errors import SpecError
from chunkflow_core.spec.volume import VolumeSpec
from chunkflow_core.storage.addresses import plain

SPEC_VARIABLE = "CHUNKFLOW_SPEC"
FROM_ENVIRONMENT = "env:"
"""Prefix of the name of a spec that is in environment variables."""

_PIECE = 96 * 1024
_FOR_EVERY_MACHINE = re.compile(r"/|[\w+.-]+://")
_AGAIN = "Start the pod again by its Airflow task, or give the path of a YAML file"


def to_environment(spec: VolumeSpec) -> dict[str, str]:
    """The environment variables that give a pod this spec.

    What is Airflow's business alone is left out: who runs it, when, and whom it tells.

    Raises:
        SpecError: The spec would not mean the same in a pod; see :func:`check_transportable`.
    """
    check_transportable(spec)
    content = json.dumps(spec.model_dump(exclude={"runner", "schedule", "notify"}, exclude_defaults=True))
    text = base64.b64encode(zlib.compress(content.encode(), level=9)).decode()
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    return dict(zip(_names(SPEC_VARIABLE), pieces, strict=False))


def from_environment(name: str) -> dict[str, Any]:
    """The content of the spec in the variables ``name``, ``name_1``, …, not validated yet.

    Raises:
        SpecError: There is none, or it is not what :func:`to_environment` gave.
    """
    pieces: list[str] = []
    for variable in _names(name):
        if variable not in os.environ:
            break
        pieces.append(os.environ[variable])
    if not pieces:
        raise SpecError(f"{FROM_ENVIRONMENT}{name}: the environment variable {name} is not set. {_AGAIN}")
    try:
        data = json.loads(zlib.decompress(base64.b64decode("".join(pieces), validate=True)))
        if not isinstance(data, dict):
            raise ValueError(f"expected keys and values, got {data!r:.60}")
    except (ValueError, zlib.error) as error:
        raise SpecError(
            f"{FROM_ENVIRONMENT}{name}: the spec is cut off or garbled ({len(pieces)} variables, {error}). {_AGAIN}"
        ) from error
    return data


def check_transportable(spec: VolumeSpec, *, source: str = "spec") -> None:
    """Check that a spec means the same in a pod.

    Args:
        spec: The volume.
        source: Where the spec came from, for messages.

    Raises:
        SpecError: A path leads elsewhere in a pod, or an option can't be told in JSON.
    """
    if problems := [f"{source}: {problem}" for problem in _problems(spec)]:
        raise SpecError("\n".join(problems))


def _problems(spec: VolumeSpec) -> Iterator[str]:
    for key, path in {"model.path": spec.model.path, "model.weights": spec.model.weights}.items():
        if path is not None and not _FOR_EVERY_MACHINE.match(path):
            yield (
                f"{key}: {path}: a pod has neither the spec's folder nor your home; expected an absolute path in the "
                f"image or in a mounted volume, or a storage address such as gs://bucket/{path.rpartition('/')[2]}"
            )
    mask = spec.skip.mask
    sections = {"input": spec.input, "output": spec.output, "exchange": spec.exchange, "skip.mask": mask}
    places = {f"{key}.path": section.path for key, section in sections.items() if section is not None}
    places |= {"model.path": spec.model.path or "", "model.weights": spec.model.weights or ""}
    for key, path in places.items():
        if plain(path).startswith("file://~"):
            yield f"{key}: {path}: a pod has another home; expected an absolute path, or a storage address"
    yield from _no_json("model.options", spec.model.options)


def _no_json(key: str, value: Any) -> Iterator[str]:
    """Problems of a value that would not be the same, once it has been JSON."""
    if isinstance(value, dict):
        for name, part in value.items():
            if isinstance(name, str):
                yield from _no_json(f"{key}.{name}", part)
            else:
                yield f"{key}: {name!r}: a pod gets texts as keys only; write it in quotes"
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _no_json(f"{key}.{number}", part)
    elif not isinstance(value, str | int | float | None):
        yield f"{key}: {value!r}: a pod gets texts, numbers, true, false and null only; write it in quotes"


def _names(first: str) -> Iterator[str]:
    yield first
    for number in count(1):
        yield f"{first}_{number}"
