"""Runs a plan on this machine, in this process or in several, without Airflow."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from chunkflow_core.cpus import CPUS_VARIABLE, available_cpus
from chunkflow_core.errors import ChunkflowError, StorageError
from chunkflow_core.exchange import Receipt, Stage
from chunkflow_core.geometry import Vector
from chunkflow_core.lattice import BlockGrid
from chunkflow_core.planner import Plan
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.stages import Workspace, inference_and_donate, receive_and_blend

Task = tuple[Stage, Vector]


class Schedule:
    """Which task can start: blends as soon as their donors are done, before further inference."""

    def __init__(self, grid: BlockGrid, due: Plan) -> None:
        """Start with nothing done."""
        infer = set(due.infer)
        self._infer = list(reversed(due.infer))
        self._waiting = {r: {d for d in grid.donors(r) if d in infer} for r in due.blend}
        self._ready = [r for r, donors in self._waiting.items() if not donors]
        for receiver in self._ready:
            del self._waiting[receiver]

    def next(self) -> Task | None:
        """A task that can start now; None if there is none at the moment."""
        if self._ready:
            return ("blend", self._ready.pop())
        if self._infer:
            return ("infer", self._infer.pop())
        return None

    def done(self, task: Task) -> None:
        """Say that a task has ended well."""
        stage, index = task
        if stage == "blend":
            return
        for receiver in [r for r, donors in self._waiting.items() if index in donors]:
            self._waiting[receiver].discard(index)
            if not self._waiting[receiver]:
                del self._waiting[receiver]
                self._ready.append(receiver)


def run_here(
    workspace: Workspace, due: Plan, run: str, patch_done: Callable[[], object]
) -> Iterator[tuple[Task, Receipt | None]]:
    """Do all that is due in this process; yield each task when it is done. ``patch_done`` is called after each patch."""
    schedule = Schedule(workspace.spec.grid, due)
    while task := schedule.next():
        receipt = _execute(workspace, task, run, patch_done)
        schedule.done(task)
        yield task, receipt


def run_in_processes(spec: VolumeSpec, due: Plan, run: str, workers: int) -> Iterator[tuple[Task, Receipt | None]]:
    """Do all that is due in ``workers`` processes; yield each task when it is done.

    Raises:
        ChunkflowError: the first that a task ended with, after those still running have ended.
        StorageError: a worker process was killed.
    """
    schedule = Schedule(spec.grid, due)
    context = multiprocessing.get_context("spawn")
    share = max(1, available_cpus() // workers)
    with ProcessPoolExecutor(workers, context, _open_workspace, (spec, share)) as pool, _interruptible():
        running: dict[Future[Receipt | None], Task] = {}
        while True:
            while len(running) < workers and (task := schedule.next()):
                with _interrupts_held_back():  # until a starting worker can take them
                    running[pool.submit(_execute_in_worker, task, run)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                receipt = _result(future, task)
                schedule.done(task)
                yield task, receipt


def _result(future: Future[Receipt | None], task: Task) -> Receipt | None:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise StorageError(
            f"a worker process was killed, probably for want of memory (last: {task[0]} of block {task[1]}). "
            "Run again with fewer --workers; what is done is kept"
        ) from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """End the workers at once, in the middle of a block, when the user interrupts."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        for worker in multiprocessing.active_children():
            worker.kill()
        raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _execute(workspace: Workspace, task: Task, run: str, patch_done: Callable[[], object]) -> Receipt | None:
    stage, index = task
    try:
        if stage == "infer":
            return inference_and_donate(workspace, index, run=run, force=True, patch_done=patch_done).receipt
        return receive_and_blend(workspace, index, run=run, force=True).receipt
    except ChunkflowError as error:
        error.args = (f"{stage} of block {index}: {error}",)
        raise


_workspace: Workspace | None = None


def _open_workspace(spec: VolumeSpec, cpus: int) -> None:
    global _workspace  # the one object that a worker process keeps between its tasks
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a word: the command says it all
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ[CPUS_VARIABLE] = str(cpus)
    _workspace = Workspace(spec)


def _end_with_parent() -> None:
    """End this worker when the command is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(143)


def _execute_in_worker(task: Task, run: str) -> Receipt | None:
    assert _workspace is not None
    return _execute(_workspace, task, run, lambda: None)
