"""Imports, once and for all, what the processes need that a scheduler or a DAG processor forks."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def preload() -> None:
    """Import what tasks use with the kinds of runners that the volumes have.

    The clients of Kubernetes and storage take seconds.
    """
    from airflow.sdk.configuration import conf

    from operators.volume_dags import clusters

    modules = ["operators.local"]
    if clusters(Path(conf.get("core", "dags_folder")) / "volumes"):
        modules += ["operators.kubernetes.operators", "chunkflow_core.storage.clients"]
    for module in modules:
        import_module(module)
