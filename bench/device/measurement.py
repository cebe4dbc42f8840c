"""All figures of a row, and whether they are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.common import median_ratio, table, timed, wait_for
from bench.device.bits import differing, left, plain, same_anywhere, same_elsewhere
from bench.device.volume import MIDDLE, whole
from chunkflow_core.engines.base import Engine
from chunkflow_core.engines.pytorch import PyTorch
from chunkflow_core.planning.estimate import data_bytes
from chunkflow_core.steps.workspace import Workspace

BITS = ("same each time", "same at any place", "same elsewhere")
"""Columns that have to say yes, beside ``voxels that differ``, which has to be 0."""

Figures = dict[str, Any]


def alone(engine: Engine, kept: list[torch.Tensor], count: int) -> float:
    """Run batches that are on the device, in turn; give the wall seconds of ``count`` of them."""

    def run() -> None:
        for number in range(count):
            engine.forward(kept[number % len(kept)])
        wait_for(kept[0].device)

    wait_for(kept[0].device)
    return timed(run)[0]


def busy_share(workspace: Workspace) -> float:
    """Give the share of a block's wall time in which some kernel runs, by PyTorch's profiler.

    Copies are not counted.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds, _ = whole(workspace)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]
    ranges = [event.time_range for event in events if not event.name.startswith(("Memcpy", "Memset"))]
    return covered((microseconds.start, microseconds.end) for microseconds in ranges) / 1e6 / seconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Give the length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def measure(workspace: Workspace, rounds: int, step: Callable[[], object], other: Executor) -> Figures:
    """Take all figures of a row.

    Args:
        workspace: Where the block is run.
        rounds: How often the block and its forward passes alone are timed.
        step: Called ``rounds + 2`` times, as the work goes on.
        other: Another process, to compare bits with.

    Returns:
        Figures by column; under ``phases`` the seconds of each phase of the last run.
    """
    engine, block = workspace.engine, workspace.spec.grid.block(MIDDLE)
    on_gpu = engine.device is not None and engine.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(engine.device)
    _, receipt = whole(workspace)
    peak = torch.cuda.max_memory_allocated(engine.device) if on_gpu else 0
    slab, kept, count = plain(workspace, block)
    different = differing(workspace, receipt, slab)
    del slab
    step()
    receipts, seconds, forward = [receipt], [], []
    for _ in range(rounds):
        took, receipt = whole(workspace)
        receipts.append(receipt)
        seconds.append(took)
        forward.append(alone(engine, kept, count))
        step()
    facts = [receipt.facts for receipt in receipts[1:]]
    figures = {
        "whole, s": median(seconds),
        "Mvoxel/s": median(block.box.voxels / 1e6 / took for took in seconds),
        "forward alone, s": median(forward),
        "whole / forward": median_ratio(seconds, forward),
        "forward, of wall": median(f["seconds"]["forward"] / f["wall"] for f in facts) if on_gpu else None,
        "kernels, of wall": busy_share(workspace) if on_gpu else None,
        "voxels that differ": different,
        "same each time": all(left(receipt) == left(receipts[0]) for receipt in receipts),
        "same at any place": same_anywhere(engine, kept[0]) if engine.batch_size > 1 else None,
        "same elsewhere": same_elsewhere(workspace, kept[0], other) if isinstance(engine, PyTorch) else None,
        "device memory, MB": round(peak / 1e6) if on_gpu else None,
        "data by `plan`, MB": round(data_bytes(workspace.spec, block) / 1e6),
        "phases": facts[-1]["seconds"],
    }
    step()
    return figures


def results_table(rows: dict[str, Figures]) -> str:
    """Write the table of all rows; one that failed shows its error."""
    titles = list(dict.fromkeys(title for figures in rows.values() for title in figures if title != "phases"))
    return table(
        ["", *titles], [[name, *(cell(figures.get(title)) for title in titles)] for name, figures in rows.items()]
    )


def cell(value: Any) -> str:
    """Write a figure as it stands in the table."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def are_right(rows: dict[str, Figures]) -> bool:
    """Tell whether all bits of all rows that ran are as they have to be."""
    good = [figures for figures in rows.values() if "error" not in figures]
    return all(not figures["voxels that differ"] and False not in map(figures.get, BITS) for figures in good)
