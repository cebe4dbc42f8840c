"""Model files and their companions: local ones, and those fetched into the cache of this machine.

Layout of the cache::

    models/files/<hash of address, ETag and size>/content    one object, fetched once for all
    models/<hash of names and objects>/net.py …              a model with its companions, by name
    <engine>/<key>                                           a model in an engine's own form
"""

from __future__ import annotations

import ast
import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from chunkflow_core.errors import MissingInputError, SpecError, StorageError
from chunkflow_core.storage.external_data import external_data

if TYPE_CHECKING:
    from cloudfiles import CloudFiles

CACHE_VARIABLE = "CHUNKFLOW_CACHE"
"""Environment variable with the folder of the cache; default: ``~/.cache/chunkflow``."""

MADE_BY_LOADING = ("lib", "__pycache__")
"""What arises in the folder of a net of pznet when the net is loaded.

``lib`` holds its layers, compiled for the machine.
"""

_CONTENT: Final = "content"


def with_companions(path: Path) -> list[Path]:
    """A model file and the files that it can't do without.

    For the folder of a net of pznet, they are all files that did not arise from loading it.
    """
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.is_file() and f.relative_to(path).parts[0] not in MADE_BY_LOADING)
    if path.suffix == ".py":
        return _with_imported_siblings(path)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        named = [path.parent / name for name in _named_in(path, path)]
        if missing := [file for file in named if not file.is_file()]:
            raise MissingInputError(f"there is no {missing[0]}, where {path.name} says that it has tensors")
        return [path, *(file for file in named if file != path)]
    beside = path.with_suffix(".bin")
    return [path, beside] if suffix == ".xml" and beside.is_file() else [path]


def listed_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files that ``model.files`` names; each once, those of a glob sorted.

    Args:
        folder: Folder to which they are relative.
        names: Paths, or globs; ``**`` stands for folders at any depth.

    Raises:
        MissingInputError: One of them names no file.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name.removeprefix("file://")).expanduser()
        there = [folder / path]
        if not there[0].exists():
            # Path.glob takes no absolute ones
            fitting = glob.glob(str(path), root_dir=folder, recursive=True, include_hidden=True)  # noqa: PTH207
            there = [folder / other for other in sorted(fitting)]
        files = [file for file in there if file.is_file() and "__pycache__" not in file.parts]
        if not files:
            raise MissingInputError(f"model.files: {name}: there is no such file (looked for in {folder})")
        found |= dict.fromkeys(files)
    return list(found)


def _named_in(file: Path, model: Path | str) -> list[str]:
    """The files, relative to its own folder, that an ONNX file says its tensors are in.

    Args:
        file: The file that is read.
        model: Its path or address for messages.
    """
    try:
        return sorted(external_data(file, model))
    except OSError as error:
        raise MissingInputError(f"model file {model} can't be read: {error.strerror}") from error


def imported_names(file: Path) -> set[str]:
    """Names of the top-level modules that a Python file imports; none if it can't be parsed."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return set()  # reported when the file is digested or loaded
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    return names


def _with_imported_siblings(path: Path) -> list[Path]:
    """A Python file and, recursively, the files beside it that it imports; sorted, each once."""
    found: set[Path] = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        for name in imported_names(file):
            base = path.parent / name
            todo += [p for p in [base.with_suffix(".py")] if p.is_file()]
            todo += sorted(base.rglob("*.py")) if base.is_dir() else []  # a package, with or without __init__.py
    return sorted(found)


@cache
def fetch(address: str, *, folder: bool = False, files: tuple[str, ...] = ()) -> Path:
    """A model file, or a folder with all that is in it, on this machine.

    An address is looked up once a process.

    Args:
        address: Storage address of the file or folder.
        folder: Whether it is a folder.
        files: Further files to bring along, as ``listed_files`` takes them, relative to the folder
            that the file is in.

    Raises:
        MissingInputError: There is no such file, or nothing in the folder.
        SpecError: The storage refuses the credentials, or the cache can't be written.
        StorageError: The storage does not answer.
    """
    # imports that local models need not pay, a second of them
    from chunkflow_core.storage.clients import open_files
    from chunkflow_core.storage.files import storage_errors

    address = address.rstrip("/")
    place, _, name = (address, "", "") if folder else address.rpartition("/")
    with storage_errors(f"fetching the model {address}"):
        store = open_files(place)
        objects = _folder(store, place) if folder else _file(store, place, name)
        if objects:
            objects |= {name: _object(store, place, name) for name in _listed(store, place, files)}
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
            if python:
                todo += _imported(files, found[name], there)
            elif name == main:
                todo += _beside(files, place, main, found[main], there)
    return found


def _imported(files: CloudFiles, source: Path, there: set[str]) -> list[str]:
    names = imported_names(source)
    modules = [f"{name}.py" for name in names if f"{name}.py" in there]
    packages = [file for name in names if f"{name}/" in there for file in files.list(prefix=f"{name}/")]
    return modules + [file for file in packages if file.endswith(".py")]


def _beside(files: CloudFiles, place: str, main: str, source: Path, there: set[str]) -> list[str]:
    """The files that a compiled model can't do without.

    Args:
        files: The files of the model's folder.
        place: Address of that folder.
        main: Name of the model file.
        source: Its path in the cache.
        there: Names in the folder that begin as that of the model file.
    """
    suffix = PurePosixPath(main).suffix.lower()
    if suffix != ".onnx":
        return [name for name in there if suffix == ".xml" and name == f"{PurePosixPath(main).stem}.bin"]
    names = [str(PurePosixPath(name)) for name in _named_in(source, f"{place}/{main}")]
    for name in names:
        if name not in there and name not in files.list(prefix=name):
            raise MissingInputError(f"there is no {place}/{name}, where {main} says that it has tensors")
    return names


def _listed(files: CloudFiles, place: str, names: Iterable[str]) -> list[str]:
    """The files below a place that ``model.files`` names; as ``listed_files``."""
    found: list[str] = []
    for name in names:
        fixed = re.split(r"[*?\[]", name, maxsplit=1)[0]
        below = [other for other in files.list(prefix=fixed) if "__pycache__" not in other.split("/")]
        there = [name] if name in below else [o for o in below if _fits(o.split("/"), name.split("/"))]
        if not there:
            raise MissingInputError(f"model.files: there is no file {place}/{name}")
        found += there
    return found


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a glob, both cut at slashes."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return _fits(name, pattern[1:]) or (bool(name) and _fits(name[1:], pattern))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _fits(name[1:], pattern[1:])


def _object(files: CloudFiles, place: str, name: str) -> Path:
    """The path of an object in the cache, fetched if its present version isn't there yet."""
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


def cache_folder(engine: str) -> Path:
    """An engine's folder of the cache; it need not exist."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/chunkflow").expanduser() / engine


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by ``make`` if it isn't there yet.

    It appears whole or not at all, also if several processes make it at once or one is killed while
    it does: ``make`` gets a folder beside it, which is renamed when it is complete.

    Raises:
        SpecError: The cache can't be written.
    """
    if folder.is_dir():
        return folder
    unfinished = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        make(unfinished)
        _put_in_place(unfinished, folder)
    except OSError as error:
        raise SpecError(
            f"the cache {folder.parent} can't be written: {error.strerror}; set {CACHE_VARIABLE} to another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _put_in_place(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, and has made the same
            raise
