"""Rounds in which each row runs once, figures from them, and how far the numbers are apart."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.common import median_ratio, peak_device_memory
from bench.compare.arithmetic import matrix_rate, multiply_adds
from bench.compare.data import CHANNELS, Setting, write_inputs, write_network
from bench.compare.processes import Process, Timing
from bench.compare.rows import CHECKED, ROWS, reference
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.machine import CPUS_VARIABLE, peak_memory


def measure(setting: Setting, names: list[str], rounds: int) -> dict[str, Any]:
    """Run all rows; give everything that is reported, except for machine and options.

    Args:
        setting: What all rows share; its folder gets the input layers and the network.
        names: Of the rows.
        rounds: How often each row runs.
    """
    # for the rows' processes
    environment = {CPUS_VARIABLE: str(setting.threads), "CHUNKFLOW_CACHE": f"{setting.folder}/cache"}
    os.environ |= environment | {"TQDM_DISABLE": "1"}
    write_inputs(setting)
    write_network(setting.folder)
    rows = {name: Process.start(setting, name) for name in names}
    bare = Process.start(setting, "")
    try:
        _warm_up(setting, list(rows.values()))
        network = any(ROWS[name].network for name in names)
        work = (bare.ask(multiply_adds, setting) or 0) if network else 0
        patches = setting.grid("volume").patches
        rates = _run_rounds(setting, list(rows.values()), bare, rounds)
        for process in rows.values():
            process.peak_memory = process.ask(peak_memory) or 0
            process.device_memory = process.ask(peak_device_memory, setting.device) or 0
        return {
            "patches": patches,
            "multiply_adds_per_patch": work,
            "matrix_rates": rates,
            "matrix_error": bare.error,
            "checks": _check_numbers(setting, rows),
            "rows": {name: _report(setting, process, rows, work, rates) for name, process in rows.items()},
        }
    finally:
        for process in [*rows.values(), bare]:
            process.pool.shutdown(cancel_futures=True)


def _warm_up(setting: Setting, processes: list[Process]) -> None:
    with ThreadPoolExecutor(setting.threads) as pool:
        answers = pool.map(lambda process: process.call("prepare") or "", processes)
        for process, parallelism in tqdm(
            zip(processes, answers, strict=True), "warming up", len(processes), unit="row"
        ):
            process.parallelism = parallelism


def _run_rounds(setting: Setting, processes: list[Process], bare: Process, rounds: int) -> dict[str, float]:
    """Let each row run once in every round, in turn forwards and backwards.

    Returns the best rates of matrix multiplication, in the precisions that the rows' networks have.
    """
    patches, device = setting.grid("volume").patches, setting.device
    networks = [entry for entry in (ROWS[process.name] for process in processes) if entry.network]
    precisions = sorted({entry.precision for entry in networks}, reverse=True)
    rates: dict[str, list[float]] = {precision: [] for precision in precisions}
    with tqdm(total=rounds * len(processes), desc="rounds", unit="row") as progress:
        for number in range(rounds):
            for precision, found in rates.items():
                found.append(bare.ask(matrix_rate, precision, device) or float("nan"))
            for process in processes if number % 2 == 0 else processes[::-1]:
                progress.set_postfix_str(process.name)
                process.measure("whole", "volume")
                network = ROWS[process.name].network
                process.call("load", network)  # not timed
                if network:
                    process.measure("forward", patches)
                else:
                    process.measure("compute")
                progress.update()
    return {precision: max(found) for precision, found in rates.items()}


def _report(
    setting: Setting, process: Process, rows: dict[str, Process], work: int, rates: dict[str, float]
) -> dict[str, Any]:
    """Give all that is reported of a row."""
    figures: Timing = {}
    if not process.error:
        compared = rows.get(reference(process.name))
        figures = _speed(process, Box((0, 0, 0), setting.volume).voxels, work, rates)
        figures |= _speed_to(compared, process) if compared and not compared.error else {}
    return {
        "title": ROWS[process.name].title,
        "settings": process.parallelism,
        "error": process.error,
        "patches": process.patches,
        "peak_memory": process.peak_memory,
        "device_memory": process.device_memory,
        "figures": figures,
        "rounds": process.timings,
    }


def _speed(process: Process, voxels: int, work: int, rates: dict[str, float]) -> Timing:
    """Figures of a row by itself: medians, and ratios within rounds."""
    whole, forward, compute = map(process.seconds, ("whole", "forward", "compute"))
    figures = {"whole_seconds": median(whole), "voxels_per_second": voxels / median(whole)}
    if forward:
        figures["forward_seconds"] = median(forward)
        figures["ratio"] = median_ratio(whole, forward)
        figures["cpu_ratio"] = median_ratio(process.cpu_seconds("whole"), process.cpu_seconds("forward"))
        rate = work * process.patches / figures["whole_seconds"]
        figures["multiply_adds_per_second"] = rate
        figures["of_matrix_rate"] = rate / rates[ROWS[process.name].precision]
    if compute:
        figures["compute_seconds"] = median(compute)
        figures["compute_voxels_per_second"] = voxels / figures["compute_seconds"]
    return figures


def _speed_to(other: Process, process: Process) -> Timing:
    """How many times as fast as another row a row is, within rounds."""
    figures = {"speed_to_monai": median_ratio(other.seconds("whole"), process.seconds("whole"))}
    if process.seconds("compute"):
        figures["compute_speed_to_monai"] = median_ratio(other.seconds("compute"), process.seconds("compute"))
    return figures


def _check_numbers(setting: Setting, rows: dict[str, Process]) -> dict[str, Any]:
    """How far the outputs are apart; nothing if the row that is compared with has not run."""
    found: dict[str, Any] = {"to_float64": {}, "engines": {}, "uint8": {}}
    checked = rows.get(CHECKED)
    if checked is None or checked.error:
        return found
    found["to_float64"] = checked.call("check") or {"error": checked.error}
    expected = checked.call("outputs")
    for name, process in rows.items():
        if process is checked or process.error or not ROWS[name].network:
            continue
        if (outputs := process.call("outputs")) is not None:
            found["engines"][name] = float(np.abs(outputs - expected).max())
        found["uint8"][name] = _grey_levels(setting, name)
    return found


def _grey_levels(setting: Setting, name: str) -> dict[str, float]:
    """How far a row's output layer is from that of PyTorch in float32, in grey levels."""
    from cloudvolume import CloudVolume

    one, other = (CloudVolume(setting.path("volume", row), progress=False) for row in (name, CHECKED))
    most, total, depth = 0, 0, setting.patch[0]
    for z in range(0, setting.volume[0], depth):
        planes = slice(z, min(z + depth, setting.volume[0]))
        apart = np.abs(np.asarray(one[:, :, planes], np.int16) - np.asarray(other[:, :, planes], np.int16))
        most, total = max(most, int(apart.max())), total + int(apart.sum())
    return {"largest": most, "mean": total / (CHANNELS * Box((0, 0, 0), setting.volume).voxels)}
