"""How the components of a running Airflow are doing, from the API server's health endpoint."""

from __future__ import annotations

import http.client
import json
from datetime import datetime
from typing import Any

from operators.service.settings import HOST

Health = dict[str, Any]

API_SERVER = "api-server"
DATABASE = "database"
WARM_PARENT = "warm-parent"
COMPONENTS = (API_SERVER, "scheduler", "dag-processor", "triggerer")
"""Airflow's components by the name of their ``airflow`` sub-command."""

EXECUTION_HEALTH_PATH = "/execution/health"
"""Answers when the part of the API that serves tasks does."""

_HEALTH_PATH = "/api/v2/monitor/health"
_OK = 200


def _get(port: int, path: str, timeout: float) -> bytes | None:
    """The body of a good answer. ``http.client`` because it knows no proxies, and is small."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read() if response.status == _OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def answers(port: int, path: str, timeout: float) -> bool:
    """Whether the server at this port gives a good answer to a GET within ``timeout`` seconds."""
    return _get(port, path, timeout) is not None


def probe(port: int, timeout: float = 5.0) -> Health | None:
    """What the API server at this port says about all components.

    ``None`` if it says nothing in ``timeout`` seconds.
    """
    try:
        health = json.loads(_get(port, _HEALTH_PATH, timeout) or "null")
    except ValueError:
        return None
    return health if isinstance(health, dict) else None


def heartbeat(component: str, health: Health | None) -> float | None:
    """When the component gave its last sign of life, in seconds since the epoch.

    ``None`` if that is unknown.
    """
    name = component.replace("-", "_")
    text = ((health or {}).get(name) or {}).get(f"latest_{name}_heartbeat")
    return datetime.fromisoformat(text).timestamp() if text else None


def is_healthy(component: str, health: Health | None, started: float) -> bool:
    """Whether the component, started at ``started`` (seconds since the epoch), works.

    Airflow reports the latest heartbeat of any process of that kind: one from before the start is a
    predecessor's.
    """
    if health is None:
        return False
    if component in (API_SERVER, DATABASE):
        return (health.get("metadatabase") or {}).get("status") == "healthy"
    status = (health.get(component.replace("-", "_")) or {}).get("status")
    latest = heartbeat(component, health)
    return status == "healthy" and latest is not None and latest >= started
