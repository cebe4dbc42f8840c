"""Running a model's Python file and the siblings that it imports, as they are at the moment.

Where Python imports a file, it takes the compilation in ``__pycache__`` if that tells the file's
size and the second in which it was changed, and else leaves one there. A model that was edited
within a second, or put back from a copy that kept its date, would give another network's numbers
under its own fingerprint.
"""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import os
import site
import sys
import sysconfig
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType

_INSTALLED = {
    Path(place).resolve()
    for place in (
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    )
}
"""Folders of Python and of installed packages.

Whoever changes what is there installs it, and has it compiled.
"""


class _Imports:
    """What the model file that was loaded last has brought into this process."""

    folder: Path | None = None
    modules: frozenset[str] = frozenset()
    """Names of the modules that were there before the model file."""
    path: frozenset[str] = frozenset()
    """Entries of ``sys.path`` from before the model file."""


class _AsItIs(SourceFileLoader):
    """Compiles what the file holds, and leaves nothing beside it."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def import_file(path: Path) -> ModuleType:
    """Run a model file as a module.

    The siblings of the model before are forgotten first, as another model's may have the same
    names.
    """
    forget_model()
    _Imports.folder = path.parent.resolve()
    _Imports.modules, _Imports.path = frozenset(sys.modules), frozenset(sys.path)
    sys.path.insert(0, str(_Imports.folder))
    forget_files()
    loader = _AsItIs("chunkflow_model", str(path.absolute()))
    spec = importlib.util.spec_from_file_location("chunkflow_model", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    loader.exec_module(module)
    return module


def forget_model() -> None:
    """Forget what the model before has brought along from its folder."""
    folder = _Imports.folder
    if folder is None:
        return
    new = {name: sys.modules[name] for name in set(sys.modules) - _Imports.modules}
    for name in [name for name, module in new.items() if _is_of(name, module, folder)]:
        del sys.modules[name]
    sys.path[:] = [place for place in sys.path if place in _Imports.path or not is_inside(place, folder)]


def forget_files() -> None:
    """Have Python forget what it knows of files that are not installed.

    Their next import reads and compiles them as they are.
    """
    if _finder not in sys.path_hooks:
        sys.path_hooks.insert(0, _finder)
        for place in [place for place in sys.path_importer_cache if not _is_installed(place)]:
            del sys.path_importer_cache[place]
    importlib.invalidate_caches()
    for name in [name for name in linecache.cache if not name.startswith("<")]:  # those have no file
        del linecache.cache[name]  # torch.jit.script reads functions there


def _finder(place: str) -> FileFinder:
    """Find what Python finds in a folder, but for compilations of files that are there.

    This is a hook for ``sys.path``.
    """
    if _is_installed(place) or not os.path.isdir(place or "."):  # noqa: PTH112 - False also where nobody may look
        raise ImportError(f"{place} is for Python's own finder")
    return FileFinder(
        place,
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (_AsItIs, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )


def _is_installed(place: str) -> bool:
    folder = Path(place).resolve()
    return not _INSTALLED.isdisjoint((folder, *folder.parents))


def is_inside(place: str, folder: Path) -> bool:
    """Whether a file or folder is in a model's folder, which has no links in its path.

    What is installed there is not, unless the model is, too.
    """
    if not Path(place).resolve().is_relative_to(folder) or folder in _INSTALLED:
        return False
    return _is_installed(str(folder)) or not _is_installed(place)


def _is_of(name: str, module: ModuleType, folder: Path) -> bool:
    """Whether a module lies in a model's folder.

    This package may lie there, too, and does not count: it imports its own modules when it needs
    them.
    """
    if name.partition(".")[0] == __name__.partition(".")[0]:
        return False
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(is_inside(place, folder) for place in places if place)
