"""Runs a plan on this machine, in this process or in several, without Airflow.

A task that fails holds up only those that need what it would have donated. All others are done
before the run ends with an error that tells of all failures.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Self, TextIO, cast

from tqdm import tqdm

from chunkflow_core.errors import EXIT_CODES, ChunkflowError, StorageError
from chunkflow_core.exchange.leases import Lease
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.machine import CPUS_VARIABLE, available_cpus, share_one_heap
from chunkflow_core.planning.planner import Plan
from chunkflow_core.planning.reasons import Reason
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.failures import BlocksFailedError, Failure, lines, most_telling
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.variables import ConcealingStream, remember

log = logging.getLogger(__name__)

Task = tuple[Stage, Vector]


class DueTasks:
    """Which task can start: blends as soon as their donors are done, before further inference."""

    def __init__(self, grid: BlockGrid, due: Plan) -> None:
        """Start with nothing done."""
        infer = set(due.infer)
        self._grid = grid
        self._infer = list(reversed(due.infer))
        donors = {r: sum(d in infer for d in grid.donors(r)) for r in due.blend}
        self._missing = {r: count for r, count in donors.items() if count}
        self._ready = [r for r, count in donors.items() if not count]
        self.dropped: set[Task] = set()
        """Tasks that can't be done because something else has failed."""

    def next(self) -> Task | None:
        """A task that can start now; None if there is none at the moment."""
        if self._ready:
            return ("blend", self._ready.pop())
        if self._infer:
            return ("infer", self._infer.pop())
        return None

    def done(self, task: Task) -> None:
        """Say, once, that a task has ended well."""
        for receiver in self._waiting_for(task):
            self._missing[receiver] -= 1
            if not self._missing[receiver]:
                del self._missing[receiver]
                self._ready.append(receiver)

    def failed(self, task: Task) -> None:
        """Say that a task has failed: what depends on it will not start."""
        for receiver in self._waiting_for(task):
            del self._missing[receiver]
            self.dropped.add(("blend", receiver))

    def _waiting_for(self, task: Task) -> list[Vector]:
        stage, index = task
        return [r for r in self._grid.receivers(index) if r in self._missing] if stage == "infer" else []


@dataclass(frozen=True, slots=True)
class _Failed:
    """How a task that failed has ended."""

    code: int
    """Exit code that a process with only this task would have ended with."""
    reason: str
    trace: str = ""
    """Traceback of an unforeseen error."""


_Result = Receipt | None | _Failed

_KILLED = _Failed(
    StorageError.exit_code,
    "killed: its worker process died twice, the second time with no other beside it, probably for want of memory: "
    "`plan` tells how much a task takes. If there is enough, the model has crashed the process",
)


class _Failures:
    """Tasks that have failed so far."""

    def __init__(self, tasks: DueTasks) -> None:
        self._due, self._failures, self._codes = tasks, list[Failure](), list[tuple[Stage, int]]()

    def add(self, task: Task, how: _Failed) -> None:
        """Note and tell that a task has failed."""
        self._due.failed(task)
        stage, index = task
        self._failures.append(Failure(stage, index, how.reason))
        self._codes.append((stage, how.code))
        trace = f"\n{how.trace.rstrip()}" if how.trace else ""
        log.error("%s of block %s failed, others go on: %s%s", stage, index, how.reason, trace)

    def tell(self, grid: BlockGrid) -> None:
        """Raise ``BlocksFailedError`` if anything has failed."""
        if self._failures:
            told = "\n  ".join(lines(grid, self._failures, self._due.dropped))
            end = "All else is done and kept: once the cause is gone, run again to do only what is missing"
            raise BlocksFailedError(f"{told}\n{end}", most_telling(self._codes))


def run_here(
    workspace: Workspace, due: Plan, run: str, patch_done: Callable[[], object]
) -> Iterator[tuple[Task, Receipt | None]]:
    """Do all that is due in this process; yield each task when it is done.

    Args:
        workspace: What the steps of the volume share.
        due: The plan.
        run: Name of the run.
        patch_done: Called after each patch.

    Raises:
        BlocksFailedError: Some tasks failed; all that do not depend on them are done.
    """
    grid = workspace.spec.grid
    tasks = DueTasks(grid, due)
    failures = _Failures(tasks)
    while task := tasks.next():
        result = _execute(workspace, task, due.why.get(task[1]), run, patch_done)
        if isinstance(result, _Failed):
            failures.add(task, result)
        else:
            tasks.done(task)
            yield task, result
    failures.tell(grid)


