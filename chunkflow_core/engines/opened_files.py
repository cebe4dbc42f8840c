"""Refuses files that a network's Python code opens and that are not in the fingerprint.

Such a file could be replaced, and nobody would notice. Python tells of each file that is opened
(audit event ``open``) before it is; the file is the network's if a function of its files is among
those that are at work. What else this process opens at the same time, in whatever thread, is not
concerned. Libraries that open files without Python, such as HDF5's, do not tell: of those that are
opened while a network is loaded, and for its first patch, the kernel does (``native_opens``).
Commands that a network starts have their files among their arguments.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Final

from chunkflow_core.engines.model_imports import is_inside
from chunkflow_core.engines.native_opens import NativeOpens
from chunkflow_core.errors import SpecError

_EVENTS: Final = {"open": 0, "import": 1, "ctypes.dlopen": 0, "sqlite3.connect": 0}
"""Audit events of files that are read, and which argument is the path.

``import`` has one for compiled modules.
"""

_COMMANDS: Final = {"subprocess.Popen": 1, "os.system": 0, "os.posix_spawn": 1, "os.exec": 1}
"""Audit events of commands that are started, and which argument is the command."""

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
        self._told: set[str] = set()
        """Files that Python has opened, for whomever."""
        self._native: NativeOpens | None = None
        self._begun = 0.0
        self._lock = threading.Lock()

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
        is_command = event in _COMMANDS
        writes = event == "open" and _writes(arguments[2])
        for path in _words(arguments[_COMMANDS[event]]) if is_command else [arguments[_EVENTS[event]]]:
            if isinstance(path, str | bytes | os.PathLike):
                self._look_at(os.fsdecode(path), writes=writes, is_opened=not is_command)

    def _look_at(self, path: str, *, writes: bool, is_opened: bool) -> None:
        name = os.path.abspath(path)  # noqa: PTH100 - called for all files of the process
        place = self._place_of(name)
        if place is None:
            return
        if self._native is not None and is_opened:
            self._told.add(os.path.realpath(name))
        if not writes and self._counts(name, place) and self._is_at_work(sys._getframe(3)):
            self._refuse(name)

    def begin(self) -> None:
        """Have the kernel tell which files are opened without Python."""
        self._begun = time.time()
        self._native = NativeOpens(self._places.values())

    def look_at_native(self, *, for_the_last_time: bool) -> None:
        """Raise ``SpecError`` if a library has opened a file that the network may not."""
        with self._lock:  # patches run in several threads
            opened = self._native.taken() if self._native is not None else []
        if for_the_last_time:
            self.end()
        for name in opened:
            place = self._place_of(name)
            if place is None or os.path.realpath(name) in self._told or not self._counts(name, place):
                continue
            if os.stat(name).st_mtime < self._begun:  # noqa: PTH116 - not one that has just been written
                self._refuse(name)

    def end(self) -> None:
        """No longer have the kernel tell of files."""
        with self._lock:
            if self._native is not None:
                self._native.close()
            self._native = None

    def _place_of(self, name: str) -> str | None:
        return max((place for place in self._places if name.startswith(place)), key=len, default=None)

    def _refuse(self, name: str) -> None:
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
    if _Watcher.current is not None:
        _Watcher.current.end()
    watcher = _Watcher.current = _Watcher(files, folder)
    if not _Watcher.is_installed:
        _Watcher.is_installed = True
        sys.addaudithook(_hook)
    watcher.begin()
    try:
        yield
    finally:
        if watcher.refused is not None:
            raise watcher.refused
        watcher.look_at_native(for_the_last_time=False)


def first_patch_run() -> None:
    """Call it when the network that was loaded last has run a patch.

    Raises:
        SpecError: A library has opened a file that the network may not, as ``watched``.
    """
    if _Watcher.current is not None:
        _Watcher.current.look_at_native(for_the_last_time=True)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if (event in _EVENTS or event in _COMMANDS) and _Watcher.current is not None:
        _Watcher.current.look(event, arguments)


def _words(command: Any) -> list[Any]:
    """The arguments of a command that is started, whatever form it has."""
    if isinstance(command, str | bytes):
        text = os.fsdecode(command)
        try:
            return shlex.split(text)
        except ValueError:  # a quotation that does not end
            return text.split()
    words = []
    for word in command if isinstance(command, list | tuple) else ():
        words += [word, *(_words(word) if isinstance(word, str) and " " in word else ())]
    return words


def _writes(flags: int) -> bool:
    """Whether a file is opened only to be written, or emptied first."""
    return flags & os.O_ACCMODE == os.O_WRONLY or bool(flags & os.O_TRUNC)
