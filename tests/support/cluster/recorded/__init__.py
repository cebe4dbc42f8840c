"""Pods as a real cluster showed them, one scenario a file: see ``README.md`` beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
SCENARIOS = sorted(file.stem for file in _FOLDER.glob("*.jsonl"))
"""Names of all scenarios."""


@dataclass(frozen=True)
class Shown:
    """A pod's object as it was at a moment."""

    at: datetime
    """By the cluster's clock."""
    pod: dict[str, Any]


def recorded(scenario: str) -> list[list[Shown]]:
    """The pods of a scenario, oldest first, each with all that was shown of it."""
    lines = [json.loads(line) for line in (_FOLDER / f"{scenario}.jsonl").read_text().splitlines()]
    began = datetime.fromisoformat(lines[0]["pod"]["metadata"]["creationTimestamp"])
    pods: dict[str, list[Shown]] = {}
    for line in lines:
        shown = Shown(began + timedelta(seconds=line["t"]), line["pod"])
        pods.setdefault(line["pod"]["metadata"]["uid"], []).append(shown)
    return list(pods.values())
