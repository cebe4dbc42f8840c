"""What all files in storage have in common: they are replaced in one step, and there is one way of saying what went wrong."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import time

from cloudfiles.exceptions import CompressionError, DecompressionError
from cloudfiles.interfaces import FileInterface

from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError
from chunkflow_core.object_stores import explained, meaning, open_files

_JSON = (".json", "info", "provenance")
"""How names of such files end."""

PARTIAL = ".partial"
"""How names of files end that are being written to a local disk."""

_EXTENSIONS = {FileInterface.get_extension(compression) for compression in (None, "gzip", "br", "zstd")}


@contextmanager
def storage_errors(doing: str, *, missing: str = "") -> Iterator[None]:
    """Turn a storage client's exceptions into ours; ``doing`` says what was tried and where.

    ``missing`` is the advice for a storage chunk that isn't there.
    """
    try:
        yield
    except ChunkflowError:
        raise
    except Exception as error:
        kind_name = type(error).__name__  # cloudvolume takes a second to import, and Airflow's side does without it
        if kind_name == "EmptyVolumeException":
            raise MissingInputError(f"{doing}: a storage chunk is missing ({error}). {missing}") from error
        if kind_name in ("DecodingError", "DeflateError", "ZstdError") or isinstance(
            error, CompressionError | DecompressionError
        ):
            raise DataError(f"{doing}: a stored file is corrupt: {error}") from error
        if kind := meaning(error):
            raise kind(f"{doing}: {explained(error)}") from error
        raise


def put_file(path: str, name: str, content: bytes, *, compression: str | None = None, cache: str = "no-cache") -> None:
    """Store a file below ``path``. A reader never sees half of it: on a local disk it is renamed into place.

    Args:
        path: address of a folder.
        name: of the file below it.
        content: compressed already, if it is.
        compression: ``gzip``, ``br`` or ``zstd`` if it is.
        cache: for HTTP caches.

    Raises:
        StorageError: the storage does not answer, or is full.
    """
    with storage_errors(f"writing {path}/{name}"):
        if path.startswith("file://"):
            _replace(_local(path) / name, FileInterface.get_extension(compression), content)
        else:
            open_files(path).put(
                name,
                content,
                content_type="application/json" if name.endswith(_JSON) else "application/octet-stream",
                compress=compression,
                cache_control=cache,
                raw=True,
            )


def delete_partials(path: str, older_than: float) -> None:
    """Delete what writers that were killed have left behind below a folder on a local disk; ``older_than`` in seconds."""
    if path.startswith("file://"):
        for file in _local(path).rglob(f".*{PARTIAL}"):
            with suppress(FileNotFoundError):
                if time() - file.stat().st_mtime > older_than:
                    file.unlink()


def _replace(target: Path, extension: str, content: bytes) -> None:
    """Write a file, and remove those of the same name in other compressions, which a reader might find first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        partial.write_bytes(content)
        partial.replace(f"{target}{extension}")
    finally:
        partial.unlink(missing_ok=True)
    for other in _EXTENSIONS - {extension}:
        Path(f"{target}{other}").unlink(missing_ok=True)


def _local(path: str) -> Path:
    return Path(path.removeprefix("file://")).expanduser()
