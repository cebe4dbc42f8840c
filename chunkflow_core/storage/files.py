"""What all files in storage have in common: addresses, writes in one step, and errors.

The clients of object stores take a second to import: what is on a disk does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, StorageError
from chunkflow_core.storage.compression import CorruptFileError
from chunkflow_core.storage.disk import DiskFiles, local_path, replace_file
from chunkflow_core.storage.disk import create_file as create_on_disk
from chunkflow_core.storage.durable import sync_written

_JSON = (".json", ".open", "info", "provenance")
"""Endings of the names of files that hold JSON."""

CORRUPT = {"CompressionError", "DecompressionError", "DecodingError", "DeflateError", "ZstdError"}
"""Names of the errors that CloudFiles, CloudVolume and what they use raise for damaged files.

Importing the classes would take a second.
"""


class Files(Protocol):
    """The files below an address: ``CloudFiles``, or ``DiskFiles``, which documents the methods."""

    def get(self, names: Any, *, raw: bool = False) -> Any:
        """Read a file, or several; see ``DiskFiles.get``."""

    def list(self, prefix: str = "", flat: bool = False, size: bool = False) -> Iterator[Any]:
        """Names that begin with ``prefix``; see ``DiskFiles.list``."""

    def delete(self, names: str | Iterable[str]) -> Any:
        """Delete files; those that aren't there are passed over."""

    def size(self, names: Iterable[str]) -> dict[str, int | None]:
        """Sizes of files as they are stored, in bytes; None for those that aren't there."""


class MissingChunkError(Exception):
    """A storage chunk has no file."""


def open_files(path: str) -> Files:
    """The files below an address; nothing is read yet."""
    if is_on_disk(path):
        return DiskFiles(path)
    from chunkflow_core.storage.clients import open_files as open_remote

    files: Files = open_remote(path)
    return files


def get_parts(path: str, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Some parts of a file below an address, each from a byte up to before another.

    Raises:
        CorruptFileError: The file is not there any more, or too short.
    """
    if not ranges:
        return []
    if is_on_disk(path):
        parts = DiskFiles(path).parts(name, ranges)
    else:
        from chunkflow_core.storage.clients import open_files as open_remote

        asked = [{"path": name, "start": start, "end": stop} for start, stop in ranges]
        answers = {answer["byte_range"]: answer["content"] for answer in open_remote(path).get(asked, raw=True)}
        parts = [answers[each] for each in ranges]
    if any(part is None or len(part) != stop - start for part, (start, stop) in zip(parts, ranges, strict=True)):
        raise CorruptFileError(f"storage chunk {name} has changed while it was read", name)
    return parts


def is_on_disk(path: str) -> bool:
    """Whether an address is that of a folder on a disk of this machine."""
    return path.startswith("file://")


@contextmanager
def storage_errors(doing: str, *, missing: str | Callable[[], str] = "") -> Iterator[None]:
    """Turn a storage client's exceptions into those of this project.

    Args:
        doing: What is tried and where, for the message.
        missing: Advice for a storage chunk that isn't there, or what gives it.

    Raises:
        MissingInputError: A storage chunk or a bucket isn't there.
        DataError: A stored file is corrupt.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage does not answer, or is full.
    """
    try:
        yield
    except ChunkflowError:
        raise
    except Exception as error:
        kind_name, text = type(error).__name__, " ".join(str(error).split())
        if isinstance(error, MissingChunkError) or kind_name == "EmptyVolumeException":  # of CloudVolume
            advice = missing if isinstance(missing, str) else missing()
            raise MissingInputError(f"{doing}: a storage chunk is missing ({error}). {advice}") from error
        if isinstance(error, CorruptFileError) or kind_name in CORRUPT:
            raise DataError(f"{doing}: a stored file is corrupt: {error}") from error
        if type(error).__module__ != "builtins":
            from chunkflow_core.storage.clients import explained, meaning

            if kind := meaning(error):
                raise kind(f"{doing}: {explained(error)}") from error
        elif isinstance(error, OSError):  # of this machine's disks, or of a connection
            raise StorageError(f"{doing}: {kind_name}: {text}") from error
        raise


def put_file(path: str, name: str, content: bytes, *, compression: str | None = None, cache: str = "no-cache") -> str:
    """Store a file below ``path``, and return its signature. A reader never sees half of it.

    On a local disk it is renamed into place. A file of JSON speaks of others: of their form, of
    whose they are, or that they are complete. So what this process has written to disks before is
    made to last first, and then the file itself; a power loss takes neither. Any other file lasts
    from the next one of JSON on.

    Args:
        path: Address of a folder.
        name: Name of the file below the folder.
        content: What to store, compressed already if it is to be.
        compression: ``gzip``, ``br`` or ``zstd`` if the content is compressed, else None.
        cache: What HTTP caches may do with the file, a ``Cache-Control`` header.

    Returns:
        What the storage says of this very file, as ``LayerSignatures`` asks for it; empty if it
        says nothing.

    Raises:
        MissingInputError: There is no such bucket.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage does not answer, or is full.
    """
    speaks = name.endswith(_JSON)
    with storage_errors(f"writing {path}/{name}"):
        if speaks:
            sync_written()  # also before it goes elsewhere: a receipt in a bucket, voxels on a disk
        if is_on_disk(path):
            return replace_file(local_path(path) / name, content, compression, durable=speaks)
        from chunkflow_core.storage.uploads import Object, upload

        kind = "application/json" if speaks else "application/octet-stream"
        return upload(path, name, Object(content, kind, compression, cache))


def create_file(path: str, name: str, content: bytes) -> bool:
    """Store a file of JSON that is not there yet, and say whether it is this one that is there.

    Of several calls at the same time, on whichever machines, one stores its file. It lasts, as all
    does that this process has written to disks before.

    Args:
        path: Address of a folder.
        name: Name of the file below the folder.
        content: What to store. No other call has the same, so that it is known whose file it is
            even if the answer was lost.

    Raises:
        MissingInputError: There is no such bucket.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage does not answer, or is full.
    """
    with storage_errors(f"writing {path}/{name}"):
        sync_written()
        if is_on_disk(path):
            return create_on_disk(local_path(path) / name, content)
        from chunkflow_core.storage.uploads import Object, create

        return create(path, name, Object(content, "application/json")) or open_files(path).get(name) == content
