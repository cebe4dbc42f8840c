"""What makes the project's code do the same again: no threads, and no clock but the scheduler's."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import pytest

from chunkflow_core.audit import stored
from chunkflow_core.exchange import folder
from chunkflow_core.inference import block, on_cpu, reading, reference
from chunkflow_core.steps import infer
from chunkflow_core.steps import stage as stage_module
from chunkflow_core.storage.listing import grid
from tests.support.oracle.crashes import InlineExecutor
from tests.support.simulation.scheduler import Scheduler

T = TypeVar("T")


class AtOnce(InlineExecutor):
    """Takes the place of a ``ThreadPoolExecutor`` whose threads make requests."""

    def shutdown(self, *_: object, **__: object) -> None:
        """Do nothing: nothing is left to be done."""


class _Later(Generic[T]):
    """A result that is computed when it is asked for."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute

    def result(self) -> T:
        return self._compute()


class WhenAsked(AtOnce):
    """Takes the place of a ``ThreadPoolExecutor`` for patches, which may wait for room."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Note what is to be done."""
        return _Later(lambda: function(*arguments))

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        """Do it for each."""
        return map(function, *arguments)


@contextmanager
def in_turn(scheduler: Scheduler) -> Iterator[None]:
    """Let the project's code start no threads, and take time and chance from the scheduler."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (stored, folder, block, reading, reference, infer, grid):
            patch.setattr(module, "ThreadPoolExecutor", AtOnce)
        patch.setattr(on_cpu, "ThreadPoolExecutor", WhenAsked)
        patch.setattr(stage_module, "time", lambda: scheduler.now)
        patch.setattr(secrets, "token_hex", lambda length: scheduler.random.randbytes(length).hex())
        yield
