"""Our values for Airflow's official chart.

The chart itself is not here. With AIRFLOW_CHART naming it (a folder or an archive, version 1.22 or
later), its own schema and templates judge the values.
"""

from __future__ import annotations

import configparser
import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from operators.service.settings import API_PATIENCE

from .conftest import AIRFLOW_VALUES, ROOT, Render
from .test_security import pod_specs, pod_weaknesses


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(AIRFLOW_VALUES.read_text())
    return content


def test_settings_are_settings_of_airflow(values: dict[str, Any]) -> None:
    known = airflow_settings()
    given = {(section, key) for section, keys in values["config"].items() for key in keys}
    assert len(given) > 5
    assert given - known == set()


def test_tasks_wait_for_an_api_server_as_long_as_on_one_machine(values: dict[str, Any]) -> None:
    assert {key: str(value) for key, value in values["config"]["workers"].items()} == API_PATIENCE


def airflow_settings() -> set[tuple[str, str]]:
    """Sections and keys of the configuration of Airflow and of its Kubernetes provider.

    They are read without importing Airflow.
    """
    spec = importlib.util.find_spec("airflow")
    assert spec
    assert spec.submodule_search_locations
    found = set()
    for folder in map(Path, spec.submodule_search_locations):
        if (file := folder / "config_templates" / "config.yml").exists():
            found |= options(yaml.safe_load(file.read_text()))
        if (file := folder / "providers" / "cncf" / "kubernetes" / "get_provider_info.py").exists():
            found |= options(runpy.run_path(str(file))["get_provider_info"]()["config"])
    return found


def options(sections: dict[str, Any]) -> set[tuple[str, str]]:
    return {(section, key) for section, content in sections.items() for key in content["options"]}


def test_specs_are_mounted_where_the_image_looks_for_them(values: dict[str, Any], render: Render) -> None:
    (config_map,) = (d for d in render() if d["kind"] == "ConfigMap")
    (volume,), (mount,) = values["volumes"], values["volumeMounts"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert mount["name"] == volume["name"]
    assert f"mkdir -p {mount['mountPath']}" in (ROOT / "docker" / "Dockerfile").read_text()


def test_version_is_the_one_that_is_tested(values: dict[str, Any]) -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"apache-airflow=={values['airflowVersion']}" in pins
    assert values["defaultAirflowTag"] == values["airflowVersion"]


def test_no_password_and_no_default_account(values: dict[str, Any]) -> None:
    assert values["createUserJob"]["enabled"] is False
    assert values["postgresql"]["enabled"] is False
    assert not [word for word in ("password", "admin:") if word in yaml.safe_dump(values).lower()]


def test_official_chart_starts_pods_as_the_accounts_that_ours_lets(
    official: list[dict[str, Any]], render: Render
) -> None:
    (binding,) = (d for d in render() if d["kind"] == "RoleBinding")
    allowed = {(subject["namespace"], subject["name"]) for subject in binding["subjects"]}
    worker = pod_template(official)["spec"]["serviceAccountName"]
    triggerer = next(d for d in official if d["kind"] == "Deployment" and d["metadata"]["name"] == "airflow-triggerer")
    used = {("airflow", worker), ("airflow", triggerer["spec"]["template"]["spec"]["serviceAccountName"])}
    assert used == allowed


def test_official_charts_pods_satisfy_the_restricted_standard(official: list[dict[str, Any]]) -> None:
    pods = [pod for document in [*official, pod_template(official)] for pod in pod_specs(document)]
    assert len(pods) == 6
    assert [problem for pod in pods for problem in pod_weaknesses(pod, token=True)] == []


def test_specs_are_seen_by_whatever_parses_dags(official: list[dict[str, Any]]) -> None:
    pods = {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in official if d["kind"] == "Deployment"}
    for pod in (pods["airflow-dag-processor"], pods["airflow-triggerer"], pod_template(official)["spec"]):
        mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert "/opt/airflow/dags/volumes" in mounts


def test_our_image_runs_everywhere(official: list[dict[str, Any]]) -> None:
    pods = [pod for document in official for pod in pod_specs(document)]
    assert {c["image"] for pod in pods for c in pod["containers"]} == {"chunkflow-airflow:0.1.0"}
    settings = configparser.ConfigParser(interpolation=None)
    settings.read_string(next(d["data"]["airflow.cfg"] for d in official if "airflow.cfg" in d.get("data", {})))
    executor = settings["kubernetes_executor"]  # goes before the image of its pod template
    assert executor["worker_container_repository"] == "chunkflow-airflow"
    assert executor["worker_container_tag"] == "0.1.0"


def pod_template(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The pod of a task, by the Kubernetes executor."""
    files = [d["data"] for d in documents if d["kind"] == "ConfigMap" and "pod_template_file.yaml" in d["data"]]
    template: dict[str, Any] = yaml.safe_load(files[0]["pod_template_file.yaml"])
    return template
