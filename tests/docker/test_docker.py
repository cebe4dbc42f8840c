"""The container images, as far as they can be tried without an engine that builds them."""

from __future__ import annotations

import configparser
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chunkflow_core.storage.model_files import CACHE_VARIABLE

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TARGETS = ("worker", "airflow")
OURS = runpy.run_path(str(DOCKER / "check_recipe.py"))
ARGUMENTS, STAGES = OURS["stages"]((DOCKER / "Dockerfile").read_text())


def steps(stage: str, instruction: str) -> list[str]:
    return [rest for name, rest in STAGES[stage].steps if name == instruction]


def environment(stage: str) -> dict[str, str]:
    return {name: value for rest in steps(stage, "ENV") for name, value in OURS["assignments"](rest)}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines if line and not line.startswith(("#", "%"))]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def copied_from_context() -> list[str]:
    """All sources of COPY that come from the repository."""
    return [
        source
        for stage in STAGES.values()
        for name, rest in stage.steps
        if name == "COPY" and "--from=" not in rest
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    ]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
    assert "hadolint ignore" not in (DOCKER / "Dockerfile").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_a_numbered_user_that_is_not_root(target: str) -> None:
    last = steps(target, "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:\d+", last), f"{last}: runAsNonRoot needs a number"


def test_bases_are_pinned() -> None:
    for stage in STAGES.values():
        base = re.sub(r"\$\{(\w+)\}", lambda match: ARGUMENTS[match[1]], stage.base)
        assert base in STAGES or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base), base


def test_pins_of_the_bases_are_the_tested_ones() -> None:
    pins = requirements((ROOT / "constraints.txt").read_text().splitlines())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert ARGUMENTS["PYTHON_IMAGE"].startswith(f"python:{python}.")
    assert ARGUMENTS["AIRFLOW_IMAGE"] == f"apache/airflow:{str(pins['apache-airflow'].specifier)[2:]}-python{python}"


def test_no_secret_is_an_argument_or_a_variable() -> None:
    names = set(ARGUMENTS)
    for stage in STAGES:
        names |= environment(stage).keys() | {rest.partition("=")[0] for rest in steps(stage, "ARG")}
    suspicious = re.compile("token|secret|password|key|credential|auth", re.IGNORECASE)
    assert not [name for name in names if suspicious.search(name)]


def test_the_worker_has_no_pip_cache_and_no_compiler() -> None:
    assert not any("pip" in rest or "apt" in rest for rest in steps("worker", "RUN"))
    assert environment("wheel")["PIP_NO_CACHE_DIR"] == environment("dependencies")["PIP_NO_CACHE_DIR"] == "1"


def test_all_that_the_worker_writes_is_in_tmp() -> None:
    variables = environment("worker")
    for name in ("HOME", CACHE_VARIABLE, "NUMBA_CACHE_DIR", "MPLCONFIGDIR"):
        assert variables[name].startswith("/tmp"), name


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working tree as users have it: what images are made of, and what must not get into them."""
    for source in copied_from_context():
        for path in ROOT.glob(source):
            skip = shutil.ignore_patterns("volumes", "__pycache__")
            into = tmp_path / path.relative_to(ROOT)
            into.parent.mkdir(exist_ok=True)
            shutil.copytree(path, into, ignore=skip) if path.is_dir() else shutil.copy(path, into)
    for name in (
        ".git/config",
        ".env",
        ".venv/bin/python",
        ".aws/credentials",
        "dags/volumes/lab.yaml",
        "dags/volumes/secret.json",
        "chunkflow_core/__pycache__/spec.cpython-311.pyc",
        "chunkflow_core/lattice/__pycache__/kernels.add_plane-15.py311.1.nbc",
        "chunkflow_core/engines/__pycache__/base.cpython-311.pyc",
        "helm/values.yaml",
        "operators.egg-info/PKG-INFO",
        "secret.json",
        "tests/test_a.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_only_what_is_copied_reaches_the_builder(checkout: Path) -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    sent = {name for name in exclude_paths(str(checkout), patterns) if (checkout / name).is_file()}
    wanted = {
        str(file.relative_to(checkout))
        for source in copied_from_context()
        for path in checkout.glob(source)
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file() and not {"__pycache__", "volumes"} & set(file.parts)
    }
    assert sent == wanted
    assert {"chunkflow_core/spec/volume.py", "chunkflow_core/py.typed", "operators/dag.py", "setup.cfg"} < sent


def test_every_source_of_a_copy_exists() -> None:
    assert [source for source in copied_from_context() if not list(ROOT.glob(source))] == []


def test_the_wheel_stage_has_all_packages() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {name.rstrip("*") for name in setup["options.packages.find"]["include"].split()}
    assert packages <= {rest.split()[0] for rest in steps("wheel", "COPY")}


def test_requirements_of_the_airflow_image_are_those_of_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = [line for text in setup["options.extras_require"].values() for line in text.splitlines()]
    declared = requirements(setup["options"]["install_requires"].splitlines() + extras)
    pins = requirements((ROOT / "constraints.txt").read_text().splitlines())
    for name, requirement in requirements((DOCKER / "airflow-requirements.txt").read_text().splitlines()).items():
        if str(requirement.specifier).startswith("=="):
            assert requirement.specifier == pins.get(name, requirement).specifier
        else:
            assert requirement.specifier == declared[name].specifier


def test_installed_packages_keep_their_versions(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# pins\nPyYAML==0.1\ntyping.extensions==0.2\nnowhere-to-be_found==3.0\n")
    command = [sys.executable, str(DOCKER / "airflow_constraints.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *others = done.stdout.splitlines()
    assert re.fullmatch(r"apache-airflow==[\d.]+", first)
    assert others == ["nowhere-to-be_found==3.0"]


ONLY_REQUIREMENTS = """
import re, runpy, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def closure(lines):
    wanted, seen = [(Requirement(line), "") for line in lines], set()
    while wanted:
        requirement, extra = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                try:
                    wanted += [(Requirement(line), extra) for line in requires(name) or ()]
                except PackageNotFoundError:
                    pass
    return {name for name, _ in seen}

