"""The ``runner`` section of a spec as users write it: what is read, what mistakes are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import load_spec
from chunkflow_core.spec.runner import KubernetesRunner, LocalRunner, PodResources, parse_memory

MakeSpec = Callable[..., Path]
Command = Callable[..., Any]

POD = {"kind": "kubernetes", "image": "lab/worker:1"}
CLAIM = {"mount": "/data", "claim": "em"}


# ------------------------------------------------------------------------------------ good sections


def test_without_a_section_tasks_are_processes(make_spec: MakeSpec) -> None:
    runner = load_spec(make_spec()).runner
    assert isinstance(runner, LocalRunner)
    assert (runner.parallel, runner.pool, runner.retries, runner.retry_delay) == (None, "default_pool", 3, 30.0)


def test_an_image_is_all_that_pods_need(make_spec: MakeSpec) -> None:
    runner = load_spec(make_spec(runner=POD)).runner
    assert isinstance(runner, KubernetesRunner)
    assert (runner.infer.cpu, runner.infer.memory, runner.infer.gpu, runner.infer.spot) == (4, "16Gi", 1, "never")
    assert runner.blend == PodResources(cpu=1, memory="2Gi", gpu=0)
    assert runner.infer.largest_memory == 64 * 2**30
    assert (runner.deferrable, runner.namespace, runner.connection) == (True, None, "kubernetes_default")


def test_a_full_section_is_read_as_it_stands(make_spec: MakeSpec) -> None:
    section = {
        **POD,
        "infer": {"cpu": 7.5, "memory": "1.5Gi", "memory_max": "3Gi", "spot": "required", "node_selector": {"a": ""}},
        "volumes": [CLAIM, {"mount": "/data/secrets", "secret": "cloud.keys", "read_only": True}],
        "env": {"OMP_NUM_THREADS": "2"},
        "secret_env": {"TOKEN": {"secret": "s", "key": "a.b_c-d"}},
        "labels": {"example.org/team": "em_1"},
        "annotations": {"example.org/note": "anything: goes"},
    }
    runner = load_spec(make_spec(runner=section)).runner
    assert isinstance(runner, KubernetesRunner)
    assert (runner.infer.cpu, runner.infer.gpu, runner.infer.largest_memory) == (7.5, 1, 3 * 2**30)
    assert [volume.mount for volume in runner.volumes] == ["/data", "/data/secrets"]
    assert runner.secret_env["TOKEN"].key == "a.b_c-d"
    assert runner.model_dump(exclude_unset=True) == section


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        ("1Mi", 2**20),
        ("1048576", 2**20),
        ("1025Ki", 1025 * 2**10),
        ("2000k", 2_000_000),
        ("500M", 500_000_000),
        ("1.5Gi", 3 * 2**29),
        ("1T", 10**12),
        ("1Ti", 2**40),
        ("0.001P", 10**12),
    ],
)
def test_memory_is_counted_as_kubernetes_counts_it(quantity: str, size: int) -> None:
    assert parse_memory(quantity) == size


@pytest.mark.parametrize(
    "image",
    ["worker", "lab/worker", "localhost:5000/w:1", "a.example.org/b/c_d:V1.0-x", f"a/b@sha256:{'0' * 64}", "a__b"],
)
def test_images_of_all_kinds(make_spec: MakeSpec, image: str) -> None:
    runner = load_spec(make_spec(runner={**POD, "image": image})).runner
    assert isinstance(runner, KubernetesRunner)
    assert runner.image == image


@pytest.mark.parametrize(
    "section",
    [
        {"retries": 9},
        POD,
        {**POD, "volumes": [CLAIM], "infer": {"memory": "1Gi", "spot": "allowed"}, "env": {"A": "1"}},
    ],
)
def test_what_runs_the_tasks_decides_no_number(make_spec: MakeSpec, section: dict[str, Any]) -> None:
    assert load_spec(make_spec(runner=section)).fingerprint == load_spec(make_spec()).fingerprint


def test_set_makes_pods_of_processes_and_changes_what_lies_deep(make_spec: MakeSpec) -> None:
    overrides = [
        "runner.kind=kubernetes",
        "runner.image=lab/worker:2",
        "runner.infer.memory=3Gi",
        "runner.infer.cpu=2",
        "runner.env.LEVEL='1'",
        "runner.blend.tolerations=[{key: lab, operator: Exists}]",
        "runner.volumes=[{mount: /dev/shm, memory: 1Gi}]",
    ]
    runner = load_spec(make_spec(), overrides).runner
    assert isinstance(runner, KubernetesRunner)
    assert (runner.image, runner.infer.memory, runner.infer.cpu) == ("lab/worker:2", "3Gi", 2)
    assert runner.infer.gpu == 1, "what is said of inference's memory takes no GPU away"
    assert runner.blend.tolerations == [{"key": "lab", "operator": "Exists"}]
    assert (runner.env, runner.volumes[0].memory) == ({"LEVEL": "1"}, "1Gi")


def test_set_makes_processes_of_pods(make_spec: MakeSpec) -> None:
    assert isinstance(load_spec(make_spec(runner=POD), ["runner={kind: local}"]).runner, LocalRunner)
    with pytest.raises(SpecError, match=r"runner\.kind: local: expected kubernetes, as image is for pods$"):
        load_spec(make_spec(runner=POD), ["runner.kind=local"])


# ------------------------------------------------------------------------------------ documentation

DOCUMENTATION = (Path(__file__).parents[3] / "docs" / "volume-spec.md").read_text()


def test_documented_sections_are_good(make_spec: MakeSpec) -> None:
    examples = re.findall(r"```yaml\n(runner:.*?)```", DOCUMENTATION, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        runner = load_spec(make_spec(**yaml.safe_load(example))).runner
        assert isinstance(runner, KubernetesRunner)


# ------------------------------------------------------------------------------------- bad sections

AMOUNT = 'expected an amount such as "16Gi" or "500M", at least "1Mi"'
PATH = 'expected an absolute path such as "/data", without .. or : in it or / at its end'
NAME = "expected up to 253 lower-case letters, digits, dashes and dots"
SOURCES = "expected exactly one of claim, host_path, secret, config_map, memory"
RESOURCES = (
    "cpu, memory, memory_max, gpu, gpu_resource, ephemeral_storage, node_selector, tolerations, affinity, spot, "
    "priority_class, deadline"
)

BAD: dict[str, tuple[Any, str]] = {
    # case: (the section, what the message says after "runner")
    "no section": (None, ": null: expected a section with keys below it (parallel, pool, retries, retry_delay, kind)"),
    "a word for a section": (
        "kubernetes",
        ': "kubernetes": expected a section with keys below it (parallel, pool, retries, retry_delay, kind)',
    ),
    "unknown kind": ({"kind": "k8s"}, '.kind: "k8s": expected local or kubernetes'),
    "unknown kind with keys of pods": (
        {"kind": "k8s", "image": "a", "infer": {}},
        ".kind: k8s: expected kubernetes, as image is for pods",
    ),
    "kind left out": ({"image": "lab/worker:1"}, ".kind: local: expected kubernetes, as image is for pods"),
    "unknown key of processes": ({"retrys": 1}, ".retrys: unknown key; did you mean retries?"),
    "empty pool": ({"pool": ""}, '.pool: "": string should have at least 1 character'),
    "endless delay": ({"retry_delay": float("inf")}, ".retry_delay: Infinity: input should be a finite number"),
    "pods at a time": (
        {**POD, "parallel": 8},
        ".parallel: 8: Airflow does not count tasks that have left their worker; make a pool that includes deferred "
        "tasks (airflow pools set NAME SLOTS TEXT --include-deferred) and name it as runner.pool",
    ),
    "no image": ({"kind": "kubernetes"}, ".image: missing; this key is required"),
    "bad image": (
        {**POD, "image": "My Image"},
        '.image: "My Image": expected a container image such as "example.org/lab/chunkflow-worker:1.0"',
    ),
    "unknown key": ({**POD, "imagee": 1}, ".imagee: unknown key; did you mean image?"),
    "bad pull policy": (
        {**POD, "image_pull_policy": "always"},
        ".image_pull_policy: \"always\": input should be 'Always', 'IfNotPresent' or 'Never'",
    ),
    "bad pull secret": ({**POD, "image_pull_secrets": ["A"]}, f'.image_pull_secrets.0: "A": {NAME}'),
    "bad namespace": (
        {**POD, "namespace": "a.b"},
        '.namespace: "a.b": expected up to 63 lower-case letters, digits and dashes',
    ),
    "root": ({**POD, "run_as_user": 0}, ".run_as_user: 0: input should be greater than or equal to 1"),
    "memory that doesn't grow": ({**POD, "memory_growth": 1}, ".memory_growth: 1: input should be greater than 1"),
    "empty template": ({**POD, "pod_template": ""}, '.pod_template: "": string should have at least 1 character'),
    # resources
    "empty resources": ({**POD, "infer": None}, f".infer: null: expected a section with keys below it ({RESOURCES})"),
    "unknown resource": ({**POD, "infer": {"gpus": 1}}, ".infer.gpus: unknown key; did you mean gpu?"),
    "no CPU": ({**POD, "blend": {"cpu": 0}}, ".blend.cpu: 0: input should be greater than 0"),
    "endless CPUs": (
        {**POD, "blend": {"cpu": float("inf")}},
        ".blend.cpu: Infinity: input should be a finite number",
    ),
    "half a GPU": ({**POD, "infer": {"gpu": 0.5}}, ".infer.gpu: 0.5: input should be a valid integer"),
    "bad GPU": (
        {**POD, "infer": {"gpu_resource": "gpu"}},
        '.infer.gpu_resource: "gpu": expected a resource of nodes such as "nvidia.com/gpu"',
    ),
    "memory without unit": ({**POD, "infer": {"memory": 16}}, f".infer.memory: 16: {AMOUNT}"),
    "memory in other units": ({**POD, "infer": {"memory": "16GB"}}, f'.infer.memory: "16GB": {AMOUNT}'),
    "memory with a space": ({**POD, "infer": {"memory": "16 Gi"}}, f'.infer.memory: "16 Gi": {AMOUNT}'),
    "sixteen bytes": ({**POD, "infer": {"memory": "16"}}, f'.infer.memory: "16": {AMOUNT}'),
    "bad disk": ({**POD, "infer": {"ephemeral_storage": "x"}}, f'.infer.ephemeral_storage: "x": {AMOUNT}'),
    "memory above its limit": (
        {**POD, "infer": {"memory": "4Gi", "memory_max": "4G"}},
        ".infer.memory_max: 4G is less than memory: 4Gi",
    ),
    "unknown spot": (
        {**POD, "infer": {"spot": True}},
        ".infer.spot: true: input should be 'never', 'allowed' or 'required'",
    ),
    "toleration that is a word": (
        {**POD, "infer": {"tolerations": ["gpu"]}},
        '.infer.tolerations.0: "gpu": input should be a valid dictionary',
    ),
    "bad selector": (
        {**POD, "blend": {"node_selector": {"a": True}}},
        '.blend.node_selector: {"a": true}: expected texts as values, in quotes; got a: True',
    ),
    # volumes
    "one volume, not in a list": (
        {**POD, "volumes": CLAIM},
        '.volumes: {"mount": "/data", "claim": "em"}: input should be a valid list',
    ),
    "volume without mount": ({**POD, "volumes": [{"claim": "em"}]}, ".volumes.0.mount: missing; this key is required"),
    "volume from nowhere": ({**POD, "volumes": [{"mount": "/a"}]}, f".volumes.0.mount: /a: {SOURCES}"),
    "volume from two places": (
        {**POD, "volumes": [CLAIM, {"mount": "/a", "claim": "b", "memory": "1Gi"}]},
        f".volumes.1.mount: /a: {SOURCES}",
    ),
    "two volumes in one place": (
        {**POD, "volumes": [CLAIM, {"mount": "/data", "secret": "b"}]},
        '.volumes: [{"mount": "/data", "claim": "em"}, {"mount": "/data", "secret": "b"}]: '
        "/data is the mount of two volumes",
    ),
    "relative mount": ({**POD, "volumes": [{"mount": "data", "claim": "em"}]}, f'.volumes.0.mount: "data": {PATH}'),
    "mount that climbs": ({**POD, "volumes": [{**CLAIM, "mount": "/a/../b"}]}, f'.volumes.0.mount: "/a/../b": {PATH}'),
    "mount with a colon": ({**POD, "volumes": [{**CLAIM, "mount": "/a:b"}]}, f'.volumes.0.mount: "/a:b": {PATH}'),
    "mount with / at the end": ({**POD, "volumes": [{**CLAIM, "mount": "/a/"}]}, f'.volumes.0.mount: "/a/": {PATH}'),
    "relative folder of the node": (
        {**POD, "volumes": [{"mount": "/a", "host_path": "b"}]},
        f'.volumes.0.host_path: "b": {PATH}',
    ),
    "bad claim": ({**POD, "volumes": [{"mount": "/a", "claim": "My Claim"}]}, f'.volumes.0.claim: "My Claim": {NAME}'),
    "sub path that climbs": (
        {**POD, "volumes": [{**CLAIM, "sub_path": "../b"}]},
        '.volumes.0.sub_path: "../b": expected a path within the volume such as "em/raw", without .. in it',
    ),
    # variables, labels
    "number as a variable": (
        {**POD, "env": {"A": 4}},
        '.env: {"A": 4}: expected texts as values, in quotes; got A: 4',
    ),
    "bad name of a variable": (
        {**POD, "env": {"A-B": "4"}},
        '.env: {"A-B": "4"}: expected names of environment variables, other than CHUNKFLOW_SPEC, CHUNKFLOW_CPUS; '
        "got A-B",
    ),
    "variable of ours": (
        {**POD, "secret_env": {"CHUNKFLOW_SPEC_X": {}}},
        '.secret_env: {"CHUNKFLOW_SPEC_X": {}}: expected names of environment variables, other than CHUNKFLOW_SPEC, '
        "CHUNKFLOW_CPUS; got CHUNKFLOW_SPEC_X",
    ),
    "variable with two values": (
        {**POD, "env": {"A": "4"}, "secret_env": {"A": {"secret": "a", "key": "b"}}},
        ".secret_env: A: expected variables that env doesn't set",
    ),
    "secret without key": (
        {**POD, "secret_env": {"A": {"secret": "s"}}},
        ".secret_env.A.key: missing; this key is required",
    ),
    "secret that is a word": (
        {**POD, "secret_env": {"A": "s"}},
        '.secret_env.A: "s": expected a section with keys below it (secret, key)',
    ),
    "bad key of a secret": (
        {**POD, "secret_env": {"A": {"secret": "s", "key": "a/b"}}},
        '.secret_env.A.key: "a/b": expected a key of the Secret: letters, digits, dots, dashes and underscores',
    ),
    "label of ours": (
        {**POD, "labels": {"chunkflow/stage": "x"}},
        """.labels: {"chunkflow/stage": "x"}: expected keys that don't begin with chunkflow/, got chunkflow/stage""",
    ),
    "bad label": (
        {**POD, "labels": {"a b": "x"}},
        '.labels: {"a b": "x"}: expected keys such as example.org/team, got a b',
    ),
    "bad value of a label": (
        {**POD, "labels": {"a": "-x"}},
        """.labels: {"a": "-x"}: expected values of up to 63 letters, digits, - _ . in between; got a: '-x'""",
    ),
    "annotation that is no text": (
        {**POD, "annotations": {"a": True}},
        '.annotations: {"a": true}: expected texts as values, in quotes; got a: True',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_section_is_told_in_one_line(make_spec: MakeSpec, chunkflow: Command, case: str) -> None:
    section, message = BAD[case]
    path = make_spec()
    path.write_text(path.read_text() + yaml.safe_dump({"runner": section}, sort_keys=False))
    outcome = chunkflow("plan", path)
    assert outcome.returncode == 78
    assert outcome.stderr == f"error: {path}: runner{message}\n"


def test_several_mistakes_are_told_at_once(make_spec: MakeSpec, chunkflow: Command) -> None:
    section = {**POD, "image": "?", "infer": {"memory": 1, "gpus": 2}, "volumes": [{"mount": "/a"}, {"claim": "b"}]}
    outcome = chunkflow("plan", make_spec(runner=section))
    places = [line.split("runner.")[1].split(":")[0] for line in outcome.stderr.splitlines()]
    assert places == ["image", "infer.memory", "infer.gpus", "volumes.0.mount", "volumes.1.mount"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runner.infer.memory=16", f"runner.infer.memory: 16: {AMOUNT}"),
        ("runner.infer.memry=16Gi", "runner.infer.memry: unknown key; did you mean memory?"),
        ("runner.image=", "runner.image: null: expected a container image such as"),
        ("runner.volumes.0.claim=x", "volumes is a value, it has no keys below it"),
    ],
)
def test_bad_set_is_told(make_spec: MakeSpec, chunkflow: Command, override: str, message: str) -> None:
    outcome = chunkflow("plan", make_spec(runner={**POD, "volumes": [CLAIM]}), "--set", override)
    assert outcome.returncode == 78
    assert len(outcome.stderr.splitlines()) == 1
    assert message in outcome.stderr


def test_a_hopeless_image_is_told_at_once(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match="expected a container image"):
        load_spec(make_spec(runner={**POD, "image": "a" + "_" * 5000 + "!"}))
