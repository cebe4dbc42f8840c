"""A picture of a report: where time went, how long tasks took, what ran when, peak memory."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from chunkflow_core.reports.figures import Report, duration, metric, percent, phases_of, remedy, unit_of
from chunkflow_core.reports.tasks import Rows, TaskTable, busy_stretches

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


def draw_chart(report: Report, tasks: TaskTable, path: Path) -> None:
    """Draw a report as a PNG of 1600 × 1000 pixels.

    Args:
        report: The figures.
        tasks: The tasks that the report is about.
        path: Path of the picture; its folder is made.

    Raises:
        MissingInputError: There is no task.
        OSError: The picture can't be written.
    """
    if not len(tasks):
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
            _times(rest.add_subplot(grid[1, column]), tasks, stage)
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


def _times(axes: Axes, tasks: TaskTable, stage: Stage) -> None:
    axes.set_title(f"time of {_NAMES[stage]} tasks")
    chosen, wall = tasks.is_of(stage), tasks.wall
    timed = np.flatnonzero(chosen & (wall != 0))
    if not len(timed):
        _say(axes, _UNKNOWN if chosen.any() else "none yet")
        return
    (longest,) = tasks.most(wall, timed, 1)
    size, unit = unit_of(wall[longest])
    middle = np.median(wall[timed]) / size
    _histogram(axes, {stage: wall[timed] / size})
    axes.axvline(middle, color="black", linestyle="--", linewidth=1.2)
    block = tasks.block_of(longest)
    axes.set_xlabel(f"{unit}  (median {middle:.3g}, longest {wall[longest] / size:.3g}: {block})")


def _memory(axes: Axes, tasks: TaskTable) -> None:
    axes.set_title("peak memory of the processes")
    peaks = tasks.peak_memory
    known = peaks >= 0
    if not known.any():
        _say(axes, _UNKNOWN)
        return
    (top,) = tasks.most(peaks, np.flatnonzero(known), 1)
    most = int(peaks[top])
    size, unit = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    by_stage = {stage: peaks[known & tasks.is_of(stage)] / size for stage in STAGES}
    _histogram(axes, {stage: values for stage, values in by_stage.items() if len(values)})
    axes.set_xlabel(f"{unit}  (most {most / size:.3g}: {tasks.block_of(top)})")
    if len(tasks) > 1:
        axes.legend(frameon=False, fontsize=10)


def _histogram(axes: Axes, series: Mapping[Stage, NDArray[np.float64]]) -> None:
    number = sum(map(len, series.values()))
    low, high = (float(end(list(map(end, series.values())))) for end in (np.min, np.max))
    room = max(high - low, 0.2 * high, 1e-6)
    start = max(0.0, (low + high - room) / 2)
    axes.hist(
        list(series.values()),
        bins=min(40, 8 + math.isqrt(number)),
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


def _timeline(axes: Axes, tasks: TaskTable) -> None:
    axes.set_title("what ran when")
    start = tasks.start
    timed = np.argsort(start, kind="stable")[: np.count_nonzero(~np.isnan(start))]
    if not len(timed):
        _say(axes, _UNKNOWN)
        return
    clock = _Clock(busy_stretches(tasks))
    lanes = _lanes(tasks, timed) if len(timed) <= _MAX_BARS else []
    if 0 < len(lanes) <= _MAX_LANES:
        _bars(axes, tasks, lanes, clock)
    else:
        _running(axes, tasks, timed, clock)
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

    def __init__(self, stretches: NDArray[np.float64]) -> None:
        start, finish = stretches.T
        pauses, busy = start[1:] - finish[:-1], float((finish - start).sum())
        long = pauses > max(_PAUSE, 0.1 * busy)
        steps = np.zeros(stretches.size)
        steps[1::2], steps[2::2] = finish - start, np.where(long, 0.02 * busy, pauses)
        shown = np.cumsum(steps)
        size, self.unit = unit_of(shown[-1])
        self._times, self._shown = stretches.ravel(), shown / size
        self.end = float(self._shown[-1])
        self.gap = 0.02 * busy / size
        """Width of what is left of a long pause, in the unit."""
        self.cuts = list(zip(self._shown[1:-1:2][long].tolist(), pauses[long].tolist(), strict=True))
        """Where a pause was cut out, in the unit, and its seconds."""

    def __call__(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        shown: NDArray[np.float64] = np.interp(times, self._times, self._shown)
        return shown


def _lanes(tasks: TaskTable, timed: Rows) -> list[tuple[str, Rows]]:
    """Tasks in lanes in which they follow each other, by host.

    All hosts are together if there are many.
    """
    names, host = tasks.host_names, tasks.host[timed]
    there = {names[number]: number for number in np.unique(host)}
    hosts = {name: timed[host == number] for name, number in there.items()}
    if len(hosts) > _MAX_HOSTS:
        hosts = {f"{len(hosts)} hosts": timed}
    return [(name, lane) for name in sorted(hosts) for lane in _packed(tasks, hosts[name])]


def _packed(tasks: TaskTable, timed: Rows) -> list[Rows]:
    lanes: list[list[int]] = []
    free: list[tuple[float, int]] = []
    for row, start, finished in zip(timed, tasks.start[timed], tasks.finished[timed], strict=True):
        if free and free[0][0] <= start + 0.002:  # receipts have milliseconds
            number = heapq.heappop(free)[1]
        else:
            number = len(lanes)
            lanes.append([])
        lanes[number].append(row)
        heapq.heappush(free, (finished, number))
    return list(map(np.array, lanes))


def _bars(axes: Axes, tasks: TaskTable, lanes: Sequence[tuple[str, Rows]], clock: _Clock) -> None:
    for row, (_, lane) in enumerate(lanes):
        start, width = clock(tasks.start[lane]), clock(tasks.finished[lane]) - clock(tasks.start[lane])
        inferring, forward = tasks.is_of("infer")[lane], tasks.forward[lane]
        edge = {"edgecolor": "white", "linewidth": 0.7} if len(lane) <= 80 else {"linewidth": 0}
        for chosen, shares, colour in (
            (inferring, 1.0, INFER),
            (inferring, forward[inferring], FORWARD),
            (~inferring, 1.0, BLEND),
        ):
            extents = np.column_stack([start[chosen], width[chosen] * shares])
            axes.broken_barh(extents.tolist(), (row - 0.42, 0.84), facecolor=colour, **edge)
        if len(lanes) <= 8:
            for block, left, wide, share in zip(map(tasks.block_of, lane), start, width, forward, strict=True):
                if wide > 0.012 * len(block) * clock.end:
                    colour = "white" if share > 0.5 else "black"
                    axes.text(left + wide / 2, row, block, ha="center", va="center", fontsize=10, color=colour)
    _name_hosts(axes, [host for host, _ in lanes])


def _name_hosts(axes: Axes, hosts: list[str]) -> None:
    """Write names of hosts beside lanes, and draw lines between them.

    Args:
        axes: Where lanes are drawn.
        hosts: The host of each lane.
    """
    first = {host: hosts.index(host) for host in hosts}
    axes.set_yticks([first[host] + (hosts.count(host) - 1) / 2 for host in first])
    axes.set_yticklabels(
        [f"{host[:24]}\n{hosts.count(host)} at a time" for host in first] if len(first) <= 4 else [*first]
    )
    for host in list(first)[1:]:
        axes.axhline(first[host] - 0.5, color="#999999", linewidth=0.6)
    spare = max(0, 3 - len(hosts)) / 2
    axes.set_ylim(len(hosts) - 0.5 + spare, -0.5 - spare)


def _running(axes: Axes, tasks: TaskTable, timed: Rows, clock: _Clock) -> None:
    """Draw how many tasks run, over time."""
    edges = np.linspace(0, clock.end, _BINS + 1)
    bottom = np.zeros(_BINS)
    start, finish = clock(tasks.start[timed]), clock(tasks.finished[timed])
    inferring, forward = tasks.is_of("infer")[timed], tasks.forward[timed].astype(np.float64)
    for colour, weights in ((FORWARD, forward), (INFER, inferring - forward), (BLEND, 1.0 - inferring)):
        done = _seconds_until(edges, start, weights) - _seconds_until(edges, finish, weights)
        top = bottom + np.diff(done) / np.diff(edges)
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour)
        bottom = top
    hosts = len(np.unique(tasks.host[timed]))
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


def _order(phase: str) -> int:
    return list(_PHASES).index(phase if phase in _PHASES else "other")


def _on(colour: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