script, file, *arguments = sys.argv[1:]
lines = [line for line in open(file).read().splitlines() if line and line[0] != "#"]
there = closure(["apache-airflow", *lines]) | {"chunkflow-airflow"}
modules = packages_distributions()
refused = {m for m, owners in modules.items() if not there & set(map(canonicalize_name, owners))}
assert {"torch", "cloudvolume", "numba", "matplotlib", "openvino", "moto"} <= refused

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r} (not among the requirements)", name=name)

for name in refused & set(sys.modules):
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
"""Runs a script where only Airflow and the listed requirements can be imported.

What these require can be imported, too.
"""


def test_dags_of_pods_need_no_more_than_the_airflow_image_has(tmp_path: Path) -> None:
    script, file = DOCKER / "smoke_airflow.py", DOCKER / "airflow-requirements.txt"
    done = subprocess.run(
        [sys.executable, "-c", ONLY_REQUIREMENTS, script, file, "--root", ROOT / "dags"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"AIRFLOW_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "ok: " in done.stdout
    assert "21 tasks" in done.stdout


@pytest.mark.long
def test_the_trial_of_the_worker(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCKER / "smoke.py"), "--root", "pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "output as expected of pytorch" in done.stdout


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``build.sh`` where no engine is, but for the scripts given by name."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "dirname", "git", "sed"):
        (tools / name).symlink_to(str(shutil.which(name)))

    def call(*arguments: str, **engines: str) -> subprocess.CompletedProcess[str]:
        for name, script in engines.items():
            (tools / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
            (tools / name).chmod(0o755)
        command = [str(DOCKER / "build.sh"), *map(str, arguments)]
        variables: dict[str, Any] = {"PATH": str(tools), "LOG": str(tmp_path / "log"), "HOME": os.environ["HOME"]}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=tmp_path)

    return call


ENGINE = 'printf "%s\\n" "$*" >> "$LOG"'
"""An engine that writes down what it is asked to do."""


def test_build_without_an_engine(build: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = build()
    assert done.returncode == os.EX_UNAVAILABLE
    assert "docker, podman or buildah is needed" in done.stderr
    done = build(docker="exit 1")
    assert done.returncode == os.EX_UNAVAILABLE
    assert 'docker is installed, but "docker info" fails' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker"], "worker: expected"),
        (["--tag"], "--tag: a value is missing"),
        (["--engine", "make"], "--engine make: expected"),
        (["--push"], "--push: --registry says where to"),
    ],
)
def test_build_used_wrongly(
    build: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], message: str
) -> None:
    done = build(*arguments)
    assert done.returncode == os.EX_USAGE
    assert message in done.stderr


def test_build_names_tries_and_pushes(build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    assert build("--help").returncode == 0
    done = build("--registry", "example.org/lab/", "--tag", "7", "--build-arg", "A=b c", "--push", podman=ENGINE)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    builds = [line for line in lines if line.startswith("build ")]
    names = [f"example.org/lab/chunkflow-{name}" for name in ("worker:7-cpu", "worker:7-cuda", "airflow:7")]
    assert [re.findall(r"--tag (\S+)", line) for line in builds] == [[name] for name in names]
    assert [re.findall(r"--target (\S+)", line) for line in builds] == [["worker"], ["worker"], ["airflow"]]
    assert [re.findall(r"VARIANT=(\S+)", line) for line in builds] == [["cpu"], ["cuda"], []]
    assert all(line.endswith("--build-arg A=b c .") for line in builds)
    tried = [line for line in lines if line.startswith("run ")]
    assert {name for name in names if any(f" {name} python -" in line for line in tried)} == set(names)
    assert [line for line in lines if line.startswith("push")] == [f"push {name}" for name in names]
    assert lines.index(f"push {names[0]}") > lines.index(tried[-1]), "nothing is pushed before all is tried"


def test_an_image_that_fails_its_trial_is_not_pushed(
    build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = build("airflow", "--registry", "example.org", "--push", docker=f'{ENGINE}\n[ "$1" != run ]')
    assert done.returncode == 1
    assert "push" not in (tmp_path / "log").read_text()
