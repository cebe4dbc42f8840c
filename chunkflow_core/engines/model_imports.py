"""Running a model's Python file, which may import its siblings: as they are now, not as they were compiled once.

Where Python imports a file, it takes the compilation in ``__pycache__`` if that tells the file's size and the second in which it was
changed, and else leaves one there. A model that was edited within a second, or put back from a copy that kept its date, would give
another network's numbers under its own fingerprint.
"""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import sys
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType


class _Imports:
    """What the model file that was loaded last has brought into this process."""

    folder: Path | None = None
    before: frozenset[str] = frozenset()
    """Names of the modules that were there before it."""


class _AsItIs(SourceFileLoader):
    """Compiles what the file holds, and leaves nothing beside it."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def import_file(path: Path) -> ModuleType:
    """Run a model file as a module.

    The siblings of the model before are forgotten first, as another model's may have the same names.
    """
    if _Imports.folder is not None:
        for name in set(sys.modules) - _Imports.before:
            if _is_beside(sys.modules[name], name, _Imports.folder):
                del sys.modules[name]
        with suppress(ValueError):
            sys.path.remove(str(_Imports.folder))
    _Imports.folder, _Imports.before = path.parent.resolve(), frozenset(sys.modules)
    sys.path.insert(0, str(_Imports.folder))
    _look_there_first()
    spec = importlib.util.spec_from_file_location("chunkflow_model", path, loader=_AsItIs("chunkflow_model", str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _look_there_first() -> None:
    """Have what is in the model's folder found by :func:`_finder`, whoever has looked there before."""
    if _finder not in sys.path_hooks:
        sys.path_hooks.insert(0, _finder)
    for place in list(sys.path_importer_cache):
        if _is_inside(Path(place), _Imports.folder):
            del sys.path_importer_cache[place]
    importlib.invalidate_caches()
    linecache.clearcache()  # where torch.jit.script reads functions


def _finder(place: str) -> FileFinder:
    """A hook for ``sys.path``: the finder of the model's folder, and of the packages in it."""
    if not _is_inside(Path(place), _Imports.folder):
        raise ImportError(f"{place} is not a model's folder")
    return FileFinder(place, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_AsItIs, SOURCE_SUFFIXES))


def _is_inside(place: Path, folder: Path | None) -> bool:
    """Whether it is the folder or, by its name, a package in it; a virtual environment that lies there is not."""
    if folder is None or not place.is_relative_to(folder):
        return False
    return all(name.isidentifier() for name in place.relative_to(folder).parts)


def _is_beside(module: ModuleType, name: str, folder: Path) -> bool:
    """Whether a module is a file or package directly in a folder, or inside such a package."""
    top = name.partition(".")[0]
    places = [Path(place) for place in (getattr(module, "__file__", None), *getattr(module, "__path__", ())) if place]
    return any(place.is_relative_to(folder / top) or place == folder / f"{top}.py" for place in places)
