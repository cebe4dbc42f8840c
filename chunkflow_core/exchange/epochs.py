"""Epochs: folders of the exchange, each of the time for which a spec has an output layer.

An epoch's name is a number, and something that no other one ever has: a layer may be deleted, and
made again.
"""

from __future__ import annotations

import re
import secrets

from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.files import open_files, storage_errors

_NAME = re.compile(r"(\d{4,})-[0-9a-f]{12}")


def folder_of(spec: VolumeSpec) -> str:
    """Address of the folder that holds the epochs of a spec."""
    return f"{plain(spec.exchange.path)}/{spec.fingerprint}"


def new_epoch(spec: VolumeSpec) -> str:
    """Name of an epoch that comes after all that have left something."""
    return f"{max(map(_number, _names(spec)), default=0) + 1:04}-{secrets.token_hex(6)}"


def delete_earlier(spec: VolumeSpec, epoch: str) -> int:
    """Delete what the epochs before one have left, and return the number of receipts among it.

    Raises:
        StorageError: The storage does not answer.
    """
    receipts = 0
    for name in _names(spec):
        if not 0 < _number(name) < _number(epoch):
            continue
        path = f"{folder_of(spec)}/{name}"
        with storage_errors(f"deleting what is of no use any more in {path}"):
            files = open_files(path)
            names = list(files.list())
            files.delete(names)
        receipts += sum(file.startswith("receipts/") and file.endswith(".json") for file in names)
    return receipts


def _names(spec: VolumeSpec) -> list[str]:
    with storage_errors(f"listing {folder_of(spec)}"):
        return [name.rstrip("/") for name in open_files(folder_of(spec)).list(flat=True)]


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0
