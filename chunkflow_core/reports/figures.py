"""What has been done, in figures, from the receipts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import STAGES, Stage
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.reports.tasks import DoneTask, TaskTable, busy_stretches, task_of
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of a figure that many tasks have."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class TaskFigure:
    """A figure of one task."""

    stage: Stage
    block: str
    host: str
    value: float


@dataclass(frozen=True)
class Report:
    """Figures of a run, or of all that is there. Those that no receipt tells are None or empty."""

    name: str
    output: str
    exchange: str
    fingerprint: str
    run: str | None
    runs: dict[str, int]
    """Number of receipts by run, of all runs, whichever run the report is about."""
    blocks: int
    """Number of blocks of the whole volume."""
    inferred: int
    """Number of blocks with a receipt of inference."""
    to_blend: int
    """Number of blocks of the whole volume that receive donations."""
    blended: int
    """Number of blocks with a receipt of blending."""
    patches: int
    """Number of patches that were run, not skipped."""
    skipped: dict[str, int]
    """Number of patches that were not run, by reason."""
    all_patches: int
    """Number of patches of the whole volume."""
    voxels: int
    """Number of output voxels written."""
    storage_chunks: int
    """Number of storage chunks written."""
    donated_bytes: int
    """Bytes of the donations, as stored."""
    bytes: dict[str, int]
    """Bytes read, written and donated, by stage; see ``DoneTask.bytes``."""
    patches_per_second: float | None
    """Patches per second of one process, over the whole time of its inference tasks."""
    span: float | None
    """Seconds from the first start to the last finish."""
    busy: float | None
    """Seconds of the span in which any task ran."""
    voxels_per_second: float | None
    """Output voxels written per second of the span."""
    task_voxels_per_second: Spread | None
    """Voxels of the block per second of the task's time, for inference tasks."""
    wall: dict[str, Spread]
    """Wall time of a task in seconds, by stage."""
    seconds: dict[str, float]
    """Seconds by phase, summed over blocks; concurrent phases overlap."""
    shares: dict[str, float]
    """Shares of all tasks' time, 0 to 1, by stage and phase; those of a stage add up to 1."""
    beside: dict[str, float]
    """Phases that go on beside those in ``shares``, as shares of the same time.

    They are in threads of their own, which add up.
    """
    forward: float | None
    """Share of the inference tasks' time in forward passes, 0 to 1."""
    peak_memory: TaskFigure | None
    """Peak memory in bytes, of the process that had most."""
    slowest: list[TaskFigure]
    """The three longest tasks, with their wall time in seconds."""
    hosts: dict[str, int]
    """Number of tasks, by host."""
    devices: dict[str, int]
    """Number of inference tasks, by device."""


