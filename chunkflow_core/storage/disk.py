"""Files below a folder on a disk of this machine, with those calls of CloudFiles that are used.

CloudFiles brings the clients of all object stores along, which takes a second of CPU to import.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Any, overload

from chunkflow_core.storage.compression import EXTENSIONS, decompress
from chunkflow_core.storage.durable import each, make_folder, sync_folders, sync_later

PARTIAL = ".partial"
"""Ending of the names of files that are being written."""

_CANNOT_LINK = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK)
"""What file systems answer that have no hard links, such as some that show a bucket as a disk."""


class DiskFiles:
    """The files below a folder.

    A file may be stored compressed; its extension for that is not part of its name here.
    """

    def __init__(self, path: str) -> None:
        """Name the folder by its address, ``file://…``; it need not be there."""
        self._folder = local_path(path)
        self._extensions = list(EXTENSIONS)

    @overload
    def get(self, names: str, *, raw: bool = ...) -> bytes | None: ...
    @overload
    def get(self, names: list[str], *, raw: bool = ...) -> list[dict[str, Any]]: ...
    def get(self, names: str | list[str], *, raw: bool = False) -> bytes | list[dict[str, Any]] | None:
        """Read a file, or several.

        Args:
            names: Name of a file, or a list of names.
            raw: Whether the content is left compressed, as the answer's ``compress`` says.

        Returns:
            Content of the file, None if it isn't there; for a list, a dict of ``path``, ``content``
            and ``compress`` for each name.

        Raises:
            CorruptFileError: A file can't be decompressed.
            OSError: The disk does not answer.
        """
        if isinstance(names, str):
            content: bytes | None = self._read(names, raw=raw)["content"]
            return content
        return [self._read(name, raw=raw) for name in names]

    def parts(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Parts of a file that is not compressed, each from a byte up to before another.

        Where it ends before, or isn't there, parts are shorter.
        """
        try:
            file = os.open(self._folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return [b""] * len(ranges)
        try:
            return [os.pread(file, stop - start, start) for start, stop in ranges]
        finally:
            os.close(file)

    def files_of(self, name: str) -> list[str]:
        """The files, by their own names, that are stored under a name in several compressions."""
        files = [self._folder / f"{name}{extension}" for extension in EXTENSIONS]
        return [file.name for file in files if file.exists()]

    def list(self, prefix: str = "", flat: bool = False, size: bool = False) -> Iterator[Any]:
        """Names that begin with ``prefix``, in order.

        Args:
            prefix: Beginning of the names. With ``flat`` it is a folder: empty, or with a ``/`` at
                its end.
            flat: Whether folders in that folder are named themselves, with a ``/`` at the end,
                instead of the files in them.
            size: Whether to give pairs of name and size, as the method ``size`` has them.

        Raises:
            OSError: The disk does not answer, or refuses. Only a folder that is not there is an
                empty one.
        """
        inside, slash, beginning = prefix.rpartition("/")
        folder, above = str(self._folder / inside), inside + slash
        if flat:
            names = (f"{entry.name}/" if entry.is_dir() else plain_name(entry.name) for entry in scan(folder))
            found = {above + name for name in names}
        else:
            found = set(map(plain_name, files_below(folder, above, beginning)))
        ordered = sorted(found)
        if not size:
            return iter(ordered)
        return ((name, length) for name, length in self.size(ordered).items() if length is not None)

    def delete(self, names: str | Iterable[str]) -> None:
        """Delete files for good; those that aren't there are passed over.

        They do not come back after a power loss. Another process may have deleted a file a moment
        ago: its folder is synced all the same.
        """
        unwanted = [names] if isinstance(names, str) else list(names)
        each(self._delete, unwanted)
        sync_folders({(self._folder / name).parent for name in unwanted})

    def size(self, names: Iterable[str]) -> dict[str, int | None]:
        """Sizes of files as they are stored, in bytes; None for those that aren't there."""
        wanted = list(names)
        return dict(zip(wanted, each(self._size, wanted), strict=True))

    def changed_since(self, names: Iterable[str], moment: float) -> bool:
        """Whether any of some files was changed after a moment, Unix time."""
        files = (self._folder / f"{name}{extension}" for name in names for extension in EXTENSIONS)
        return any(file.exists() and file.stat().st_mtime > moment for file in files)

    def _read(self, name: str, *, raw: bool) -> dict[str, Any]:
        for extension in self._extensions:
            try:
                content = (self._folder / f"{name}{extension}").read_bytes()
            except FileNotFoundError:
                continue
            method = EXTENSIONS[extension]
            if extension != self._extensions[0]:  # the next file will probably have the same one
                self._extensions = sorted(EXTENSIONS, key=lambda other: other != extension)
            return {"path": name, "content": content if raw else decompress(content, method), "compress": method}
        return {"path": name, "content": None, "compress": None}

    def _delete(self, name: str) -> None:
        for extension in EXTENSIONS:
            (self._folder / f"{name}{extension}").unlink(missing_ok=True)

    def _size(self, name: str) -> int | None:
        for extension in EXTENSIONS:
            with suppress(FileNotFoundError):
                return (self._folder / f"{name}{extension}").stat().st_size
        return None


def local_path(path: str) -> Path:
    """The folder of an address ``file://…`` on this machine."""
    return Path(path.removeprefix("file://")).expanduser()


def file_signature(status: os.stat_result, extension: str) -> str:
    """What a disk says of a file: its compression's extension, time of last change in ns, size."""
    return f"{extension} {status.st_mtime_ns} {status.st_size}"


def replace_file(target: Path, content: bytes, compression: str | None, *, durable: bool = True) -> str:
    """Write a file in one step, and return its signature.

    Files of the same name in other compressions, which a reader might find first, are removed.

    Args:
        target: The file, without the extension of its compression.
        content: What to write, compressed already if it is to be.
        compression: ``gzip``, ``br`` or ``zstd`` if the content is compressed, else None.
        durable: Whether a power loss from now on leaves the file as it is, whole. Else it is
            noted for ``sync_written``; until then a part of it may be left, or none.
    """
    make_folder(target.parent)
    partial = target.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    (extension,) = (end for end, method in EXTENSIONS.items() if method == compression)
    try:
        with partial.open("wb") as written:
            written.write(content)
            written.flush()
            if durable:  # before it is renamed: a name without contents must not stay
                os.fsync(written.fileno())
            # of this very file: under its name there may soon be another one
            signature = file_signature(os.fstat(written.fileno()), extension)
        partial.replace(f"{target}{extension}")
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_folders([target.parent])
    else:
        sync_later(Path(f"{target}{extension}"))
    others = [file for end in EXTENSIONS if end != extension and (file := Path(f"{target}{end}")).exists()]
    for file in others:
        file.unlink(missing_ok=True)
    if durable and others:
        sync_folders([target.parent])
    return signature


def create_file(target: Path, content: bytes) -> bool:
    """Write a file that is not there yet, and say whether it was made: of several, one is told so.

    Where there are hard links, the file appears with its whole content. It stays after a power
    loss.
    """
    make_folder(target.parent)
    partial = target.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        _write_anew(partial, content)
        os.link(partial, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        try:
            _write_anew(target, content)
        except FileExistsError:
            return False
    finally:
        partial.unlink(missing_ok=True)
    sync_folders([target.parent])
    return True


def _write_anew(file: Path, content: bytes) -> None:
    """Write a file that lasts; ``FileExistsError`` if it is there."""
    with file.open("xb") as written:
        written.write(content)
        written.flush()
        os.fsync(written.fileno())


def delete_partials(path: str, older_than: float) -> None:
    """Delete what writers that were killed have left behind below a folder.

    Args:
        path: Address of the folder, ``file://…``.
        older_than: Least age of what is deleted, in seconds.
    """
    for file in local_path(path).rglob(f".*{PARTIAL}"):
        with suppress(FileNotFoundError):
            if time() - file.stat().st_mtime > older_than:
                file.unlink()


def files_below(folder: str, above: str = "", beginning: str = "") -> Iterator[str]:
    """Files below a folder, with ``above`` before their names.

    Those whose path in the folder begins otherwise are left out while the folder is read: a group
    of the exchange may hold a hundred thousand files, and a block asks for its own. Links to
    folders are not followed.
    """
    for entry in scan(folder, beginning):  # strings, since there can be a million of files
        if not entry.is_dir():
            yield above + entry.name
        elif not entry.is_symlink():
            yield from files_below(entry.path, f"{above}{entry.name}/", "")


def scan(folder: str, beginning: str = "") -> Iterator[os.DirEntry[str]]:
    """What is in a folder and begins so; nothing if the folder is not there.

    ``os.walk`` would take a folder that can't be read for an empty one.
    """
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        yield from (entry for entry in entries if entry.name.startswith(beginning))


def plain_name(name: str) -> str:
    """The name of a file without the extension of a compression."""
    base, dot, extension = name.rpartition(".")
    return base if dot + extension in EXTENSIONS and dot else name
