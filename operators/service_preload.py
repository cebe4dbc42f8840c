"""Imports, once and for all, what the processes need that a scheduler or a DAG processor forks."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def preload() -> None:
    """Import what tasks of all kinds of runners that the volumes have use: the clients of Kubernetes and storage take seconds."""
    from airflow.sdk.configuration import conf

    from operators.specs import clusters

    modules = ["operators.local"]
    if clusters(Path(conf.get("core", "dags_folder")) / "volumes"):
        modules += ["operators.kubernetes", "chunkflow_core.storage.clients"]
    for module in modules:
        import_module(module)
