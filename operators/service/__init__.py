"""A private Airflow on this machine.

It has database, scheduler, DAG processor, triggerer and API server with its UI.

It replaces ``airflow standalone``: it listens on the loopback interface only, survives the death of
its components and ends without leaving a process behind. From Python::

    from operators.service import Client, start

    with start(Path(".airflow"), with_parent=True) as service, Client(service) as client:
        client.post("dags/my_volume/dagRuns", {"logical_date": None, "conf": {}})

From the command line: ``chunkflow-airflow up | down | status``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from operators.service.client import ApiError, Client
    from operators.service.service import Service, find, start
    from operators.service.state import AlreadyRunning, ServiceError

__all__ = ["AlreadyRunning", "ApiError", "Client", "Service", "ServiceError", "find", "start"]

_MODULE_OF = {
    "AlreadyRunning": "state",
    "ApiError": "client",
    "Client": "client",
    "Service": "service",
    "ServiceError": "state",
    "find": "service",
    "start": "service",
}


def __getattr__(name: str) -> Any:
    """Import on demand: Airflow imports modules of this package before anything of its own."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
