"""Volume specs in environment variables: how a spec gets into a pod.

A pod sees none of the files around the spec's own. The spec travels as it was validated, as base64
of zlib-compressed JSON, cut in pieces, since Linux takes no single variable of 128 KiB
(MAX_ARG_STRLEN)::

    CHUNKFLOW_SPEC, CHUNKFLOW_SPEC_1, CHUNKFLOW_SPEC_2, …

``load_spec("env:CHUNKFLOW_SPEC")`` reads it. Many can read a pod's manifest, so a variable of the
spec travels by its name: the pod has it from the cluster. Imported whenever Airflow parses its DAG
files, so it stays light.
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
from chunkflow_core.spec.runner import KubernetesRunner
from chunkflow_core.spec.volume import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.variables import Place, names_in, put_back

SPEC_VARIABLE = "CHUNKFLOW_SPEC"
FROM_ENVIRONMENT = "env:"
"""Prefix of the name of a spec that is in environment variables."""

_PIECE = 96 * 1024
_AIRFLOWS = {"runner", "schedule", "notify"}
"""Sections that are Airflow's business alone: who runs the volume, when, and whom it tells."""
_VARIABLES = "variables"
"""Key of places and texts with variables, beside the spec's own keys."""
_FOR_EVERY_MACHINE = re.compile(r"/|[\w+.-]+://")
_AGAIN = "Start the pod again by its Airflow task, or give the path of a YAML file"


def to_environment(spec: VolumeSpec) -> dict[str, str]:
    """The environment variables that give a pod this spec.

    What is Airflow's business alone is left out. Texts with variables go as the file has them.

    Raises:
        SpecError: The spec would not mean the same in a pod; see :func:`check_transportable`.
    """
    check_transportable(spec)
    content = put_back(spec.model_dump(exclude=_AIRFLOWS, exclude_defaults=True), spec.texts)
    if texts := _in_pods(spec):
        content[_VARIABLES] = list(texts.items())
    text = base64.b64encode(zlib.compress(json.dumps(content).encode(), level=9)).decode()
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    return dict(zip(_names(SPEC_VARIABLE), pieces, strict=False))


def from_environment(name: str) -> tuple[dict[str, Any], dict[Place, str]]:
    """The content of the spec in the variables ``name``, ``name_1``, …, not validated yet.

    Returns:
        Keys and values, and those texts among them, by place, whose variables are to be replaced.

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
            raise ValueError("expected keys and values")
        texts = {tuple(place): text for place, text in data.pop(_VARIABLES, [])}
    except (ValueError, TypeError, zlib.error) as error:
        raise SpecError(
            f"{FROM_ENVIRONMENT}{name}: the spec is cut off or garbled ({len(pieces)} variables, {error}). {_AGAIN}"
        ) from error
    return data, texts


def check_transportable(spec: VolumeSpec, *, source: str = "spec") -> None:
    """Check that a spec means the same in a pod.

    Args:
        spec: The volume.
        source: Where the spec came from, for messages.

    Raises:
        SpecError: A path leads elsewhere in a pod, an option can't be told in JSON, or pods don't
            get a variable that the spec needs.
    """
    if problems := [f"{source}: {problem}" for problem in _problems(spec)]:
        raise SpecError("\n".join(problems))


def _in_pods(spec: VolumeSpec) -> dict[Place, str]:
    """The texts with variables that travel, by place."""
    return {place: text for place, text in spec.texts.items() if place[0] not in _AIRFLOWS}


def _problems(spec: VolumeSpec) -> Iterator[str]:
    yield from _missing_variables(spec)
    model: dict[Place, str] = {("model", "path"): spec.model.path} if spec.model.path is not None else {}
    if isinstance(spec.model.weights, str):
        model["model", "weights"] = spec.model.weights
    else:
        model |= {("model", "weights", number): path for number, path in enumerate(spec.model.checkpoints)}
    model |= {("model", "files", number): path for number, path in enumerate(spec.model.files)}
    for place, path in model.items():
        if not _FOR_EVERY_MACHINE.match(path):
            told = spec.texts.get(place, path)
            yield (
                f"{_key(place)}: {told}: a pod has neither the spec's folder nor your home; expected an absolute path "
                f"in the image or in a mounted volume, or a storage address such as gs://bucket/{told.rpartition('/')[2]}"
            )
    mask = spec.skip.mask
    sections = {"input": spec.input, "output": spec.output, "exchange": spec.exchange, "skip.mask": mask}
    places = {(*key.split("."), "path"): section.path for key, section in sections.items() if section is not None}
    for place, path in (places | model).items():
        if plain(path).startswith("file://~"):
            told = spec.texts.get(place, path)
            yield f"{_key(place)}: {told}: a pod has another home; expected an absolute path, or a storage address"
    yield from _no_json("model.options", spec.model.options)
    yield from _no_json("model.arguments", spec.model.arguments)


def _key(place: Place) -> str:
    return ".".join(map(str, place))


def _missing_variables(spec: VolumeSpec) -> Iterator[str]:
    """Problems of variables that pods don't get; what Secrets and templates bring is not known."""
    runner = spec.runner
    if not isinstance(runner, KubernetesRunner) or runner.env_from or runner.pod_template:
        return
    for place, text in _in_pods(spec).items():
        for name in names_in(text):
            if name not in runner.env and name not in runner.secret_env:
                yield (
                    f"{_key(place)}: {text}: pods don't have the variable {name}; add it to "
                    f"runner.secret_env ({name}: {{secret: …, key: …}}), or to runner.env, where it can be read in the "
                    f'pods\' manifests ({name}: "${{{name}}}")'
                )


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
