"""How far an ingest has come: a small file in the layer's folder while it is being made.

It is what an ingest that was killed goes on from. A power loss leaves it as it was, or as it is,
and with it all storage chunks that it speaks of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.files import put_file, storage_errors
from chunkflow_core.storage.ingest.stack import Stack
from chunkflow_core.storage.layers import layer_files

PROGRESS: Final = "ingest.json"
"""Name of the file."""

_READING: Final = 1
"""Number of the way in which sources are read; another one may give other voxels."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What has been written, and of what."""

    source: str
    """Digest of all that decides the voxels: files, with sizes and times, and options."""
    key: str
    """Folder of the storage chunks."""
    sections: int
    """Sections whose storage chunks are all written."""


def digest_of(source: Stack, options: dict[str, Any]) -> str:
    """Digest of a source's files, with their sizes and times, and of how it is stored.

    It is empty if it is not known which files there are: no two such sources are the same.
    """
    if source.files is None:
        return ""
    digest = hashlib.sha256()
    described = {"reading": _READING, "shape": source.shape, "dtype": source.dtype.name, **options}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for line in _files(source.files):
        digest.update(line)
    return digest.hexdigest()


def _files(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
        status = file.stat()
        yield f"{file.absolute()}\0{status.st_size} {status.st_mtime_ns}\0".encode(errors="surrogateescape")


def read_progress(path: str) -> Progress | None:
    """What the layer's folder says of an ingest that has not ended; None if nothing."""
    with storage_errors(f"reading {path}/{PROGRESS}"):
        content = layer_files(path).get(PROGRESS)
    try:
        found = Progress(**json.loads(content or b"{}"))
    except (ValueError, TypeError):
        return None
    types = (type(found.source), type(found.key), type(found.sections))
    return found if types == (str, str, int) else None


def write_progress(path: str, progress: Progress) -> None:
    """Say how far it has come; all that was written before lasts from then on."""
    put_file(plain(path), PROGRESS, json.dumps(asdict(progress)).encode())
