"""What users write wrong in the Kubernetes objects of a spec is told before a pod is made."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from chunkflow_core.errors import SpecError
from operators.kubernetes.manifest import check_runner
from tests.operators.kubernetes.manifests import (
    REQUIRED,
    SECTIONS,
    TEMPLATE,
    ZONE_A,
    Json,
    build,
    make_runner,
)

WHERE = "runner.pod_template: pod.yaml: "
BAD: dict[str, tuple[Json, str]] = {
    # case: (infer's keys), (the message after "runner.infer.")
    "unknown key": (
        {"tolerations": [{"key": "a"}, {"efect": "NoSchedule"}]},
        "tolerations.1.efect: unknown key; did you mean effect?",
    ),
    "Python's way to write a key": (
        {"tolerations": [{"toleration_seconds": 3}]},
        "tolerations.0.toleration_seconds: unknown key; did you mean tolerationSeconds?",
    ),
    "key from elsewhere": (
        {"tolerations": [{"zebra": 3}]},
        "tolerations.0.zebra: unknown key; expected one of effect, key, operator, tolerationSeconds, value",
    ),
    "truth for a text": (
        {"tolerations": [{"key": "spot", "value": True}]},
        "tolerations.0.value: true: expected a text; numbers and true, false, dates in quotes",
    ),
    "text for a number": (
        {"tolerations": [{"tolerationSeconds": "60"}]},
        'tolerations.0.tolerationSeconds: "60": expected an integer',
    ),
    "truth for a number": (
        {"tolerations": [{"tolerationSeconds": True}]},
        "tolerations.0.tolerationSeconds: true: expected an integer",
    ),
    "unknown effect": (
        {"tolerations": [{"key": "a", "effect": "noSchedule"}]},
        'tolerations.0.effect: "noSchedule": expected one of NoSchedule, PreferNoSchedule, NoExecute',
    ),
    "list for keys": (
        {"affinity": {"nodeAffinity": [1, 2]}},
        "affinity.nodeAffinity: [1, 2]: expected keys and values "
        "(preferredDuringSchedulingIgnoredDuringExecution, requiredDuringSchedulingIgnoredDuringExecution)",
    ),
    "keys for a list": (
        {"affinity": {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": {}}}}},
        f"affinity.nodeAffinity.{REQUIRED}.nodeSelectorTerms: {{}}: expected a list",
    ),
    "missing key": (
        {"affinity": {"nodeAffinity": {REQUIRED: {}}}},
        f"affinity.nodeAffinity.{REQUIRED}.nodeSelectorTerms: missing; this key is required",
    ),
    "key without value": (
        {"affinity": {"podAffinity": {REQUIRED: [{"topologyKey": None}]}}},
        f"affinity.podAffinity.{REQUIRED}.0.topologyKey: missing; this key is required",
    ),
    "empty element": (
        {"affinity": {"podAffinity": {REQUIRED: [None]}}},
        f"affinity.podAffinity.{REQUIRED}.0: empty",
    ),
    "deep in an expression": (
        {
            "affinity": {
                "nodeAffinity": {
                    REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [{**ZONE_A, "operator": "in"}]}]}
                }
            }
        },
        f"affinity.nodeAffinity.{REQUIRED}.nodeSelectorTerms.0.matchExpressions.0.operator: "
        '"in": expected one of In, NotIn, Exists, DoesNotExist, Gt, Lt',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_object_is_told_in_one_line(case: str) -> None:
    resources, message = BAD[case]
    with pytest.raises(SpecError) as told:
        check_runner(make_runner(infer=resources), ".")
    assert str(told.value) == f"runner.infer.{message}"


BAD_TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "no YAML": ("spec: [", ["runner.pod_template: {path}: not valid YAML: "]),
    "too deep": (
        "spec: " + "[" * 40_000,
        ["runner.pod_template: {path}: not valid YAML: lists or mappings are nested too deep"],
    ),
    "too deep without brackets": (
        "spec:\n  " + "- " * 40_000,
        ["runner.pod_template: {path}: not valid YAML: lists or mappings are nested too deep"],
    ),
    "a key twice": (
        "spec: {}\nspec: {}\n",
        ["runner.pod_template: {path}: not valid YAML: line 2, column 1: the key 'spec' stands twice"],
    ),
    "no manifest": (
        "- 1",
        ["runner.pod_template: {path}: expected the manifest of one pod (apiVersion, kind, spec, …)"],
    ),
    "of a Job": ("{apiVersion: batch/v1, kind: Job}", [WHERE + "expected apiVersion: v1 and kind: Pod"]),
    "empty pod": ("{kind: Pod}", [WHERE + "spec.containers: missing; expected one called base"]),
    "no containers": ("{spec: {hostNetwork: true}}", [WHERE + "spec.containers: missing; this key is required"]),
    "empty containers": ("{spec: {containers: []}}", [WHERE + "spec.containers: missing; expected one called base"]),
    "several at once": (
        "{metadata: {label: {}}, spec: {containers: [{nam: base, env: [{name: A, value: 1}]}], tolerations: {}}}",
        [
            WHERE + "metadata.label: unknown key; did you mean labels?",
            WHERE + "spec.containers.0.nam: unknown key; did you mean name?",
            WHERE + "spec.containers.0.env.0.value: 1: expected a text; numbers and true, false, dates in quotes",
            WHERE + "spec.containers.0.name: missing; this key is required",
            WHERE + "spec.tolerations: {{}}: expected a list",
        ],
    ),
    "what is ours to decide": (
        "{spec: {restartPolicy: OnFailure, containers: [{name: a, args: [x]}, {name: base, command: [x], args: [y], "
        "resources: {limits: {nvidia.com/gpu: 1, memory: 1Gi}}}]}}",
        [
            WHERE + 'spec.restartPolicy: "OnFailure": expected Never; Airflow retries failed pods',
            WHERE + "spec.containers.1.command: remove it; the pod's step decides what this container runs",
            WHERE + "spec.containers.1.args: remove it; the pod's step decides what this container runs",
            WHERE + "spec.containers.1.resources.limits.nvidia.com/gpu: remove it; GPUs are asked for by "
            "runner.infer.gpu and runner.blend.gpu",
        ],
    ),
    "quantity that is none": (
        "{spec: {containers: [{name: base, resources: {limits: {cpu: true}}}]}}",
        [
            WHERE
            + "spec.containers.0.resources.limits.cpu: true: expected a text; numbers and true, false, dates in quotes"
        ],
    ),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_bad_template_is_told(case: str, tmp_path: Path) -> None:
    text, lines = BAD_TEMPLATES[case]
    (tmp_path / "pod.yaml").write_text(text)
    with pytest.raises(SpecError) as told:
        check_runner(make_runner(pod_template="pod.yaml"), str(tmp_path))
    expected = [line.format(path=tmp_path / "pod.yaml") for line in lines]
    if case == "no YAML":
        assert str(told.value).startswith(expected[0]) and "\n" not in str(told.value)
    else:
        assert str(told.value).splitlines() == expected


def test_missing_template_is_told_when_checked_and_when_needed(tmp_path: Path) -> None:
    runner = make_runner(pod_template="nix.yaml")
    message = re.escape(f"runner.pod_template: cannot read {tmp_path}/nix.yaml: No such file or directory")
    with pytest.raises(SpecError, match=f"^{message}$"):
        check_runner(runner, str(tmp_path))
    with pytest.raises(SpecError, match=f"^{message}$"):
        build(runner, tmp_path)


def test_problems_of_both_stages_and_the_template_are_told_together(tmp_path: Path) -> None:
    bad = {"tolerations": [{"kee": "a"}]}
    with pytest.raises(SpecError) as told:
        check_runner(make_runner(infer=bad, blend=bad, pod_template="nix.yaml"), str(tmp_path))
    assert [line.split(": ")[0] for line in str(told.value).splitlines()] == [
        "runner.infer.tolerations.0.kee",
        "runner.blend.tolerations.0.kee",
        "runner.pod_template",
    ]


def test_a_check_takes_few_milliseconds(tmp_path: Path) -> None:
    """Airflow does it at every parsing of the DAG's file.

    The slower of YAML's parsers takes some milliseconds to read the template.
    """
    (tmp_path / "pod.yaml").write_text(TEMPLATE)
    runner = make_runner(**SECTIONS["placed"], pod_template="pod.yaml")
    check_runner(runner, str(tmp_path))  # imports the client

    def least_time(function: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    of_parsing = least_time(lambda: yaml.load(TEMPLATE, yaml.SafeLoader))
    assert least_time(lambda: check_runner(runner, str(tmp_path))) < 2 * of_parsing


def test_without_raw_objects_the_client_is_not_imported() -> None:
    program = """
import sys
from chunkflow_core.spec.runner import KubernetesRunner
from operators.kubernetes.manifest import check_runner
check_runner(KubernetesRunner(kind="kubernetes", image="a"), ".")
print(sorted({"kubernetes", "airflow", "torch"} & set(sys.modules)))
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert outcome.stdout == "[]\n"
