"""How a service and its components are doing, for ``chunkflow-airflow status``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from operators import warm
from operators.service.health import COMPONENTS, DATABASE, WARM_PARENT, Health, heartbeat, is_healthy, probe
from operators.service.settings import Home, warm_parent_name
from operators.service.state import State


def report_of(home: Home) -> dict[str, Any] | None:
    """What ``status`` tells, ``None`` if nothing runs."""
    state = State.read(home)
    if state is None:
        return None
    health = probe(state.port)
    others = [name for name in (DATABASE, WARM_PARENT) if name in state.components]
    components = {name: _component_report(name, state, health) for name in (*others, *COMPONENTS)}
    if WARM_PARENT in components:
        components[WARM_PARENT]["healthy"] = warm.answers(warm_parent_name(home) or "")
    return {
        "healthy": state.phase == "ready" and all(report["healthy"] for report in components.values()),
        "phase": state.phase,
        "url": state.url,
        "username": state.username,
        "password_file": state.password_file,
        "home": str(home.path),
        "dags": state.dags,
        "pid": state.guard.pid,
        "components": components,
    }


def _component_report(name: str, state: State, health: Health | None) -> dict[str, Any]:
    identity = state.components.get(name)
    alive = identity is not None and identity.alive
    latest = heartbeat(name, health)
    return {
        "pid": identity.pid if identity is not None and alive else None,
        "healthy": identity is not None and alive and is_healthy(name, health, identity.created),
        "heartbeat_age_seconds": None if latest is None else round(time.time() - latest, 1),
    }


def describe(report: Mapping[str, Any]) -> str:
    """A report in lines for people."""
    lines = [
        f"{report['url']} ({report['phase']}, process {report['pid']})",
        f"log in as {report['username']} with the password in {report['password_file']}",
        f"DAG files in {report['dags']}, all else in {report['home']}",
    ]
    for name, component in report["components"].items():
        health = "healthy" if component["healthy"] else "NOT HEALTHY"
        process = f"process {component['pid']}" if component["pid"] else "not running"
        age = component["heartbeat_age_seconds"]
        beat = "" if age is None else f", heartbeat {age:g} s ago"
        lines.append(f"{name:<14} {health}, {process}{beat}")
    return "\n".join(lines)
