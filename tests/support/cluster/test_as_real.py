"""The tests of pods on a real cluster run as ``tests/README.md`` says.

The real cluster is a double here, of which they know only what the commands there give them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.airflow.volumes import until
from tests.support.cluster.client import api_of
from tests.support.cluster.clusters import REAL_MOUNTS, why_no_real_cluster
from tests.support.cluster.double import Cluster, Node
from tests.support.nursery import shared
from tests.support.object_storage import BUCKET, s3_server

ROOT = Path(__file__).parents[3]
IMAGE = "registry.example/lab/chunkflow-worker:0.1.0-cpu"
PYTEST = ".venv/bin/pytest -m cluster"
QUICK = ("test_a_dag_of_ones_own", "test_every_end_that_a_retry_cures and either")
"""What ``pytest -k`` takes for tests that take a minute together."""


def commands(values: Mapping[str, str]) -> str:
    """The commands of the README, with other values for what has one."""
    section = (ROOT / "tests" / "README.md").read_text().partition("\n## On a real cluster\n")[2]
    found = re.search(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert found
    text = found[1]
    for name, value in values.items():
        text, count = re.subn(rf"^export {name}=.*$", f"export {name}={shlex.quote(value)}", text, flags=re.MULTILINE)
        assert count == 1, f"the README does not export {name} once"
    return text


@contextmanager
def as_if_real(folder: Path, **options: Any) -> Iterator[dict[str, str]]:
    """A double and an object store that stand alone; the values that the README's commands need.

    ``options`` are those of ``Cluster``. In the end no namespace is left.
    """
    double = Cluster(
        folder / "kubeconfig",
        images={IMAGE},
        nodes=[Node(f"node-{number}") for number in range(20)],
        mount_root=Path(REAL_MOUNTS),
        nursery=shared(),
        **options,
    )
    with s3_server(folder) as url, double:
        yield {
            "KUBECONFIG": str(double.kubeconfig),
            "CHUNKFLOW_TEST_IMAGE": IMAGE,
            "CHUNKFLOW_TEST_STORAGE": f"s3://{BUCKET}/tests",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "thing",
            "AWS_ENDPOINT_URL_S3": url,
            "CHUNKFLOW_TEST_MANIFESTS": str(folder / "storage-credentials.yaml"),
        }
        api = api_of(double)
        until(lambda: [space.metadata.name for space in api.list_namespace().items] == ["default"], 60)


def bare_environment(folder: Path) -> dict[str, str]:
    """An environment without what only this process has."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "CHUNKFLOW_", "PYTEST_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return own | {"HOME": str(folder), "PATH": path}


@pytest.mark.long
def test_the_readmes_commands_run_the_tests_of_pods_as_on_a_real_cluster(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    options = [f"--basetemp={tmp_path / 'theirs'}", f"--junit-xml={report}", "-k", " or ".join(QUICK)]
    with as_if_real(tmp_path) as values:
        text = commands(values)
        assert text.endswith(f"{PYTEST}\n")
        script = text.replace(PYTEST, shlex.join([sys.executable, "-m", "pytest", "-m", "cluster", *options]))
        environment = bare_environment(tmp_path)
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    assert done.returncode == 0, done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert [case.get("name") for case in cases if len(case)] == []
    assert {case.get("name") for case in cases} == {
        "test_a_dag_of_ones_own[real]",
        "test_every_end_that_a_retry_cures[real-in either stage]",
    }


def test_what_is_missing_for_a_real_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "CHUNKFLOW_TEST_IMAGE", "CHUNKFLOW_TEST_STORAGE"):
        monkeypatch.setenv(name, "something")
    assert why_no_real_cluster() is None
    monkeypatch.delenv("CHUNKFLOW_TEST_IMAGE")
    assert why_no_real_cluster() == "no real cluster: set CHUNKFLOW_TEST_IMAGE (tests/README.md)"
