"""Finds the volume specs and makes their DAGs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from airflow.sdk import DAG

from chunkflow_core.errors import ChunkflowError
from chunkflow_core.spec import load_spec
from chunkflow_core.spec.runner import KubernetesRunner
from chunkflow_core.variables import conceal
from operators.dag import volume_dag


def volume_dags(
    default: Path, *, only_dag: str | None = None, only_task: str | None = None
) -> Iterator[DAG | ChunkflowError]:
    """One DAG for each spec, or the error that says why the spec can't be used.

    Args:
        default: Folder with ``*.yaml``, unless ``CHUNKFLOW_VOLUMES`` lists others, separated by
            colons.
        only_dag: Make this one only.
        only_task: Build only this task of it; see ``volume_dag``.
    """
    seen: dict[str, Path] = {}
    for file in _spec_files(default):
        try:
            if only_dag and not _may_be(file, only_dag):
                continue
            spec = load_spec(file)
            if spec.name in seen:
                raise ChunkflowError(
                    f"{file}: name: {spec.name} is the name of {seen[spec.name]} too, expected another"
                )
            seen[spec.name] = file
            if only_dag in (None, spec.name):
                yield volume_dag(spec, file, only_task=only_task)
        except ChunkflowError as error:
            yield ChunkflowError(conceal(str(error)))
        except Exception as error:  # whatever is wrong with one volume, the others go on
            yield ChunkflowError(conceal(f"{file}: {type(error).__name__}: {error}"))


def _may_be(file: Path, name: str) -> bool:
    """Whether a spec can have this name.

    Every task's process asks, and parsing takes longer than looking.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    return name in text or "${" in text or "\\" in text


def clusters(default: Path) -> set[tuple[str, str | None]]:
    """Airflow connection and namespace of each place where volumes have pods.

    Specs that can't be used are left out.
    """
    found = set()
    for file in _spec_files(default):
        with suppress(Exception):
            runner = load_spec(file).runner
            if isinstance(runner, KubernetesRunner):
                found.add((runner.connection, runner.namespace))
    return found


def _spec_files(default: Path) -> Iterator[Path]:
    for folder in (os.environ.get("CHUNKFLOW_VOLUMES") or str(default)).split(os.pathsep):
        yield from sorted(Path(folder).resolve().glob("*.yaml"))