def run_in_processes(
    spec: VolumeSpec, due: Plan, run: str, workers: int, *, leased: bool = False
) -> Iterator[tuple[Task, Receipt | None]]:
    """Do all that is due in ``workers`` processes; yield each task when it is done.

    A task whose process is killed is tried once more when all others are done, with no process
    beside it: memory may have been short because of the others.

    Args:
        spec: The volume.
        due: The plan.
        run: Name of the run.
        workers: Number of processes.
        leased: Whether the run has the lease of the output, at which each process is to look too.

    Raises:
        BlocksFailedError: Some tasks failed; all that do not depend on them are done.
    """
    tasks = DueTasks(spec.grid, due)
    failures = _Failures(tasks)
    killed: list[Task] = []
    with _Workers(spec, due, run, max(1, available_cpus() // workers), leased=leased) as processes:
        while True:
            while processes.running < workers and (task := tasks.next()):
                processes.start(task)
            alone = not processes.running
            if alone and not killed:
                break
            if alone:
                processes.end_idle(keep=1)
                processes.start(killed.pop(0))
            for task, result in processes.wait():
                if result is _KILLED and not alone:
                    log.warning("the process of %s of block %s was killed, it is tried again alone later", *task)
                    killed.append(task)
                elif isinstance(result, _Failed):
                    failures.add(task, result)
                else:
                    tasks.done(task)
                    yield task, result
    failures.tell(spec.grid)


class _Workers:
    """Processes that run a task at a time.

    Each is a pool by itself: if it is killed, it is known which task it had, and the others go on.
    """

    def __init__(self, spec: VolumeSpec, due: Plan, run: str, cpus: int, *, leased: bool) -> None:
        self._spec, self._cpus, self._due, self._run = spec, cpus, due, run
        self._leased = leased
        _start_warm_parent(spec)
        self._idle: list[ProcessPoolExecutor] = []
        self._running: dict[Future[_Result], tuple[Task, ProcessPoolExecutor]] = {}

    @property
    def running(self) -> int:
        """Number of tasks that run."""
        return len(self._running)

    def start(self, task: Task) -> None:
        """Run a task in a process that has nothing to do, or in a new one."""
        while True:
            pool = self._idle.pop() if self._idle else self._new()
            try:
                with _interrupts_held_back():  # until a starting process can take them
                    future = pool.submit(_execute_in_worker, task, self._due.why.get(task[1]), self._run)
            except BrokenProcessPool:  # it was killed while it had nothing to do
                pool.shutdown()
                continue
            self._running[future] = task, pool
            return

    def wait(self) -> Iterator[tuple[Task, _Result]]:
        """Wait until a task has ended, and yield those that have, with how they ended.

        That is ``_KILLED`` if the process was killed.
        """
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            task, pool = self._running.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown()
                result = _KILLED
            else:
                self._idle.append(pool)
            yield task, result

    def end_idle(self, keep: int = 0) -> None:
        """End the processes that have nothing to do, but for ``keep``, to free their memory."""
        while len(self._idle) > keep:
            self._idle.pop().shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes.

        When the user interrupts they end at once, in the middle of a block, else after their task.
        """
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            for process in multiprocessing.active_children():
                process.kill()
        self.end_idle()
        for _, pool in self._running.values():
            pool.shutdown()

    def _new(self) -> ProcessPoolExecutor:
        initial = (self._spec, self._cpus, dict(os.environ), self._run if self._leased else "")
        return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), _open_workspace, initial)


def _start_warm_parent(spec: VolumeSpec) -> None:
    """Start the process that workers are forked from: it has only imported what they need.

    So a worker starts in milliseconds. No module that is imported here may leave a thread running,
    open a connection or touch a GPU, which no forked process could use; the threads that OpenBLAS
    has for numpy end before each fork.
    """
    modules = [
        "chunkflow_core.__main__",
        "chunkflow_core.steps.infer",
        "chunkflow_core.steps.blend",
        f"chunkflow_core.engines.{spec.model.engine}",
    ]
    multiprocessing.set_forkserver_preload(modules)
    resource_tracker.ensure_running()  # which lets interrupts in when it starts
    with _interrupts_held_back():
        forkserver.ensure_running()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _execute(
    workspace: Workspace, task: Task, why: Reason | None, run: str, patch_done: Callable[[], object]
) -> _Result:
    """Do a task that is due for a reason of the planner's."""
    stage, index = task
    try:
        if stage == "blend":
            return receive_and_blend(workspace, index, run=run, why=why).receipt
        return inference_and_donate(workspace, index, run=run, why=why, patch_done=patch_done).receipt
    except ChunkflowError as error:
        return _Failed(error.exit_code, f"{EXIT_CODES[error.exit_code]}: {error}")
    except Exception as error:
        return _Failed(1, f"{EXIT_CODES[1]}: {type(error).__name__}: {error}", traceback.format_exc())


_workspace: Workspace | None = None


def _open_workspace(spec: VolumeSpec, cpus: int, environment: dict[str, str], leased: str) -> None:
    global _workspace  # the one object that a worker process keeps between its tasks
    share_one_heap()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a word: the command says it all
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    tqdm.set_lock(
        threading.RLock()
    )  # its own is one for all processes, and is left over, with a warning, by one that is killed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()  # it is that of the warm parent, which may be older
    os.environ.update(environment | {CPUS_VARIABLE: str(cpus)})
    remember(spec.texts.values())
    sys.stderr = cast("TextIO", ConcealingStream(sys.stderr))
    _workspace = Workspace(spec)
    _workspace.lease = Lease(spec, leased) if leased else None


def _end_with_parent() -> None:
    """End this worker when the command is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(143)


def _execute_in_worker(task: Task, why: Reason | None, run: str) -> _Result:
    assert _workspace is not None
    return _execute(_workspace, task, why, run, lambda: None)
