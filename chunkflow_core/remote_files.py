"""Model files at storage addresses: fetched into the cache of this machine, with what they can't do without.

Layout of the cache::

    models/files/<hash of address, ETag and size>/content    one object, fetched once for all processes
    models/<hash of names and objects>/net.py …              a model with its companions, under their own names
"""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

from cloudfiles import CloudFiles

from chunkflow_core.engines.cache import cache_folder, made_once
from chunkflow_core.errors import MissingInputError, StorageError
from chunkflow_core.model_files import MADE_BY_LOADING, imported_names
from chunkflow_core.object_stores import open_files
from chunkflow_core.storage import storage_errors

_CONTENT: Final = "content"


@cache
def fetch(address: str, *, folder: bool = False) -> Path:
    """A model file, or a folder with all that is in it, on this machine; once a process.

    Raises:
        MissingInputError: there is none.
        SpecError: the storage refuses the credentials, or the cache can't be written.
        StorageError: the storage does not answer.
    """
    address = address.rstrip("/")
    place, _, name = (address, "", "") if folder else address.rpartition("/")
    with storage_errors(f"fetching the model {address}"):
        files = open_files(place)
        objects = _folder(files, place) if folder else _file(files, place, name)
    if not objects:
        what = "nothing in the folder" if folder else "no model file"
        raise MissingInputError(f"there is {what} {address} (model.path and model.weights of the spec)")
    key = _hash(*(f"{name} {source.parent.name}" for name, source in sorted(objects.items())))

    def put_together(made: Path) -> None:
        for name, source in objects.items():
            target = made / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)

    return made_once(cache_folder("models") / key, put_together) / name


def _folder(files: CloudFiles, place: str) -> dict[str, Path]:
    names = [name for name in files.list() if name.partition("/")[0] not in MADE_BY_LOADING]
    return {name: _object(files, place, name) for name in names}


def _file(files: CloudFiles, place: str, main: str) -> dict[str, Path]:
    """A file and its companions, by name."""
    python = main.endswith(".py")
    there = set(files.list(prefix="" if python else PurePosixPath(main).stem, flat=True))
    found: dict[str, Path] = {}
    todo = [main] if main in there else []
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = _object(files, place, name)
            todo += _imported(files, found[name], there) if python else _beside(main, there)
    return found


def _imported(files: CloudFiles, source: Path, there: set[str]) -> list[str]:
    names = imported_names(source)
    modules = [f"{name}.py" for name in names if f"{name}.py" in there]
    packages = [file for name in names if f"{name}/" in there for file in files.list(prefix=f"{name}/")]
    return modules + [file for file in packages if file.endswith(".py")]


def _beside(main: str, there: set[str]) -> list[str]:
    suffix = PurePosixPath(main).suffix.lower()
    if suffix == ".onnx":
        return [name for name in there if name.startswith((f"{main}.data", f"{main}_data"))]
    return [name for name in there if suffix == ".xml" and name == f"{PurePosixPath(main).stem}.bin"]


def _object(files: CloudFiles, place: str, name: str) -> Path:
    """One object in the cache; it is asked for its version, and fetched if that isn't there yet."""
    version = _version(files, name)
    folder = cache_folder("models") / "files" / _hash(place, name, version)
    if not folder.is_dir():
        content = files.get(name)
        if content is None or _version(files, name) != version:
            raise StorageError(f"{place}/{name} has been replaced while it was fetched; run again")

        def keep(made: Path) -> None:
            (made / _CONTENT).write_bytes(content)

        made_once(folder, keep)
    return folder / _CONTENT


def _version(files: CloudFiles, name: str) -> str:
    head = files.head(name)
    return f"{head['ETag']} {head['Content-Length']}"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]
