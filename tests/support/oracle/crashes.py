"""What may go wrong while a history happens: operations that fail, and processes that are gone.

It is an oracle for crashes: it counts the operations on storage and the forward passes itself, at
the calls of the operating system and of CloudFiles, so that a crash can be put between any two. Of
``chunkflow_core`` it takes the interface of engines, and no more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from cloudfiles.interfaces import FileInterface
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine
from tests.support.oracle.geometry import Case
from tests.support.oracle.numbers import mix


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
    _lock: Any = field(default_factory=Lock, repr=False)

    def count(self, where: str) -> None:
        """Count an operation that is about to be done, and let it fail."""
        with self._lock:
            if self.fatal and self.happened:
                raise Killed
            self.counts[where] += 1
            if where != self.where or self.counts[where] != self.after + 1:
                return
            self.happened = True
        if self.fatal:
            raise Killed
        raise OSError(28, "No space left on device") if where == "storage" else BrokenModel


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

    def __init__(self, case: Case, model: int, fault: Fault) -> None:
        self.case, self.model, self.fault, self.passes = case, model, fault, 0

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        self.fault.count("forward")
        self.passes += len(patches)
        return np.stack([mix(patch, self.case, self.model) for patch in patches])


@contextmanager
def failing(fault: Fault) -> Iterator[None]:
    """Let operations that change files fail: those of the library, and those of CloudFiles."""
    replace, unlink, remove, put_file = os.replace, os.unlink, os.remove, FileInterface.put_file

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if Path(path).exists():  # what isn't there can't change
                fault.count("storage")
            return function(path, *arguments, **options)

        return call

    def put(*arguments: Any, **options: Any) -> Any:
        fault.count("storage")
        return put_file(*arguments, **options)

    os.replace, os.unlink, os.remove, FileInterface.put_file = counted(replace), counted(unlink), counted(remove), put
    try:
        yield
    finally:
        os.replace, os.unlink, os.remove, FileInterface.put_file = replace, unlink, remove, put_file


class InlineExecutor:
    """Takes the place of a ``ThreadPoolExecutor``, and runs what it is given at once.

    So that the same history always does the same.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        return map(function, *arguments)
