"""What all files in storage have in common: where they are, that they are replaced in one step, and how trouble is told.

The clients of object stores take a second to import: what is on a disk does without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, StorageError
from chunkflow_core.storage.compression import CorruptFileError
from chunkflow_core.storage.disk import DiskFiles, local_path, replace_file

_JSON = (".json", "info", "provenance")
"""How names of such files end."""

_CORRUPT = {"CompressionError", "DecompressionError", "DecodingError", "DeflateError", "ZstdError"}
"""Errors of CloudFiles, CloudVolume and what they use, by name, as importing them takes a second."""


class Files(Protocol):
    """The files below an address: ``CloudFiles``, or ``DiskFiles`` where what the methods do is told."""

    def get(self, names: Any, *, raw: bool = False) -> Any:
        """Read a file, or several."""

    def list(self, prefix: str = "", flat: bool = False, size: bool = False) -> Iterator[Any]:
        """Names that begin with ``prefix``."""

    def delete(self, names: str | Iterable[str]) -> Any:
        """Delete files."""

    def size(self, names: Iterable[str]) -> dict[str, int | None]:
        """Sizes of files."""


class MissingChunkError(Exception):
    """There is no file of a storage chunk."""


def open_files(path: str) -> Files:
    """The files below an address; nothing is read yet."""
    if is_on_disk(path):
        return DiskFiles(path)
    from chunkflow_core.storage.clients import open_files as open_remote

    files: Files = open_remote(path)
    return files


def is_on_disk(path: str) -> bool:
    """Whether an address is that of a folder on a disk of this machine."""
    return path.startswith("file://")


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
        kind_name, text = type(error).__name__, " ".join(str(error).split())
        if isinstance(error, MissingChunkError) or kind_name == "EmptyVolumeException":  # of CloudVolume
            raise MissingInputError(f"{doing}: a storage chunk is missing ({error}). {missing}") from error
        if isinstance(error, CorruptFileError) or kind_name in _CORRUPT:
            raise DataError(f"{doing}: a stored file is corrupt: {error}") from error
        if type(error).__module__ != "builtins":
            from chunkflow_core.storage.clients import explained, meaning

            if kind := meaning(error):
                raise kind(f"{doing}: {explained(error)}") from error
        elif isinstance(error, OSError):  # of this machine's disks, or of a connection
            raise StorageError(f"{doing}: {kind_name}: {text}") from error
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
        if is_on_disk(path):
            replace_file(local_path(path) / name, content, compression)
            return
        from chunkflow_core.storage.clients import open_files as open_remote

        open_remote(path).put(
            name,
            content,
            content_type="application/json" if name.endswith(_JSON) else "application/octet-stream",
            compress=compression,
            cache_control=cache,
            raw=True,
        )
