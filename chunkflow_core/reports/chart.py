"""A picture of a report: where time went, how long tasks took, what ran when, peak memory."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from chunkflow_core.errors import MissingInputError
from chunkflow_core.exchange.marks import STAGES, Stage
from chunkflow_core.reports.figures import (
    DoneTask,
    Report,
    busy_stretches,
    duration,
    metric,
    percent,
    phases_of,
    remedy,
    unit_of,
)

FORWARD, INFER, BLEND = "#1f5fa8", "#a6c8ec", "#e8871e"
"""Colours of the forward passes, the rest of inference tasks, and blending tasks."""

_PHASES = {
    "forward": FORWARD,
    "stitch": "#3f9e6b",
    "load": "#8e6bbf",
    "read": "#33a6b8",
    "convert": "#d8b62c",
    "write": "#b5477a",
    "donate": "#e79ac0",
    "wait for output": "#7d8794",
    "idle": "#d5dae1",
    "other": "#b9bfc8",
}
_COLOURS: dict[Stage, str] = {"infer": FORWARD, "blend": BLEND}
_NAMES: dict[Stage, str] = {"infer": "inference", "blend": "blending"}

_UNKNOWN = "these receipts don't tell"

_MAX_LANES = 32
_MAX_BARS = 3000
"""Number of tasks above which the timeline shows how many ran instead of each of them."""
_MAX_HOSTS = 12
"""Number of hosts above which the lanes of the timeline are not told apart by host."""
_MAX_CUTS_NAMED = 6
_BINS = 800
_PAUSE = 60.0
"""Least seconds without a task for a pause to be cut out of the timeline."""


def draw_chart(report: Report, tasks: Sequence[DoneTask], path: Path) -> None:
    """Draw a report as a PNG of 1600 × 1000 pixels.

    Args:
        report: The figures.
        tasks: The tasks that the report is about.
        path: Path of the picture; its folder is made.

    Raises:
        MissingInputError: There is no task.
        OSError: The picture can't be written.
    """
    if not tasks:
        raise MissingInputError(remedy(report))
    style: dict[Any, Any] = {
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
    style |= {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(16, 10), dpi=100, layout="constrained")
        run = f", run {report.run}" if report.run else ""
        figure.suptitle(f"{report.name}{run}: {report.output}", fontsize=15, x=0.01, ha="left")
        top, rest = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 9.8)).flat
        _key_figures(top.add_axes((0.01, 0.05, 0.98, 0.95)), report)
        grid = rest.add_gridspec(3, 3, height_ratios=(1.7, 1.9, 2.6))
        _shares(rest.add_subplot(grid[0, :]), report)
        for column, stage in enumerate(STAGES):
            _times(rest.add_subplot(grid[1, column]), [task for task in tasks if task.stage == stage], stage)
        _memory(rest.add_subplot(grid[1, 2]), tasks)
        _timeline(rest.add_subplot(grid[2, :]), tasks)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def _key_figures(axes: Axes, report: Report) -> None:
    skipped = sum(report.skipped.values())
    peak, speed = report.peak_memory, report.voxels_per_second
    tiles = [
        ("in forward passes", "?" if report.forward is None else percent(report.forward)),
        ("blocks inferred", f"{report.inferred:,} / {report.blocks:,}"),
        ("blocks blended", f"{report.blended:,} / {report.to_blend:,}"),
        (f"patches run, {skipped:,} skipped", f"{report.patches:,}"),
        ("output, all tasks together", "?" if speed is None else metric(speed, "voxel/s")),
        ("first start to last finish", "?" if report.span is None else duration(report.span)),
        ("peak memory of a task", "?" if peak is None else metric(peak.value, "B")),
    ]
    axes.set(xlim=(0, len(tiles)), ylim=(0, 1))
    axes.axis("off")
    for number, (name, value) in enumerate(tiles):
        size, colour = min(22.0, 240 / len(value)), FORWARD if number == 0 else "black"
        axes.text(number, 0.36, value, fontsize=size, fontweight="bold", color=colour)
        axes.text(number, 0.04, name, fontsize=11, color="#444444")


def _shares(axes: Axes, report: Report) -> None:
    rows = [
        ("inference tasks", phases_of(report.shares, "infer")),
        ("beside them, in threads\n(these add up)", phases_of(report.beside, "infer")),
        ("blending tasks", phases_of(report.shares, "blend")),
    ]
    rows = [(name, phases) for name, phases in rows if phases]
    axes.set_title("where the time of tasks went")
    if not rows:
        _say(axes, _UNKNOWN)
        return
    longest = max([1.0, *(sum(phases.values()) for _, phases in rows)])
    for row, (_, phases) in enumerate(rows):
        left = 0.0
        for phase in sorted(phases, key=_order):
            share, colour = phases[phase], _PHASES.get(phase, _PHASES["other"])
            axes.barh(row, share, left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.74)
            if share > 0.035 * longest:
                text = f"{phase}\n{percent(share)}" if share > 0.012 * len(phase) * longest else percent(share)
                axes.text(left + share / 2, row, text, ha="center", va="center", fontsize=11, color=_on(colour))
            left += share
    axes.set(xlim=(0, longest), yticks=range(len(rows)))
    axes.set_yticklabels([name for name, _ in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
    shown = sorted({phase for _, phases in rows for phase in phases}, key=_order)
    _legend(axes, {phase: _PHASES.get(phase, _PHASES["other"]) for phase in shown})


def _times(axes: Axes, tasks: Sequence[DoneTask], stage: Stage) -> None:
    axes.set_title(f"time of {_NAMES[stage]} tasks")
    timed = [task for task in tasks if task.wall]
    if not timed:
        _say(axes, _UNKNOWN if tasks else "none yet")
        return
    longest = max(timed, key=lambda task: task.wall)
    size, unit = unit_of(longest.wall)
    middle = median(task.wall for task in timed) / size
    _histogram(axes, {stage: [task.wall / size for task in timed]})
    axes.axvline(middle, color="black", linestyle="--", linewidth=1.2)
    axes.set_xlabel(f"{unit}  (median {middle:.3g}, longest {longest.wall / size:.3g}: {longest.block})")


def _memory(axes: Axes, tasks: Sequence[DoneTask]) -> None:
    axes.set_title("peak memory of the processes")
    peaks = [(task, task.peak_memory) for task in tasks if task.peak_memory is not None]
    if not peaks:
        _say(axes, _UNKNOWN)
        return
    top, most = max(peaks, key=lambda pair: pair[1])
    size, unit = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    by_stage = {stage: [peak / size for task, peak in peaks if task.stage == stage] for stage in STAGES}
    _histogram(axes, {stage: values for stage, values in by_stage.items() if values})
    axes.set_xlabel(f"{unit}  (most {most / size:.3g}: {top.block})")
    if len(tasks) > 1:
        axes.legend(frameon=False, fontsize=10)


def _histogram(axes: Axes, series: Mapping[Stage, Sequence[float]]) -> None:
    values = [value for some in series.values() for value in some]
    low, high = min(values), max(values)
    room = max(high - low, 0.2 * high, 1e-6)
    start = max(0.0, (low + high - room) / 2)
    axes.hist(
        list(series.values()),
        bins=min(40, 8 + math.isqrt(len(values))),
        range=(min(start, low), max(start + room, high)),  # rounding must not push the ends out
        stacked=True,
        color=[_COLOURS[stage] for stage in series],
        label=[_NAMES[stage] for stage in series],
        edgecolor="white",
        linewidth=0.5,
    )
    axes.set(ylabel="tasks")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _legend(axes: Axes, colours: Mapping[str, str]) -> None:
    """Draw the legend above the diagram, at the right."""
    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        ncol=len(colours),
        loc="lower right",
        bbox_to_anchor=(1.005, 0.99),
        frameon=False,
        fontsize=11,
        handlelength=1.2,
        columnspacing=1.3,
    )


def _say(axes: Axes, text: str) -> None:
    """Show a text instead of a diagram."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#777777", fontsize=14)
    axes.axis("off")