class Tally:
    """What the tasks of a run add up to, and a table of what does not; tasks come one by one."""

    def __init__(self, run: str | None = None) -> None:
        """Count nothing yet.

        Args:
            run: Name of the run that is counted; None for all.
        """
        self.run, self.tasks, self.runs, self.devices = run, TaskTable(), Counter[str](), Counter[str]()
        self.inferred = self.blended = self.patches = self.voxels = self.storage_chunks = self.donated_bytes = 0
        self.skipped, self.bytes = Counter[str](), dict[str, int]()
        self.seconds, self.parts, self.beside = (defaultdict[str, float](float) for _ in range(3))
        """Seconds by stage and phase, as in ``DoneTask.seconds``, ``parts`` and ``beside``."""
        self.wall: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        """Wall time of all tasks in seconds, by stage."""

    def add(self, task: DoneTask) -> None:
        """Count a task, if it is of the run."""
        self.runs[task.run] += 1
        if self.run not in (None, task.run):
            return
        self.tasks.add(task)
        self.inferred += task.stage == "infer"
        self.blended += task.stage == "blend"
        self.patches += task.patches
        self.voxels += task.voxels
        self.storage_chunks += task.storage_chunks
        self.donated_bytes += task.donated_bytes
        self.wall[task.stage] += task.wall
        if task.stage == "infer" and task.patches:
            self.devices[task.device] += 1
        _add(self.skipped, task.skipped)
        _add(self.bytes, task.bytes, task.stage)
        _add(self.seconds, task.seconds, task.stage)
        _add(self.parts, task.parts, task.stage)
        _add(self.beside, task.beside, task.stage)

    def shares(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Seconds by stage and phase, as shares of all wall time of the stage."""
        of = {name: self.wall[stage] for name in seconds for stage in STAGES if name.startswith(f"{stage}: ")}
        return {name: round(s / of[name], 4) for name, s in seconds.items() if of[name]}


def tally_of(spec: VolumeSpec, receipts: Iterable[Receipt], *, run: str | None = None) -> Tally:
    """Count the tasks of a run, or of all, that have left these receipts."""
    tally = Tally(run)
    for receipt in receipts:
        tally.add(task_of(spec, receipt))
    return tally


def summarise(spec: VolumeSpec, exchange: Exchange, *, run: str | None = None) -> Report:
    """Summarise the receipts of a run, or all of them."""
    return report_of(spec, exchange.path, tally_of(spec, exchange.all_receipts(), run=run))


def report_of(spec: VolumeSpec, exchange: str, tally: Tally) -> Report:
    """Summarise the tasks of a run, or all of them.

    Args:
        spec: The volume.
        exchange: Path of the exchange.
        tally: The tasks.
    """
    grid, tasks = spec.grid, tally.tasks
    wall, peaks = tasks.wall, tasks.peak_memory
    timed, measured = np.flatnonzero(wall), np.flatnonzero(peaks >= 0)
    shares, seconds = tally.shares(tally.parts), tally.wall["infer"]
    stretches = busy_stretches(tasks)
    span = float(stretches[-1, 1] - stretches[0, 0]) if len(stretches) else None
    busy = sum((stretches[:, 1] - stretches[:, 0]).tolist()) if len(stretches) else None
    alone = math.prod(n for n, overlap in zip(grid.shape, grid.overlap, strict=True) if overlap == 0)
    spreads = {stage: _spread(wall[timed][tasks.is_of(stage)[timed]]) for stage in STAGES}
    return Report(
        name=spec.name,
        output=spec.written("output"),
        exchange=exchange.replace(plain(spec.exchange.path), plain(spec.written("exchange"))),
        fingerprint=spec.fingerprint,
        run=tally.run,
        runs=dict(tally.runs),
        blocks=math.prod(grid.shape),
        inferred=tally.inferred,
        to_blend=math.prod(grid.shape) - alone,
        blended=tally.blended,
        patches=tally.patches,
        skipped=dict(tally.skipped),
        all_patches=grid.patches,
        voxels=tally.voxels,
        storage_chunks=tally.storage_chunks,
        donated_bytes=tally.donated_bytes,
        bytes=tally.bytes,
        patches_per_second=round(tally.patches / seconds, 3) if seconds else None,
        span=None if span is None else round(span, 3),
        busy=None if busy is None else round(busy, 3),
        voxels_per_second=round(tally.voxels / span, 1) if span else None,
        task_voxels_per_second=_spread(tasks.inference_rates),
        wall={stage: spread for stage, spread in spreads.items() if spread is not None},
        seconds={name: round(number, 3) for name, number in sorted(tally.seconds.items())},
        shares=shares,
        beside=tally.shares(tally.beside),
        forward=shares.get("infer: forward"),
        peak_memory=next((_figure(tasks, peaks, row) for row in tasks.most(peaks, measured, 1)), None),
        slowest=[_figure(tasks, wall, row) for row in tasks.most(wall, timed, 3)],
        hosts=dict(zip(tasks.host_names, np.bincount(tasks.host).tolist(), strict=True)),
        devices=dict(tally.devices),
    )


def lines(report: Report) -> list[str]:
    """The report as text, a name and a figure a line.

    Where there is nothing to report, it says what to do.
    """
    if not report.inferred + report.blended:
        return [f"{report.name}: {remedy(report)}"]
    return [
        f"{report.name} (fingerprint {report.fingerprint}){f', run {report.run}' if report.run else ''}: "
        f"{report.output}",
        *(
            [f"\n► forward passes: {percent(report.forward)} of the inference tasks' time\n"]
            if report.forward is not None
            else []
        ),
        *(f"{name:<20}{value}" for name, value in _rows(report) if value),
    ]


def remedy(report: Report) -> str:
    """What to do where there are no receipts to report."""
    if report.runs:
        there = ", ".join(map(repr, sorted(report.runs)[-5:]))
        return f"no receipt of run {report.run!r} in {report.exchange}; give --run one of those it has: {there}"
    return (
        f"nothing is done yet: no receipts in {report.exchange}. Start with chunkflow-core run SPEC, "
        "or trigger the volume's DAG in Airflow"
    )


def metric(value: float, unit: str) -> str:
    """A number with a unit and its decimal prefix, such as 1.2 Mvoxel."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    prefix = prefixes[0]
    return f"{value:.1f} {prefix}{unit}" if value < 9.95 and prefix else f"{value:.0f} {prefix}{unit}"


def unit_of(seconds: float) -> tuple[int, str]:
    """The unit in which to show a length of time: its seconds, and its name."""
    units = [(100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")]
    return next(((size, name) for limit, size, name in units if seconds < limit), (86400, "d"))


def duration(seconds: float) -> str:
    """A length of time, such as 12.5 min."""
    size, unit = unit_of(seconds)
    return f"{seconds / size:.3g} {unit}"


def percent(share: float) -> str:
    """A share from 0 to 1, such as 93 %."""
    return "< 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def phases_of(shares: dict[str, float], stage: Stage) -> dict[str, float]:
    """Shares of a stage's phases, of ``Report.shares`` or ``Report.beside``, without zeros."""
    prefix = f"{stage}: "
    return {name.removeprefix(prefix): share for name, share in shares.items() if name.startswith(prefix) and share}


def _rows(report: Report) -> list[tuple[str, str]]:
    skipped = ", ".join(f"{n} {why}" for why, n in sorted(report.skipped.items())) or "none"
    slowest = ", ".join(f"{figure.stage} {figure.block}: {duration(figure.value)}" for figure in report.slowest)
    return [
        ("blocks", f"{report.inferred} of {report.blocks} inferred, {report.blended} of {report.to_blend} blended"),
        ("patches", f"{report.patches} run of {report.all_patches} in the volume; skipped: {skipped}"),
        (
            "patches per second",
            f"{report.patches_per_second:.3g} per inference task" if report.patches_per_second else "",
        ),
        ("output", f"{metric(report.voxels, 'voxel')} in {report.storage_chunks} storage chunks"),
        ("speed", _speed(report)),
        ("of a task", _spread_text(report.task_voxels_per_second, lambda v: metric(v, "voxel/s"))),
        ("bytes", _bytes(report)),
        ("peak memory", _peak(report)),
        ("inference task", _spread_text(report.wall.get("infer"), duration)),
        ("  its time", _shares_text(report.shares, "infer")),
        ("  beside it", _shares_text(report.beside, "infer")),
        ("blending task", _spread_text(report.wall.get("blend"), duration)),
        ("  its time", _shares_text(report.shares, "blend")),
        ("slowest", slowest),
        ("hosts", _names(report.hosts)),
        ("devices", _names(report.devices)),
        ("runs", _names(report.runs) if report.run is None else ""),
    ]


def _shares_text(shares: dict[str, float], stage: Stage) -> str:
    phases = sorted(phases_of(shares, stage).items(), key=lambda pair: -pair[1])
    return ", ".join(f"{phase} {percent(share)}" for phase, share in phases)


def _speed(report: Report) -> str:
    if report.voxels_per_second is None or report.span is None or report.busy is None:
        return ""
    text = f"{metric(report.voxels_per_second, 'voxel/s')} over {duration(report.span)} from first start to last finish"
    if report.busy > 0.95 * report.span:
        return text
    return f"{text}; {metric(report.voxels / report.busy, 'voxel/s')} over the {duration(report.busy)} when tasks ran"


def _spread_text(spread: Spread | None, shown: Callable[[float], str]) -> str:
    return f"median {shown(spread.median)}, {shown(spread.least)} to {shown(spread.most)}" if spread else ""


_BYTES = {
    "infer: read": "input read",
    "infer: written": "core written",
    "infer: donated": "donated",
    "blend: read": "donations read",
    "blend: written": "frame written",
}


def _bytes(report: Report) -> str:
    return ", ".join(f"{name} {metric(report.bytes[key], 'B')}" for key, name in _BYTES.items() if key in report.bytes)


def _peak(report: Report) -> str:
    peak = report.peak_memory
    return f"{metric(peak.value, 'B')} ({peak.stage} {peak.block} on {peak.host})" if peak else ""


def _names(counts: dict[str, int]) -> str:
    """The most frequent names, with the number of tasks."""
    shown = [f"{name or 'unnamed'} ({n} task{'s' * (n > 1)})" for name, n in Counter(counts).most_common(4)]
    return ", ".join([*shown, f"and {len(counts) - len(shown)} more"] if len(counts) > len(shown) else shown)


def _add(total: dict[str, N], numbers: Mapping[str, N], stage: Stage | None = None) -> None:
    """Add numbers by name to their sums, which have a stage before the name if one is given."""
    for name, number in numbers.items():
        key = f"{stage}: {name}" if stage else name
        total[key] = total.get(key, 0) + number


def _figure(tasks: TaskTable, values: NDArray[np.generic], row: int) -> TaskFigure:
    host = tasks.host_names[tasks.host[row]]
    return TaskFigure(tasks.stage_of(row), tasks.block_of(row), host, values[row].item())


def _spread(values: NDArray[np.float64]) -> Spread | None:
    if not len(values):
        return None
    ordered = np.sort(values)
    middle = ordered[[(len(values) - 1) // 2, len(values) // 2]]
    return Spread(float(middle.sum()) / 2, float(ordered[0]), float(ordered[-1]))
