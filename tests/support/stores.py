"""Small volumes in object stores: buckets with an input and a model in them, and their specs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.object_storage import Proxy

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}


@dataclass
class Store:
    """A bucket behind a proxy, with an input layer and a model in it."""

    proxy: Proxy
    root: str
    """Address of the bucket."""
    variables: dict[str, str] = field(default_factory=dict)


def spec_for(store: Store, folder: Path, **changes: Any) -> Path:
    """A spec of 2 × 2 × 2 blocks; all places but the input are below ``store.root/folder.name``."""
    place = f"{store.root}/{folder.name}"
    content = {
        "name": "small",
        "input": {"path": f"{store.root}/input"},
        "output": {"path": f"{place}/output", "chunk_size": [6, 12, 12]},
        "exchange": {"path": f"{place}/exchange"},
        "patch_size": [8, 16, 16],
        "patch_overlap": [2, 4, 4],
        "block_size": [12, 24, 24],
        "model": {"engine": "identity"},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def models(place: str) -> dict[str, dict[str, Any]]:
    """Model sections by engine."""
    return {
        "identity": {"engine": "identity"},
        "pytorch": {"engine": "pytorch", "path": f"{place}/net.py", "weights": f"{place}/net.pt"},
    }