def _timeline(axes: Axes, tasks: Sequence[DoneTask]) -> None:
    axes.set_title("what ran when")
    timed = sorted((task for task in tasks if task.start is not None), key=lambda task: task.start or 0.0)
    if not timed:
        _say(axes, _UNKNOWN)
        return
    clock = _Clock(busy_stretches(timed))
    lanes = _lanes(timed)
    if len(lanes) <= _MAX_LANES and len(timed) <= _MAX_BARS:
        _bars(axes, lanes, clock)
    else:
        _running(axes, timed, clock)
    for position, seconds in clock.cuts:
        axes.axvspan(position, position + clock.gap, facecolor="#e4e4e4", linewidth=0, zorder=0)
        if len(clock.cuts) <= _MAX_CUTS_NAMED:
            style: dict[str, Any] = {
                "rotation": 90,
                "ha": "center",
                "va": "center",
                "transform": axes.get_xaxis_transform(),
            }
            axes.text(position + clock.gap / 2, 0.5, f"nothing for {duration(seconds)}", fontsize=10, **style)
    axes.set_xlim(0, clock.end or 1)
    axes.xaxis.set_major_locator(MaxNLocator(12))
    axes.set_xlabel(f"time since the first start{', without the pauses' if clock.cuts else ''} ({clock.unit})")
    colours = {"forward passes (their share of a task)": FORWARD, "rest of inference": INFER, "blending": BLEND}
    _legend(axes, colours)


