"""The manifest that a volume's pods start from, if its spec names one: read and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from chunkflow_core.errors import SpecError
from chunkflow_core.spec.runner import KubernetesRunner
from chunkflow_core.spec.yaml_text import parse_yaml, problem_in_yaml
from operators.kubernetes.checks import problems
from operators.kubernetes.ends import BASE

Json = dict[str, Any]


def read_template(runner: KubernetesRunner, folder: str) -> Json:
    """The template without its nulls; empty if the spec names none.

    Raises:
        SpecError: It can't be read.
    """
    if runner.pod_template is None:
        return {}
    path = Path(folder, runner.pod_template)
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"runner.pod_template: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"runner.pod_template: {path}: not valid YAML: {problem_in_yaml(error)}") from error
    if not isinstance(content, dict):
        raise SpecError(f"runner.pod_template: {path}: expected the manifest of one pod (apiVersion, kind, spec, …)")
    return dict(without_nulls(content))


def template_problems(runner: KubernetesRunner, folder: str) -> list[str]:
    """What is wrong with the template, one line for each."""
    where = f"runner.pod_template: {runner.pod_template}"
    try:
        template = read_template(runner, folder)
    except SpecError as error:
        return [str(error)]
    if (template.get("apiVersion", "v1"), template.get("kind", "Pod")) != ("v1", "Pod"):
        return [f"{where}: expected apiVersion: v1 and kind: Pod"]
    content = {key: value for key, value in template.items() if key != "status"}  # kubectl's templates have it, empty
    found = list(problems(content, "V1Pod", f"{where}: "))
    if found:
        return found
    spec = template.get("spec", {})
    if not spec.get("containers"):
        return [f"{where}: spec.containers: missing; expected one called {BASE}"]
    if spec.get("restartPolicy", "Never") != "Never":
        found.append(
            f"{where}: spec.restartPolicy: {json.dumps(spec['restartPolicy'])}: expected Never; Airflow retries failed "
            "pods"
        )
    ours, _ = split_containers(spec["containers"])
    place = f"{where}: spec.containers.{spec['containers'].index(ours)}"
    found += [
        f"{place}.{key}: remove it; the pod's step decides what this container runs"
        for key in ("command", "args")
        if ours.get(key)
    ]
    gpus = {runner.infer.gpu_resource, runner.blend.gpu_resource}
    found += [
        f"{place}.resources.{kind}.{gpu}: remove it; GPUs are asked for by runner.infer.gpu and runner.blend.gpu"
        for kind in ("requests", "limits")
        for gpu in sorted(gpus & set(ours.get("resources", {}).get(kind, {})))
    ]
    return found


def split_containers(containers: Sequence[Json]) -> tuple[Json, list[Json]]:
    """Our container, which is the one called ``base`` or else the first, and the others."""
    if not containers:
        return {}, []
    ours = next((c for c in containers if c.get("name") == BASE), containers[0])
    return ours, [c for c in containers if c is not ours]


def without_nulls(value: Any) -> Any:
    """What Kubernetes makes of it: a key without a value is one that isn't there."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
