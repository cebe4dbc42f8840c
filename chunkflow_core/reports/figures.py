"""What has been done, in figures, from the receipts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import STAGES, Stage
from chunkflow_core.exchange.receipts import Receipt
from chunkflow_core.lattice.blocks import Block
from chunkflow_core.spec import VolumeSpec

N = TypeVar("N", int, float)

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
    def start(self) -> float | None:
        """Time when the task began, Unix time."""
        return self.finished - self.wall if self.finished is not None and self.wall else None

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


def tasks_of(spec: VolumeSpec, receipts: Iterable[Receipt]) -> list[DoneTask]:
    """The tasks that have left receipts, in order of stage and block."""
    ordered = sorted(receipts, key=lambda receipt: (STAGES.index(receipt.stage), receipt.block))
    return [_task(receipt, spec.grid.block(receipt.block)) for receipt in ordered]


def of_run(tasks: Iterable[DoneTask], run: str | None) -> list[DoneTask]:
    """The tasks of a run; all for None."""
    return [task for task in tasks if run is None or task.run == run]


def summarise(spec: VolumeSpec, exchange: Exchange, *, run: str | None = None) -> Report:
    """Summarise the receipts of a run, or all of them."""
    return report_of(spec, exchange.path, tasks_of(spec, exchange.all_receipts()), run=run)


def report_of(spec: VolumeSpec, exchange: str, everything: Sequence[DoneTask], *, run: str | None = None) -> Report:
    """Summarise the tasks of a run, or all of them.

    Args:
        spec: The volume.
        exchange: Path of the exchange.
        everything: The tasks of all runs.
        run: Name of the run; None for all.
    """
    grid, tasks = spec.grid, of_run(everything, run)
    infer, blend = ([task for task in tasks if task.stage == stage] for stage in STAGES)
    timed = [task for task in tasks if task.wall]
    shares, seconds = _shares(tasks, lambda task: task.parts), sum(task.wall for task in infer)
    patches, voxels = sum(task.patches for task in tasks), sum(task.voxels for task in tasks)
    stretches = busy_stretches(tasks)
    span = stretches[-1][1] - stretches[0][0] if stretches else None
    alone = math.prod(n for n, overlap in zip(grid.shape, grid.overlap, strict=True) if overlap == 0)
    return Report(
        name=spec.name,
        output=spec.output.path,
        exchange=exchange,
        fingerprint=spec.fingerprint,
        run=run,
        runs=dict(Counter(task.run for task in everything)),
        blocks=math.prod(grid.shape),
        inferred=len(infer),
        to_blend=math.prod(grid.shape) - alone,
        blended=len(blend),
        patches=patches,
        skipped=_total(pair for task in tasks for pair in task.skipped.items()),
        all_patches=grid.patches,
        voxels=voxels,
        storage_chunks=sum(task.storage_chunks for task in tasks),
        donated_bytes=sum(task.donated_bytes for task in tasks),
        bytes=_total((f"{task.stage}: {what}", n) for task in tasks for what, n in task.bytes.items()),
        patches_per_second=round(patches / seconds, 3) if seconds else None,
        span=None if span is None else round(span, 3),
        busy=round(sum(finish - start for start, finish in stretches), 3) if stretches else None,
        voxels_per_second=round(voxels / span, 1) if span else None,
        task_voxels_per_second=_spread(task.rate for task in infer if task.rate is not None),
        wall={stage: spread for stage in STAGES if (spread := _spread(t.wall for t in timed if t.stage == stage))},
        seconds=_rounded((f"{task.stage}: {phase}", s) for task in tasks for phase, s in task.seconds.items()),
        shares=shares,
        beside=_shares(tasks, lambda task: task.beside),
        forward=shares.get("infer: forward"),
        peak_memory=max(
            (_figure(task, task.peak_memory) for task in tasks if task.peak_memory is not None),
            key=lambda figure: figure.value,
            default=None,
        ),
        slowest=[_figure(task, task.wall) for task in sorted(timed, key=lambda task: -task.wall)[:3]],
        hosts=dict(Counter(task.host for task in tasks)),
        devices=dict(Counter(task.device for task in infer if task.patches)),
    )


def busy_stretches(tasks: Iterable[DoneTask]) -> list[tuple[float, float]]:
    """The disjoint stretches of time in which any task ran, in order.

    Each is start and finish, in Unix time.
    """
    stretches: list[tuple[float, float]] = []
    for start, finish in sorted((t.start, t.finished) for t in tasks if t.start is not None and t.finished is not None):
        if stretches and start <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(stretches[-1][1], finish))
        else:
            stretches.append((start, finish))
    return stretches


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


def _task(receipt: Receipt, block: Block) -> DoneTask:
    facts, infer = receipt.facts, receipt.stage == "infer"
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


def _shares(tasks: Sequence[DoneTask], seconds: Callable[[DoneTask], dict[str, float]]) -> dict[str, float]:
    """Seconds by phase, summed, as shares of all wall time of the stage."""
    walls = _total((task.stage, task.wall) for task in tasks)
    total = _total((f"{task.stage}: {phase}", s) for task in tasks for phase, s in seconds(task).items())
    of = {name: walls[name.split(":")[0]] for name in total}
    return {name: round(s / of[name], 4) for name, s in total.items() if of[name]}


def _total(pairs: Iterable[tuple[str, N]]) -> dict[str, N]:
    total: dict[str, N] = {}
    for name, number in pairs:
        total[name] = total.get(name, 0) + number
    return total


def _rounded(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {name: round(number, 3) for name, number in sorted(_total(pairs).items())}


def _figure(task: DoneTask, value: float) -> TaskFigure:
    return TaskFigure(task.stage, task.block, task.host, value)


def _spread(values: Iterable[float]) -> Spread | None:
    values = list(values)
    return Spread(median(values), min(values), max(values)) if values else None