class _Clock:
    """Unix time → time since the first start in a unit that suits, without long pauses."""

    def __init__(self, stretches: Sequence[tuple[float, float]]) -> None:
        busy = sum(finish - start for start, finish in stretches)
        longest = max(_PAUSE, 0.1 * busy)
        self._times, shown = [stretches[0][0]], [0.0]
        cuts = []
        for start, finish in stretches:
            pause = start - self._times[-1]
            if pause > longest:
                cuts.append((shown[-1], pause))
            shown.append(shown[-1] + (0.02 * busy if pause > longest else pause))
            shown.append(shown[-1] + finish - start)
            self._times += [start, finish]
        size, self.unit = unit_of(shown[-1])
        self._shown = [seconds / size for seconds in shown]
        self.end = self._shown[-1]
        self.gap = 0.02 * busy / size
        """Width of what is left of a long pause, in the unit."""
        self.cuts = [(position / size, pause) for position, pause in cuts]
        """Where a pause was cut out, in the unit, and its seconds."""

    def __call__(self, times: Sequence[float | None]) -> NDArray[np.float64]:
        shown: NDArray[np.float64] = np.interp(np.array(times, float), self._times, self._shown)
        return shown


def _lanes(timed: Sequence[DoneTask]) -> list[tuple[str, list[DoneTask]]]:
    """Tasks in lanes in which they follow each other, by host.

    All hosts are together if there are many.
    """
    hosts = defaultdict(list)
    for task in timed:
        hosts[task.host].append(task)
    if len(hosts) > _MAX_HOSTS:
        hosts = defaultdict(list, {f"{len(hosts)} hosts": list(timed)})
    return [(host, lane) for host in sorted(hosts) for lane in _packed(hosts[host])]


def _packed(timed: Sequence[DoneTask]) -> list[list[DoneTask]]:
    lanes: list[list[DoneTask]] = []
    free: list[tuple[float, int]] = []
    for task in timed:
        assert task.start is not None and task.finished is not None
        if free and free[0][0] <= task.start + 0.002:  # receipts have milliseconds
            number = heapq.heappop(free)[1]
        else:
            number = len(lanes)
            lanes.append([])
        lanes[number].append(task)
        heapq.heappush(free, (task.finished, number))
    return lanes


