"""What the comparison prints, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import bare_pyplot, describe, save_figure, size_text, table
from bench.compare.arithmetic import MATRIX
from bench.compare.data import CHANNELS
from bench.compare.rows import ROWS


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    key: str
    """Name of the figure."""
    form: str
    """Format of the figure, as the function ``format`` takes it."""
    scale: float = 1.0
    """What the figure is multiplied by."""

    def cell(self, figures: dict[str, float]) -> str:
        """Write a row's figure."""
        return format(figures[self.key] * self.scale, self.form) if self.key in figures else "–"


NETWORK = (
    Column("whole, s", "whole_seconds", ".2f"),
    Column("forward alone, s", "forward_seconds", ".2f"),
    Column("whole / forward", "ratio", ".3f"),
    Column("in CPU time", "cpu_ratio", ".3f"),
    Column("Mvoxel/s", "voxels_per_second", ".2f", 1e-6),
    Column("speed, MONAI = 1", "speed_to_monai", ".2f"),
    Column("of the matrix rate", "of_matrix_rate", ".0%"),
)
"""Columns of rows that run the network."""
IDENTITY = (
    Column("end to end, Mvoxel/s", "voxels_per_second", ".1f", 1e-6),
    Column("MONAI = 1", "speed_to_monai", ".2f"),
    Column("compute only, Mvoxel/s", "compute_voxels_per_second", ".1f", 1e-6),
    Column("MONAI = 1", "compute_speed_to_monai", ".2f"),
)
"""Columns of rows that repeat the input."""


def print_report(report: dict[str, Any], nominal: Sequence[int]) -> None:
    """Print all that was measured, as Markdown.

    Args:
        report: What ``measure`` gives, with ``machine`` and ``options``.
        nominal: Size of the volume that was asked for, in voxels, zyx.
    """
    options, rows = report["options"], report["rows"]
    print(f"\n{describe(report['machine'])}.")
    volume, patch, overlap = (size_text(options[key]) for key in ("volume", "patch", "overlap"))
    print(
        f"\nVolume {volume} (asked for: {size_text(nominal)}), {report['patches']} patches of {patch} with an overlap "
        f"of {overlap}, {CHANNELS} channels, uint8, {options['compression']}; {options['threads']} CPUs; medians of "
        f"{options['rounds']} rounds, ratios within rounds."
    )
    print("\n".join(_patch_lines(report)))
    if report["matrix_rates"]:
        rates = ", ".join(f"{rate / 1e9:.0f} in {precision}" for precision, rate in report["matrix_rates"].items())
        print(
            f"\nThe network takes {report['multiply_adds_per_patch'] / 1e9:.2f} billion multiply-adds a patch. Billion "
            f"multiply-adds per second of matrices of at most {MATRIX} × {MATRIX}: {rates}."
        )
    print()
    for network in (True, False):
        chosen = {name: row for name, row in rows.items() if ROWS[name].network == network}
        if chosen:
            print(rows_table(chosen, network) + "\n")
    print("\n".join(_check_lines(report["checks"])))


def _patch_lines(report: dict[str, Any]) -> list[str]:
    """How many patches each program has run, and a warning if they are not the same."""
    ran = {row["title"]: row["patches"] for row in report["rows"].values() if not row["error"]}
    odd = {title: count for title, count in ran.items() if count != report["patches"]}
    lines = [f"\nPatches that ran: {', '.join(f'{count} by {title}' for title, count in ran.items())}."]
    return lines + ([f"\n**Not the same patches**: {odd}."] if odd else [])


def rows_table(rows: dict[str, Any], network: bool) -> str:
    """The table of the rows that run the network, or of those that don't."""
    columns = NETWORK if network else IDENTITY
    header = ["", *(["at a time"] if network else []), *(column.title for column in columns), "peak memory, MB"]
    if on_gpu := any(row["device_memory"] for row in rows.values()):
        header.append("device memory, MB")
    lines = []
    for name, row in rows.items():
        if row["error"]:
            lines.append([ROWS[name].title, row["error"], *["–"] * (len(header) - 2)])
            continue
        cells = [column.cell(row["figures"]) for column in columns]
        memory = [f"{row[key] / 1e6:.0f}" for key in ("peak_memory", "device_memory")[: 1 + on_gpu]]
        lines.append([ROWS[name].title, *([row["settings"]] if network else []), *cells, *memory])
    return table(header, lines)


def _check_lines(checks: dict[str, Any]) -> list[str]:
    """What is to be said of the numbers."""
    lines = []
    if "blending" in checks["to_float64"]:
        lines.append(
            "- float32 output of a small volume: at most {blending:.1e} from the same forward passes blended in "
            "float64, {network:.1e} from forward passes in float64 too.".format(**checks["to_float64"])
        )
    for name, apart in checks["engines"].items():
        lines.append(f"- {ROWS[name].title}: outputs of patches at most {apart:.1e} from PyTorch in float32.")
    for name, apart in checks["uint8"].items():
        mean, largest = apart["mean"], apart["largest"]
        lines.append(f"- {ROWS[name].title}: written grey levels {mean:.3f} apart on average, at most {largest:.0f}.")
    return lines


def plot(path: Path, report: dict[str, Any]) -> None:
    """Draw bars of output voxels per second, of rows with the network and without.

    Args:
        path: Image file.
        report: As for ``print_report``.
    """
    plt = bare_pyplot()
    good = {name: row for name, row in report["rows"].items() if not row["error"]}
    kinds = {kind: {n: r for n, r in good.items() if ROWS[n].network == kind} for kind in (True, False)}
    shown = {kind: rows for kind, rows in kinds.items() if rows}
    heights = [len(rows) + 1 for rows in shown.values()]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, 0.55 * sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (network, rows) in zip(axes[:, 0], shown.items(), strict=True):
        _bars(axis, rows, network)
    processor, threads = report["machine"]["processor"], report["options"]["threads"]
    figure.suptitle(f"{processor}, {threads} CPUs, {report['patches']} patches", fontsize=10)
    save_figure(figure, path)


def _bars(axis: Any, rows: dict[str, Any], network: bool) -> None:
    key, label = (
        ("forward_seconds", "forward passes alone") if network else ("compute_seconds", "without reading and writing")
    )
    figures = [row["figures"] for row in rows.values()]
    whole = np.array([f["voxels_per_second"] for f in figures]) / 1e6
    part = np.array([f["voxels_per_second"] * f["whole_seconds"] / f[key] for f in figures]) / 1e6
    places = np.arange(len(rows))
    colours = ["tab:blue" if ROWS[name].ours else "tab:gray" for name in rows]
    axis.barh(places, part, 0.8, color="none", edgecolor="black", linestyle=":", label=label)
    bars = axis.barh(places, whole, 0.6, color=colours, label="end to end")
    axis.bar_label(bars, [f"{v:.2f}" if v < 10 else f"{v:.0f}" for v in whole], label_type="center", color="white")
    axis.set_yticks(places, [ROWS[name].title for name in rows])
    axis.invert_yaxis()
    axis.set_xlabel("output voxels per second, millions" + ("" if network else " (no network)"))
    axis.legend(loc="best", fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
