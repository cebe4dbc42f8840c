"""Run the installation steps of an image in a folder, and try the result.

    python3.11 docker/check_recipe.py worker|airflow

It is for machines without docker, podman or buildah. RUN and COPY of the Dockerfile are carried out
as they stand, below a temporary folder instead of ``/``. Python is the one that runs this script;
pip's indices are those of its settings, whatever VARIANT says. For the image of Airflow, which
starts from Airflow's own, a fresh environment with the tested version is that start. Users and
read-only file systems need a container.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

DOCKER = Path(__file__).resolve().parent
CONTEXT = DOCKER.parent
_PATHS = re.compile(r'(?<![\w./"])/(?=(opt|build|tmp)\b)')


@dataclass(frozen=True)
class Stage:
    """One stage of a Dockerfile."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instructions and what follows them, in one line."""


def stages(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """Build arguments before the first stage with their defaults, and the stages by name."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    arguments: dict[str, str] = {}
    found: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, rest = line.split(None, 1)
        if instruction == "FROM":
            base, _, name = rest.split()
            found[name] = Stage(name, base)
        elif found:
            list(found.values())[-1].steps.append((instruction, rest))
        else:
            name, _, value = rest.partition("=")
            arguments[name] = value
    return arguments, found


def assignments(rest: str) -> Iterator[tuple[str, str]]:
    """Names and values of an ENV or LABEL instruction."""
    for name, quoted, plain in re.findall(r'([\w.]+)=(?:"([^"]*)"|(\S*))', rest):
        yield name, quoted or plain


class Recipe:
    """Carries out stages below a folder.

    Each has a root folder of its own, or that of the stage it starts from.
    """

    def __init__(self, folder: Path) -> None:
        """Work below ``folder``."""
        _, self._stages = stages((DOCKER / "Dockerfile").read_text())
        self._folder, self._roots = folder, dict[str, Path]()

    def root(self, name: str) -> Path:
        """Where a stage's file system is, carried out if it isn't yet."""
        if name not in self._roots:
            stage = self._stages[name]
            base = self._stages.get(stage.base)
            self._roots[name] = self.root(base.name) if base else self._folder / name
            self._carry_out(stage, self._roots[name])
        return self._roots[name]

    def _carry_out(self, stage: Stage, root: Path) -> None:
        work = root / "build"
        for folder in (work, root / "tmp", root / "opt"):
            folder.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ) | {"VIRTUAL_ENV": f"{root}/opt/venv", "VARIANT": "cuda"}
        environment["PATH"] = f"{root}/opt/airflow-venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        for instruction, rest in stage.steps:
            if instruction == "COPY":
                self._copy(rest, root, work)
            elif instruction == "RUN" and not rest.startswith("useradd"):
                print(f"── {stage.name}: {rest[:100]}…", flush=True)
                subprocess.run(["sh", "-c", _PATHS.sub(f"{root}/", rest)], cwd=work, env=environment, check=True)

    def _copy(self, rest: str, root: Path, work: Path) -> None:
        origin = CONTEXT
        words = rest.split()
        while words[0].startswith("--"):
            option = words.pop(0)
            if option.startswith("--from="):
                origin = self.root(option.removeprefix("--from="))
        *sources, target = words
        goal = root / target.removeprefix("/") if target.startswith("/") else work / target
        for source in sources:
            for path in sorted(origin.glob(source.removeprefix("/"))):
                into = goal / path.name if path.is_file() and (target.endswith("/") or len(sources) > 1) else goal
                into.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "volumes")
                    shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True, ignore=ignored)
                else:
                    shutil.copy2(path, into)


def main(image: str) -> None:
    """Carry out and try one image's recipe."""
    started = monotonic()
    with tempfile.TemporaryDirectory(prefix="chunkflow-recipe-") as name:
        recipe = Recipe(Path(name))
        if image == "worker":
            environment = recipe.root("worker") / "opt" / "venv"
            for script in (environment / "bin").glob("chunkflow-*"):  # their first line names the stage it was made in
                script.write_text(script.read_text().replace(f"{name}/dependencies/", f"{name}/worker/"))
            trial = [str(DOCKER / "smoke.py"), "--root"]
        else:
            environment = Path(name) / "airflow" / "opt" / "airflow-venv"
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            airflow = next(
                p for p in (CONTEXT / "constraints.txt").read_text().split() if p.startswith("apache-airflow==")
            )
            pip = [str(environment / "bin" / "pip"), "install", "-c", str(CONTEXT / "constraints.txt"), airflow]
            subprocess.run(pip, check=True)
            dags = recipe.root("airflow") / "opt" / "airflow" / "dags"
            trial = [str(DOCKER / "smoke_airflow.py"), "--root", str(dags)]
        installed = monotonic()
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        clean |= {"AIRFLOW_HOME": f"{name}/home", "NUMBA_CACHE_DIR": f"{name}/numba"}
        subprocess.run([environment / "bin" / "python", *trial], check=True, env=clean, cwd=name)
        size = sum(path.lstat().st_size for path in environment.rglob("*"))
        print(
            f"{image}: {size / 1e6:.0f} MB, {installed - started:.0f} s to install, "
            f"{monotonic() - installed:.0f} s to try"
        )


if __name__ == "__main__":
    if sys.argv[1:] not in (["worker"], ["airflow"]):
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} worker|airflow")
    main(sys.argv[1])
