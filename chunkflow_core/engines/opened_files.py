"""Refuses files that a network's Python code opens and that are not in the fingerprint.

Such a file could be replaced, and nobody would notice. Python tells of each file that is opened
(audit event ``open``) before it is; the file is the network's if a function of its files is among
those that are at work. What else this process opens at the same time, in whatever thread, is not
concerned. Libraries that open files without Python, such as HDF5's, tell nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Final

from chunkflow_core.engines.model_imports import is_inside
from chunkflow_core.errors import SpecError

_EVENTS: Final = {"open": 0, "import": 1, "ctypes.dlopen": 0, "sqlite3.connect": 0}
"""Audit events of files that are read, and which argument is the path.

``import`` has one for compiled modules.
"""

_OWN = str(Path(__file__).resolve().parents[1]) + os.sep
"""Folder of this package: it may lie in a model's, and imports its modules when it needs them."""


class _Watcher:
    """The network that was loaded last, and the files that it may open."""

    current: _Watcher | None = None
    is_installed = False
    """Whether the process has the hook, which nothing can remove."""

    def __init__(self, files: Collection[Path], folder: Path) -> None:
        """Take the files of the fingerprint, and the spec's folder."""
        self._files, self._folder = files, folder
        self._is_own: dict[str, bool] = {}
        self.refused: SpecError | None = None

    @cached_property
    def _real(self) -> frozenset[str]:
        return frozenset(map(os.path.realpath, self._files))

    @cached_property
    def _places(self) -> dict[str, Path]:
        """The folders of the files, as prefixes of paths: as they are named, and as they are."""
        folders = {folder for file in self._files for folder in (file.parent.absolute(), file.parent.resolve())}
        return {str(folder / "-")[:-1]: folder for folder in folders}

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise ``SpecError`` if an event is that the network opens a file that it may not."""
        path = arguments[_EVENTS[event]]
        if not isinstance(path, str | bytes | os.PathLike) or (event == "open" and _writes(arguments[2])):
            return
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - called for all files of the process
        place = max((place for place in self._places if name.startswith(place)), key=len, default=None)
        if place is None or not self._counts(name, place) or not self._is_at_work(sys._getframe(2)):
            return
        self.refused = SpecError(
            f"model.path: the network opens {name}, which is not among the files that make the model, so that nobody "
            f'would notice if it were replaced. Add to the spec: model.files: ["{self._named(name)}"] (or globs)'
        )
        raise self.refused

    def _counts(self, name: str, place: str) -> bool:
        """Whether a file in a folder is one that can be part of the model, and is not known yet."""
        folders = Path(name.removeprefix(place)).parts[:-1]
        if any(folder.startswith(".") or folder == "__pycache__" for folder in folders):
            return False
        real = os.path.realpath(name)
        if real in self._real or real.startswith(_OWN) or not os.path.isfile(real):  # noqa: PTH113
            return False
        return is_inside(name, self._places[place].resolve())

    def _is_at_work(self, frame: FrameType | None) -> bool:
        """Whether a function of the network is among the callers."""
        while frame is not None:
            name = frame.f_code.co_filename
            if name not in self._is_own:
                self._is_own[name] = os.path.realpath(name) in self._real
            if self._is_own[name]:
                return True
            frame = frame.f_back
        return False

    def _named(self, name: str) -> str:
        """The path as it would stand in the spec."""
        real, folder = Path(name).resolve(), self._folder.resolve()
        return str(real.relative_to(folder) if real.is_relative_to(folder) else name)


@contextmanager
def watched(files: Collection[Path], folder: Path) -> Iterator[None]:
    """Load a network within this; it is watched from then on, also when it runs.

    Args:
        files: The files of the fingerprint.
        folder: The spec's folder, to which ``model.files`` are relative.

    Raises:
        SpecError: The network opens a file beside them, even if it then goes on without.
    """
    watcher = _Watcher.current = _Watcher(files, folder)
    if not _Watcher.is_installed:
        _Watcher.is_installed = True
        sys.addaudithook(_hook)
    try:
        yield
    finally:
        if watcher.refused is not None:
            raise watcher.refused


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _EVENTS and _Watcher.current is not None:
        _Watcher.current.look(event, arguments)


def _writes(flags: int) -> bool:
    """Whether a file is opened only to be written, or emptied first."""
    return flags & os.O_ACCMODE == os.O_WRONLY or bool(flags & os.O_TRUNC)
