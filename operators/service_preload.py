"""Imports, once and for all, what the processes need that a scheduler or a DAG processor forks."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def preload() -> None:
    """Import the operators of all kinds of runners that the volumes have; the Kubernetes client alone takes seconds."""
    from airflow.sdk.configuration import conf

    from operators.specs import clusters

    kinds = ["local"]
    if clusters(Path(conf.get("core", "dags_folder")) / "volumes"):
        kinds.append("kubernetes")
    for kind in kinds:
        import_module(f"operators.{kind}")
