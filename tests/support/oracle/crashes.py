"""What may go wrong while a history happens: operations that fail, and processes that are gone.

It is an oracle for crashes: it counts the operations on storage and the forward passes itself, at
the calls of the operating system and of CloudFiles, so that a crash can be put between any two. Of
``chunkflow_core`` it takes the interface of engines, and no more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
from cloudfiles.interfaces import FileInterface
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from tests.support.oracle.geometry import Case
from tests.support.oracle.numbers import bits, mix


class Killed(Exception):
    """The process is gone: all that it still tries to do fails like this."""


class BrokenModel(Exception):
    """A forward pass that fails."""


@dataclass
class Fault:
    """What goes wrong, once a number of operations have gone well."""

    where: str
    """``storage`` or ``forward``."""
    after: int
    fatal: bool
    """Whether nothing is done any more from then on, as if the process had been killed."""
    happened: bool = field(default=False, repr=False)
    counts: dict[str, int] = field(default_factory=lambda: {"storage": 0, "forward": 0}, repr=False)
    action: Callable[[], None] | None = field(default=None, repr=False)
    """What happens just before that operation, which then goes well."""
    written: dict[Path, bytes] = field(default_factory=dict, repr=False)
    """What the process itself has written last to each file that it has put in place."""
    _acting: bool = field(default=False, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    def count(self, where: str) -> None:
        """Count an operation that is about to be done, and let it fail, or the action happen."""
        if self._acting:  # what others do meanwhile
            return
        with self._lock:
            if self.fatal and self.happened:
                raise Killed
            self.counts[where] += 1
            if where != self.where or self.counts[where] != self.after + 1:
                return
            self.happened = True
        if self.action is not None:
            self._acting = True
            self.action()
            self._acting = False
        elif self.fatal:
            raise Killed
        else:
            raise OSError(28, "No space left on device") if where == "storage" else BrokenModel

    def note(self, file: Path, content: bytes) -> None:
        """Note a file that was put in place."""
        if not self._acting:
            self.written[file] = content


def no_fault() -> Fault:
    """All goes well."""
    return Fault("nowhere", 0, fatal=False)


def faults(most: int) -> st.SearchStrategy[Fault]:
    """What may go wrong, after so many operations on storage at most."""
    storage = st.builds(Fault, st.just("storage"), st.integers(0, most), st.booleans())
    forward = st.builds(Fault, st.just("forward"), st.integers(0, most // 4), st.booleans())
    return storage | forward


class Model(Engine):
    """Runs ``mix``, and counts the patches."""

    def __init__(self, case: Case, model: int, machine: int, fault: Fault) -> None:
        self.case, self.model, self.machine, self.fault, self.passes = case, model, machine, fault, 0
        self.epoch = ""
        """The epoch in which the run that uses it has begun; empty where it was not prepared."""

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        self.fault.count("forward")
        self.passes += len(patches)
        return np.stack([mix(patch, self.case, bits(self.model, self.machine)) for patch in patches])


@contextmanager
def failing(fault: Fault) -> Iterator[None]:
    """Let operations that change files fail: those of the library, and those of CloudFiles."""
    replace, link, unlink, remove, put_file = os.replace, os.link, os.unlink, os.remove, FileInterface.put_file

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if os.path.exists(path):  # noqa: PTH110 (a million of them); what isn't there can't change
                fault.count("storage")
            return function(path, *arguments, **options)

        return call

    def replaced(*arguments: Any, **options: Any) -> Any:
        path, target = arguments
        fault.count("storage")
        content = Path(path).read_bytes()
        replace(path, target, **options)
        fault.note(Path(target), content)

    def put(*arguments: Any, **options: Any) -> Any:
        fault.count("storage")
        return put_file(*arguments, **options)

    os.replace, os.link, os.unlink, os.remove = replaced, counted(link), counted(unlink), counted(remove)
    FileInterface.put_file = put
    try:
        yield
    finally:
        os.replace, os.link, os.unlink, os.remove, FileInterface.put_file = replace, link, unlink, remove, put_file


class Lazy(Future[Any]):
    """What is done when it is asked for."""

    def __init__(self, do: Callable[[], Any]) -> None:
        super().__init__()
        self._do = do

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            try:
                self.set_result(self._do())
            except BaseException as error:
                self.set_exception(error)
        return super().result(timeout)


class InlineExecutor:
    """Takes the place of a ``ThreadPoolExecutor``, and runs what it is given at once.

    So that the same history always does the same, and takes half of the time.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future = Lazy(partial(function, *arguments))
        with suppress(BaseException):  # which is raised to whoever asks for the result
            future.result()
        return future

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        return iter(list(map(function, *arguments)))

    def shutdown(self, **_: Any) -> None:
        pass


class LazyExecutor(InlineExecutor):
    """Runs what it is given when its result is asked for: a later one may wait for an earlier."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return Lazy(partial(function, *arguments))


def in_one_thread(patch: pytest.MonkeyPatch) -> None:
    """Let all that the library would do in other threads be done in this one."""
    found = [(name, module) for name, module in sys.modules.items() if name.startswith("chunkflow_core.")]
    for name, module in found:
        if hasattr(module, "ThreadPoolExecutor"):
            executor = LazyExecutor if name == "chunkflow_core.inference.on_cpu" else InlineExecutor
            patch.setattr(module, "ThreadPoolExecutor", executor)