def _bars(axes: Axes, lanes: Sequence[tuple[str, list[DoneTask]]], clock: _Clock) -> None:
    for row, (_, lane) in enumerate(lanes):
        start, finish = clock([task.start for task in lane]), clock([task.finished for task in lane])
        width = finish - start
        inferring = np.array([task.stage == "infer" for task in lane])
        edge = {"edgecolor": "white", "linewidth": 0.7} if len(lane) <= 80 else {"linewidth": 0}
        for chosen, shares, colour in (
            (inferring, 1.0, INFER),
            (inferring, np.array([_forward(task) for task in lane])[inferring], FORWARD),
            (~inferring, 1.0, BLEND),
        ):
            extents = np.column_stack([start[chosen], width[chosen] * shares])
            axes.broken_barh(extents.tolist(), (row - 0.42, 0.84), facecolor=colour, **edge)
        if len(lanes) <= 8:
            for task, left, wide in zip(lane, start, width, strict=True):
                if wide > 0.012 * len(task.block) * clock.end:
                    colour = "white" if _forward(task) > 0.5 else "black"
                    axes.text(left + wide / 2, row, task.block, ha="center", va="center", fontsize=10, color=colour)
    hosts = [host for host, _ in lanes]
    first = {host: hosts.index(host) for host in hosts}
    axes.set_yticks([first[host] + (hosts.count(host) - 1) / 2 for host in first])
    axes.set_yticklabels(
        [f"{host[:24]}\n{hosts.count(host)} at a time" for host in first] if len(first) <= 4 else [*first]
    )
    for host in list(first)[1:]:
        axes.axhline(first[host] - 0.5, color="#999999", linewidth=0.6)
    spare = max(0, 3 - len(lanes)) / 2
    axes.set_ylim(len(lanes) - 0.5 + spare, -0.5 - spare)


def _running(axes: Axes, timed: Sequence[DoneTask], clock: _Clock) -> None:
    """Draw how many tasks run, over time."""
    edges = np.linspace(0, clock.end, _BINS + 1)
    bottom = np.zeros(_BINS)
    kinds: list[tuple[str, Callable[[DoneTask], float]]] = [
        (FORWARD, _forward),
        (INFER, lambda task: 1 - _forward(task) if task.stage == "infer" else 0.0),
        (BLEND, lambda task: float(task.stage == "blend")),
    ]
    start, finish = clock([task.start for task in timed]), clock([task.finished for task in timed])
    for colour, weight in kinds:
        weights = np.array([weight(task) for task in timed])
        done = _seconds_until(edges, start, weights) - _seconds_until(edges, finish, weights)
        top = bottom + np.diff(done) / np.diff(edges)
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour)
        bottom = top
    hosts = len({task.host for task in timed})
    axes.set(ylabel=f"tasks at a time,\non {hosts} hosts" if hosts > 1 else "tasks at a time", ylim=(0, None))


def _seconds_until(
    edges: NDArray[np.float64], since: NDArray[np.float64], weights: NDArray[Any]
) -> NDArray[np.float64]:
    """Weighted seconds since each of some moments, summed, at each edge after them."""
    order = np.argsort(since)
    weight = np.concatenate([[0.0], np.cumsum(weights[order])])
    moment = np.concatenate([[0.0], np.cumsum(weights[order] * since[order])])
    before = np.searchsorted(since[order], edges, side="right")
    seconds: NDArray[np.float64] = edges * weight[before] - moment[before]
    return seconds


def _forward(task: DoneTask) -> float:
    return min(1.0, task.parts.get("forward", 0.0) / task.wall) if task.wall else 0.0


def _order(phase: str) -> int:
    return list(_PHASES).index(phase if phase in _PHASES else "other")


def _on(colour: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
