"""What docs/kubernetes.md shows works: specs parse, values render, commands have their flags."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkflow_core.spec import load_spec
from chunkflow_core.spec.runner import KubernetesRunner, PodResources, PodVolume
from operators.kubernetes.manifest import check_runner, own_labels, pod_manifest

from .conftest import AIRFLOW_VALUES, CHART, OFFICIAL, ROOT, Helm, Render
from .test_chart import SPEC, of_kind
from .test_security import pod_specs, pod_weaknesses

KUBECTL = str(Path(sys.executable).with_name("kubectl"))
PAGE = ROOT / "docs" / "kubernetes.md"
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
FILES = {text.split("\n", 1)[0].removeprefix("# "): text for kind, text in BLOCKS if kind == "yaml"}
"""YAML of the page by the file name that its first line says."""
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.replace("\\\n", " ").splitlines()
]
KEYS = {
    "chart": set(yaml.safe_load((CHART / "values.yaml").read_text())),
    "airflow": set(yaml.safe_load(AIRFLOW_VALUES.read_text())),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the page."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_yaml_block_is_a_file_of_a_known_kind() -> None:
    assert len(FILES) == sum(kind == "yaml" for kind, _ in BLOCKS)
    for name, text in FILES.items():
        assert name.endswith(".yaml")
        keys = set(yaml.safe_load(text))
        assert "runner" in keys or any(keys <= known for known in KEYS.values()), name


@pytest.mark.parametrize("name", [name for name, text in FILES.items() if "runner" in yaml.safe_load(text)])
def test_specs_parse_and_their_pods_are_unprivileged(folder: Path, name: str) -> None:
    if "patch_size" not in yaml.safe_load(FILES[name]):
        (folder / name).write_text(SPEC + FILES[name])
    runner = load_spec(folder / name).runner
    assert isinstance(runner, KubernetesRunner)
    check_runner(runner, str(folder))
    pod = pod_manifest(
        runner,
        folder=str(folder),
        resources=runner.infer,
        memory=2**30,
        name="em-infer",
        labels=own_labels("em", "infer", None),
        arguments=[],
        environment={},
    )
    assert list(pod_weaknesses(pod["spec"])) == []  # of the namespace's label in step 3


def test_pools_of_the_specs_are_made_and_count_deferred_tasks() -> None:
    specs = [yaml.safe_load(text) for text in FILES.values()]
    pools = {spec["runner"]["pool"] for spec in specs if "pool" in spec.get("runner", {})}
    made = {c[c.index("pools") + 2] for c in COMMANDS if "pools" in c and "--include-deferred" in c}
    assert pools == made != set()


@pytest.mark.parametrize("name", [n for n, text in FILES.items() if set(yaml.safe_load(text)) <= KEYS["chart"]])
def test_values_render(render: Render, folder: Path, name: str) -> None:
    documents = render("--values", folder / name)
    given = yaml.safe_load(FILES[name])
    assert of_kind(documents, "Pod")[0]["spec"]["containers"][0]["args"][1:] == given["test"]["paths"]


@pytest.mark.parametrize(
    ("values", "spec"), [("values.yaml", "em.yaml"), ("onprem.yaml", "runner.yaml"), ("kind.yaml", "kind-em.yaml")]
)
def test_specs_fit_the_values_they_stand_beside(helm: Helm, folder: Path, values: str, spec: str) -> None:
    """What the notes advise with the page's values is what the page's spec says."""
    done = helm("install", "chunkflow", CHART, "-n", "chunkflow", "-f", folder / values, "--dry-run=client")
    notes = done.stdout.partition("\nNOTES:\n")[2]
    advised = yaml.safe_load(notes[notes.index("runner:\n") :].split("\n\n")[0])["runner"]
    given: dict[str, Any] = yaml.safe_load(FILES[spec])["runner"]
    for key in ("kind", "image", "namespace", "service_account", "fs_group"):
        assert given.get(key) == advised.get(key), key
    for stage in ("infer", "blend"):
        assert given.get(stage, {}).get("priority_class") == advised[stage].get("priority_class")
    assert [v for v in given.get("volumes", []) if "memory" not in v] == advised.get("volumes", [])


OURS = [c for c in COMMANDS if c[:1] == ["helm"] and "helm/chunkflow" in c]
AIRFLOWS = [c for c in COMMANDS if c[:1] == ["helm"] and "apache-airflow/airflow" in c]


def test_commands_were_found() -> None:
    assert len(OURS) >= 2
    assert len(AIRFLOWS) >= 2


@pytest.mark.parametrize("command", OURS)
def test_commands_with_our_chart_render(helm: Helm, folder: Path, command: list[str]) -> None:
    assert command[1] in ("install", "upgrade")
    assert command[2:4] == ["chunkflow", "helm/chunkflow"]
    done = helm("template", "chunkflow", CHART, *in_folder(command[4:], folder))
    assert done.returncode == 0, done.stderr
    (config_map,) = (d for d in yaml.safe_load_all(done.stdout) if d and d["kind"] == "ConfigMap")
    (folder / "arrived.yaml").write_text(config_map["data"]["em.yaml"])
    assert load_spec(folder / "arrived.yaml").name == "em"


@pytest.mark.parametrize("command", AIRFLOWS)
def test_commands_with_the_official_chart_render(helm: Helm, folder: Path, command: list[str]) -> None:
    if not OFFICIAL:
        pytest.skip("AIRFLOW_CHART does not name Airflow's official chart")
    flags = command[4:]
    at = flags.index("--version")
    done = helm("template", "airflow", OFFICIAL, *in_folder(flags[:at] + flags[at + 2 :], folder))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], set[str]]:
    """Keys of the Secrets that the page's commands make, by namespace and name."""
    folder = tmp_path_factory.mktemp("kubectl")
    (folder / "aws-secret.json").write_text("{}")
    found = {}
    for command in COMMANDS:
        if command[:2] == ["kubectl", "create"]:
            offline = [KUBECTL, *command[1:], "--dry-run=client", "-o", "yaml"]
            done = subprocess.run(offline, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            made = yaml.safe_load(done.stdout)
            if made["kind"] == "Secret":
                found[made["metadata"]["namespace"], made["metadata"]["name"]] = set(made["data"])
    return found


def test_secrets_of_the_page_are_those_of_our_values(secrets: dict[tuple[str, str], set[str]]) -> None:
    values = yaml.safe_load(AIRFLOW_VALUES.read_text())
    named = {value for key, value in (values | values["data"]).items() if key.endswith("SecretName")}
    assert len(named) == 4
    assert {name for namespace, name in secrets if namespace == "airflow"} == named
    (used,) = {yaml.safe_load(text).get("credentials", {}).get("existingSecret") for text in FILES.values()} - {None}
    assert ("chunkflow", used) in secrets


def test_keys_of_the_secrets_are_those_that_the_official_chart_reads(
    official: list[dict[str, Any]], secrets: dict[tuple[str, str], set[str]]
) -> None:
    variables = [v for d in official for pod in pod_specs(d) for c in pod["containers"] for v in c.get("env", [])]
    read = {(r["name"], r["key"]) for v in variables if (r := v.get("valueFrom", {}).get("secretKeyRef"))}
    assert len(read) >= 4
    assert read <= {
        (name, key) for (namespace, name), keys in secrets.items() if namespace == "airflow" for key in keys
    }


@pytest.mark.parametrize("flag", re.findall(r"`--set (\S+)` for ours", PAGE.read_text()))
def test_flags_in_the_text_render(render: Render, flag: str) -> None:
    (account,) = of_kind(render("--set", flag), "ServiceAccount")
    assert account["imagePullSecrets"] == [{"name": "lab-registry"}]


def in_folder(flags: list[str], folder: Path) -> list[str]:
    """The flags, with the files of the page and of the repository where they are."""
    found = []
    for flag in flags:
        key, equals, file = flag.rpartition("=")
        if file in FILES:
            flag = f"{key}{equals}{folder / file}"
        elif (ROOT / flag).is_file():
            flag = str(ROOT / flag)
        found.append(flag)
    return found


def test_every_key_of_the_runner_section_is_one() -> None:
    """Names in code style that look like keys of the section are keys of it."""
    known = {key for section in (KubernetesRunner, PodResources, PodVolume) for key in section.model_fields}
    section = PAGE.read_text().partition("## How a pod ends")[2].partition("## Changing things")[0]
    words = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", section)) - {"chunkflow_maintenance"}
    words |= set(re.findall(r"`runner\.(\w+)", PAGE.read_text()))
    assert len(words) > 10
    assert words - known == set()
