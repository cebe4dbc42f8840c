"""Tasks that have left receipts: one at a time, and what of many has to be known of each."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.exchange.marks import STAGES, Stage
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.boxes import vector
from chunkflow_core.spec import VolumeSpec

Rows = NDArray[np.intp]
"""Numbers of tasks in a table."""

_IN_TURN: dict[Stage, tuple[str, ...]] = {
    "infer": ("forward", "stitch", "load"),
    "blend": ("read", "stitch", "convert", "write"),
}
"""Phases that make up a task's wall time, together with the rest. All others go on beside them."""

_IN_STREAMS = ("forward", "stitch")
"""Phases whose seconds are the sum over the streams of a task."""


@dataclass(frozen=True)
class DoneTask:
    """One stage of one block, as its receipt tells.

    What an older receipt lacks is None or empty.
    """

    stage: Stage
    block: str
    """Name of the block, ``z_y_x``."""
    run: str
    voxels: int
    """Number of output voxels written."""
    patches: int
    """Number of patches that were run, not skipped."""
    skipped: dict[str, int]
    storage_chunks: int
    donated_bytes: int
    seconds: dict[str, float]
    """Seconds by phase; those of concurrent threads add up."""
    wall: float
    """Wall time of the task in seconds."""
    finished: float | None
    """Time when the task ended, Unix time."""
    rate: float | None
    """Voxels of the block (infer) or of its frame (blend) per second of wall time."""
    streams: int
    """Number of patches run at a time."""
    bytes: dict[str, int]
    """Bytes read and written (as arrays), and donated (as stored).

    What blends read are donations, as stored.
    """
    peak_memory: int | None
    """Peak memory of the process until the task ended, in bytes."""
    host: str
    device: str

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the wall time by phase; they add up to it.

        What is in no phase is ``idle`` for infer, when the streams had nothing to run, and
        ``other`` for blend.
        """
        known = {phase: self.seconds.get(phase, 0.0) for phase in _IN_TURN[self.stage]}
        parts = {phase: s / self.streams if phase in _IN_STREAMS else s for phase, s in known.items()}
        rest = "idle" if self.stage == "infer" else "other"
        return parts | {rest: max(0.0, self.wall - sum(parts.values()))}

    @property
    def beside(self) -> dict[str, float]:
        """Seconds of the phases that go on beside ``parts``."""
        return {phase: s for phase, s in self.seconds.items() if s and phase not in (*_IN_TURN[self.stage], "idle")}


def task_of(spec: VolumeSpec, receipt: Receipt) -> DoneTask:
    """The task that has left a receipt."""
    block, facts, infer = spec.grid.block(receipt.block), receipt.facts, receipt.stage == "infer"
    device, processor, wall = facts.get("device", "cpu"), facts.get("processor"), facts.get("wall", 0.0)
    frame = sum(box.voxels for box in block.frame)
    return DoneTask(
        stage=receipt.stage,
        block=block.name,
        run=receipt.run,
        voxels=block.core.voxels if infer else frame,
        patches=receipt.patches,
        skipped=receipt.skipped,
        storage_chunks=receipt.storage_chunks,
        donated_bytes=sum(entry.bytes for entry in receipt.donations),
        seconds=facts.get("seconds", {}),
        wall=wall,
        finished=facts.get("finished"),
        rate=(block.box.voxels if infer else frame) / wall if wall else None,
        streams=facts.get("streams", 1),
        bytes=facts.get("bytes", {}),
        peak_memory=facts.get("peak_memory_bytes"),
        host=facts.get("host", "unknown host"),
        device=f"{device} ({processor})" if device == "cpu" and processor else device,
    )


class TaskTable:
    """What of tasks can't be added up, a row a task.

    A volume may have millions of blocks: a row takes 45 bytes, and 8 more for an inference.
    """

    def __init__(self) -> None:
        """Hold no task yet."""
        self._hosts: dict[str, int] = {}
        self._stage, self._index = array("B"), array("i")
        self._wall, self._finished, self._forward = array("d"), array("d"), array("f")
        self._peak, self._host, self._rate = array("q"), array("I"), array("d")

    def add(self, task: DoneTask) -> None:
        """Hold a task, too."""
        self._stage.append(STAGES.index(task.stage))
        self._index.extend(vector(map(int, task.block.split("_"))))
        self._wall.append(task.wall)
        self._finished.append(np.nan if task.finished is None else task.finished)
        self._forward.append(min(1.0, task.parts.get("forward", 0.0) / task.wall) if task.wall else 0.0)
        self._peak.append(-1 if task.peak_memory is None else task.peak_memory)
        self._host.append(self._hosts.setdefault(task.host, len(self._hosts)))
        if task.stage == "infer" and task.rate is not None:
            self._rate.append(task.rate)

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._stage)

    @property
    def wall(self) -> NDArray[np.float64]:
        """Wall time of each task in seconds; 0 if that is not known."""
        return np.asarray(self._wall)

    @property
    def finished(self) -> NDArray[np.float64]:
        """Time when each task ended, Unix time; NaN if that is not known."""
        return np.asarray(self._finished)

    @property
    def start(self) -> NDArray[np.float64]:
        """Time when each task began, Unix time; NaN if that is not known."""
        return np.where(self.wall != 0, self.finished - self.wall, np.nan)

    @property
    def forward(self) -> NDArray[np.float32]:
        """Share of each task's time in forward passes, 0 to 1."""
        return np.asarray(self._forward)

    @property
    def peak_memory(self) -> NDArray[np.int64]:
        """Peak memory of each task's process in bytes; -1 if that is not known."""
        return np.asarray(self._peak)

    @property
    def host(self) -> NDArray[np.uint32]:
        """Number of each task's host."""
        return np.asarray(self._host)

    @property
    def inference_rates(self) -> NDArray[np.float64]:
        """Voxels per second of each inference of which that is known."""
        return np.asarray(self._rate)

    def is_of(self, stage: Stage) -> NDArray[np.bool_]:
        """Whether each task is one of a stage."""
        chosen: NDArray[np.bool_] = np.asarray(self._stage) == STAGES.index(stage)
        return chosen

    def stage_of(self, row: int) -> Stage:
        """Stage of the task in a row."""
        return STAGES[self._stage[row]]

    def block_of(self, row: int) -> str:
        """Name of the block of the task in a row, ``z_y_x``."""
        return "_".join(map(str, self._index[3 * row : 3 * row + 3]))

    def most(self, values: NDArray[Any], rows: Rows, number: int) -> list[int]:
        """The rows with the greatest values, by stage and block where these are the same.

        Args:
            values: A value for each task.
            rows: Rows to choose from.
            number: Number of rows.
        """
        if len(rows) > number:
            least = np.partition(values[rows], -number)[-number]
            rows = rows[values[rows] >= least]
        z, y, x = np.asarray(self._index).reshape(-1, 3)[rows].T
        order = np.lexsort((x, y, z, np.asarray(self._stage)[rows], -values[rows]))
        return [int(row) for row in rows[order[:number]]]

    @property
    def host_names(self) -> list[str]:
        """Names of hosts, by number."""
        return list(self._hosts)


def busy_stretches(tasks: TaskTable) -> NDArray[np.float64]:
    """The disjoint stretches of time in which any task ran, in order.

    Returns:
        A row for each: start and finish, in Unix time.
    """
    start, finished = tasks.start, tasks.finished
    order = np.lexsort((finished, start))[: np.count_nonzero(~np.isnan(start))]
    start, last = start[order], np.maximum.accumulate(finished[order])
    begins = np.flatnonzero(np.concatenate([np.ones(min(1, len(start)), bool), start[1:] > last[:-1]]))
    ends = np.append(begins[1:], len(start)) - 1 if len(begins) else begins
    return np.column_stack([start[begins], last[ends]])
