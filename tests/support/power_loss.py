"""What a power loss may leave of what a process has done to files, after each of its calls.

A recording has every call that changes files below some folders, in order. Python's audit events
make sure that none is missed. A disk is then whatever POSIX allows after a part of them: a name has
any of the values that it has had since its folder was last synced, whatever other names have; a
file has its contents if it was synced, else any beginning of them.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest

Value = int | Literal["folder", "none", "deleted"]
"""What a name stands for: a file, by its number; a folder; nothing yet; nothing any more."""
_CALLS = {
    "mkdir": "os.mkdir",
    "replace": "os.rename",
    "rename": "os.rename",
    "link": "os.link",
    "unlink": "os.remove",
}
"""Functions of ``os`` that a recording wraps, and the audit events that they and others raise."""
_NAMES = ("os.rename", "os.link")
"""Events by which a file gets a name."""
_EVENTS = {*_CALLS.values(), "os.rmdir", "os.symlink", "os.truncate"}


@dataclass(frozen=True, slots=True)
class Step:
    """One call that changes files, or syncs some."""

    kind: Literal["create", "name", "delete", "mkdir", "sync file", "sync folder"]
    path: str
    file: int = -1
    old: str = ""
    """Path before, of a file that gets another one."""


@dataclass
class File:
    """A file, as it was when it got its name."""

    content: bytes = b""
    modified: int = 0
    """Time of its last change, Unix, ns."""


@dataclass
class Recording:
    """What has happened below some folders."""

    folders: list[Path]
    before: dict[str, Value] = field(default_factory=dict)
    """What was there."""
    steps: list[Step] = field(default_factory=list)
    files: list[File] = field(default_factory=list)

    def is_inside(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and any(Path(path).is_relative_to(f) for f in self.folders)


class Disk:
    """What may be there after a power loss: possible values of names, files that are synced."""

    def __init__(self, recording: Recording) -> None:
        """What is there before the first step: all of it stays."""
        self._recording = recording
        self.entries: dict[str, list[tuple[Value, int]]] = {p: [(v, -1)] for p, v in recording.before.items()}
        """Values that a name may have, each with the number of the step that has made it so."""
        self._unsynced: dict[str, set[str]] = {}
        self.synced = {v for v in recording.before.values() if isinstance(v, int)}
        self._steps = 0

    def apply(self, step: Step) -> None:
        """Go on by a step."""
        if step.kind == "sync file":
            self.synced.add(step.file)
        elif step.kind == "sync folder":
            for path in self._unsynced.pop(step.path, ()):
                del self.entries[path][:-1]
        elif step.kind == "mkdir":
            self._set(step.path, "folder")
        elif step.kind == "delete":
            self._set(step.path, "deleted")
        else:
            self._set(step.path, step.file)
            if step.old:
                self._set(step.old, "deleted")
        self._steps += 1

    def _set(self, path: str, value: Value) -> None:
        self.entries.setdefault(path, [("none", -1)]).append((value, self._steps))
        self._unsynced.setdefault(os.path.dirname(path), set()).add(path)  # noqa: PTH120 (a million of them)

    def values(self, path: str) -> list[tuple[Value, int]]:
        """What a name may stand for, each with the number of the step that has made it so."""
        found = list(self.entries.get(path, [("none", -1)]))
        above = os.path.dirname(path)  # noqa: PTH120
        while above in self.entries:
            if any(value != "folder" for value, _ in self.entries[above]):
                found.append(("none", -1))
            above = os.path.dirname(above)  # noqa: PTH120
        return found

    def draw(self, random: Random) -> None:
        """Make something that a power loss may leave, in the place of what is there."""
        for folder in filter(Path.exists, self._recording.folders):
            shutil.rmtree(folder)
        for path, values in sorted(self.entries.items()):
            value, _ = random.choice(values)
            if value not in ("none", "deleted") and Path(path).parent.is_dir():
                self._make(Path(path), value, random)

    def _make(self, path: Path, value: Value, random: Random) -> None:
        if not isinstance(value, int):
            path.mkdir()
            return
        file = self._recording.files[value]
        whole = value in self.synced
        length = len(file.content) if whole else random.choice([0, random.randrange(len(file.content) + 1)])
        path.write_bytes(file.content[:length])
        os.utime(path, ns=(file.modified, file.modified))


class _Recorder:
    """Records what this process does to files."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._lock = threading.RLock()  # a call and its record: in the order in which calls have happened
        self._names: dict[str, int] = {}
        self.audited: Counter[tuple[str, str]] = Counter()
        self.called: Counter[tuple[str, str]] = Counter()
        for folder in recording.folders:
            for path in (found for found in [folder, *sorted(folder.rglob("*"))] if found.exists()):
                recording.before[str(path)] = self._file(path) if path.is_file() else "folder"

    def _file(self, path: Path) -> int:
        number = self._names[str(path)] = len(self.recording.files)
        content, modified = (path.read_bytes(), path.stat().st_mtime_ns) if path.exists() else (b"", 0)
        self.recording.files.append(File(content, modified))
        return number

    def event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take Python's word for what is about to happen."""
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and self.recording.is_inside(path):
                with self._lock:
                    assert not Path(path).exists(), f"{path} is written in place"
                    self.recording.steps.append(Step("create", str(path), self._file(Path(path))))
        elif event in _EVENTS and self.recording.is_inside(arguments[0]):
            with self._lock:
                self.audited[event, str(arguments[0])] += 1

    def call(self, name: str, function: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        """Do one of ``_CALLS``, and record it when it has succeeded."""
        if not self.recording.is_inside(path):
            return function(path, *arguments, **options)
        with self._lock:
            self.called[_CALLS[name], str(path)] += 1
            content = Path(path).read_bytes() if _CALLS[name] in _NAMES else b""
            result = function(path, *arguments, **options)
            if _CALLS[name] in _NAMES:
                number, new = self._names[str(path)], str(arguments[0])
                self._names[new], old = number, ""
                if _CALLS[name] == "os.rename":
                    del self._names[str(path)]
                    old = str(path)
                self.recording.files[number] = File(content, Path(new).stat().st_mtime_ns)
                self.recording.steps.append(Step("name", new, number, old=old))
            else:
                kind: Literal["mkdir", "delete"] = "mkdir" if name == "mkdir" else "delete"
                self.recording.steps.append(Step(kind, str(path)))
        return result

    def fsync(self, function: Callable[[int], None], handle: int) -> None:
        """Sync a file or folder, and record it."""
        with self._lock:
            function(handle)
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                self.recording.steps.append(Step("sync folder", str(path)))
            elif str(path) in self._names:
                self.recording.steps.append(Step("sync file", str(path), self._names[str(path)]))


_recorder: _Recorder | None = None
_hooked = threading.Event()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _recorder is not None:
        _recorder.event(event, arguments)


@contextmanager
def recorded(*folders: Path) -> Iterator[Recording]:
    """Record what this process does to files below some folders."""
    global _recorder
    if not _hooked.is_set():  # a hook stays as long as the process does
        sys.addaudithook(_hook)
        _hooked.set()
    recorder = _Recorder(Recording([folder.resolve() for folder in folders]))
    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, _wrapped(recorder, name, getattr(os, name)))
        fsync = os.fsync
        patch.setattr(os, "fsync", lambda handle: recorder.fsync(fsync, handle))
        _recorder = recorder
        try:
            yield recorder.recording
        finally:
            _recorder = None
    assert recorder.called == recorder.audited, "a call went past the recording"


def _wrapped(recorder: _Recorder, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: recorder.call(name, function, *arguments, **options)
