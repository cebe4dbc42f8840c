"""The fastest engine and setting for a model on this machine, and how far its numbers are off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import PurePath
from time import perf_counter
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from chunkflow_core.engines import load_engine
from chunkflow_core.engines.base import Engine, cpu_streams
from chunkflow_core.errors import ChunkflowError, DataError, UsageError
from chunkflow_core.lattice.boxes import vector
from chunkflow_core.machine import available_cpus
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.steps.workspace import Workspace

Patch = NDArray[np.float32]

ENGINES = ("pytorch", "openvino", "onnx")
"""Engines that can be chosen between; a net of pznet can only be run by pznet."""

ROUNDS = 3
"""Number of times that each candidate runs the patches.

The fastest counts, as whatever else runs can only slow it down.
"""


@dataclass(frozen=True)
class Setting:
    """One way to run the model."""

    engine: str
    precision: str
    threads: int
    streams: int
    compile: bool = False

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the spec's section ``model`` that choose this setting."""
        keys = {"engine": self.engine, "precision": self.precision, "threads": self.threads}
        return keys | ({"compile": True} if self.compile else {})

    def spec(self, spec: VolumeSpec) -> VolumeSpec:
        """The spec with this setting; ``SpecError`` if its model can't be run so."""
        content = spec.model_dump()
        content["model"] |= self.keys | {"streams": self.streams, "compile": self.compile}
        return parse_spec(content, source=f"engine {self.engine}", folder=spec.folder)


@dataclass(frozen=True)
class Measurement:
    """How a setting did."""

    setting: Setting
    seconds: float | None = None
    """Seconds per patch; None if the setting did not run."""
    difference: float | None = None
    """Largest difference to the reference, of any voxel of any patch."""
    reason: str = ""
    """Why the setting did not run."""


def settings(spec: VolumeSpec, engines: Sequence[str]) -> list[Setting]:
    """The reference, and then all settings that may be tried here for the spec's model.

    The reference is PyTorch in float32 where the model is one of PyTorch, else the spec's own
    engine in float32.

    Raises:
        UsageError: None of the engines runs the model.
    """
    able = _able(spec)
    chosen = [engine for engine in able if engine in engines or able == (spec.model.engine,)]
    if not chosen:
        raise UsageError(f"--engines {','.join(engines)}: {spec.model.title} can be run by {', '.join(able)}")
    on_gpu = spec.model.device != "cpu" and _has_gpu()
    splits = [(spec.model.threads, 1)] if on_gpu or able == ("pznet",) else _splits()
    reference = Setting("pytorch" if "pytorch" in able else spec.model.engine, "float32", *splits[0])
    found = [reference]
    for engine in chosen:
        for precision in _precisions(engine, on_gpu=on_gpu):
            found += [Setting(engine, precision, *split) for split in splits]
            if engine == "pytorch" and (spec.model.network or str(spec.model.path).endswith(".py")):
                found.append(Setting(engine, precision, *splits[0], compile=True))
    own = Setting(spec.model.engine, spec.model.precision, *_own_split(spec, on_gpu=on_gpu), compile=spec.model.compile)
    return list(dict.fromkeys([*found, own]))


def measure(
    spec: VolumeSpec, candidates: Sequence[Setting], patches: Sequence[Patch], step_done: Callable[[], object]
) -> list[Measurement]:
    """Run patches through candidates, in turns, so that what else the machine does falls on all.

    Args:
        spec: The volume.
        candidates: The first is the reference, which has to run; of others is told why they don't.
        patches: Float32 ``(channels, z, y, x)``.
        step_done: Called after each step of ``steps(candidates)``.

    Raises:
        ChunkflowError: The reference can't be run, or gives no numbers.
    """
    engines: dict[Setting, Engine] = {}
    results: dict[Setting, Measurement] = {}
    expected: list[Patch] = []
    for setting in candidates:
        try:
            engine = load_engine(setting.spec(spec))
            given = _run(engine, patches)
        except Exception as error:  # whatever keeps one from running is no reason not to try the others
            if setting == candidates[0]:
                raise
            told = str(error) if isinstance(error, ChunkflowError) else f"{type(error).__name__}: {error}"
            results[setting] = Measurement(setting, reason=" ".join(told.split()))
        else:
            expected = expected or _finite(given)
            engines[setting] = engine
            difference = float(np.max([np.abs(a - b).max() for a, b in zip(given, expected, strict=True)]))
            results[setting] = Measurement(replace(setting, streams=engine.streams), difference=difference)
        step_done()
    for _ in range(ROUNDS):
        for setting, result in results.items():
            if setting in engines:
                seconds = _seconds(engines[setting], patches)
                results[setting] = replace(result, seconds=min(seconds, result.seconds or seconds))
            step_done()
    return list(results.values())


def steps(candidates: Sequence[Setting]) -> int:
    """Number of steps that :func:`measure` takes."""
    return len(candidates) * (1 + ROUNDS)


def fastest(measurements: Iterable[Measurement], tolerance: float) -> Measurement:
    """The fastest setting whose numbers differ from the reference's by at most ``tolerance``.

    The reference itself is one.
    """
    near = [m for m in measurements if m.seconds and m.difference is not None and m.difference <= tolerance]
    return min(near, key=lambda m: m.seconds or 0.0)


def sample(spec: VolumeSpec, count: int) -> list[Patch]:
    """Input patches from all over the ROI, float32 ``(channels, z, y, x)``, as inference gets them.

    Raises:
        MissingInputError, StorageError: The input layer can't be read.
    """
    workspace, shape = Workspace(spec), vector(axis.count for axis in spec.grid.axes)
    taken = []
    for number in range(count):
        index = int((number + 0.5) / count * prod(shape))
        z, y, x = (int(i) for i in np.unravel_index(index, shape))
        taken.append(workspace.inference.take((z, y, x)))
    return taken


def table(measurements: Sequence[Measurement], best: Measurement) -> list[str]:
    """A table of measurements for a terminal, line by line."""
    reference = measurements[0].seconds
    assert reference is not None
    rows = [("", "engine", "precision", "threads × streams", "s/patch", "speed-up", "difference")]
    for m in measurements:
        engine = f"{m.setting.engine} compiled" if m.setting.compile else m.setting.engine
        start = ("►" if m is best else "", engine, m.setting.precision, f"{m.setting.threads} × {m.setting.streams}")
        if m.seconds is None or m.difference is None:
            rows.append((*start, "–", "–", m.reason))
        else:
            rows.append((*start, f"{m.seconds:.4f}", f"{reference / m.seconds:.2f}", f"{m.difference:.1e}"))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[6]]) for row in rows]


def spec_lines(setting: Setting) -> str:
    """The lines to write into the spec for a setting."""
    return yaml.safe_dump({"model": setting.keys}, sort_keys=False).rstrip()


def _able(spec: VolumeSpec) -> tuple[str, ...]:
    """The engines that take a model file of this kind."""
    if spec.model.engine not in ENGINES:
        return (spec.model.engine,)
    suffix = PurePath(spec.model.path or "").suffix.lower()
    return {".onnx": ("onnx", "openvino"), ".xml": ("openvino",)}.get(suffix, ("pytorch", "openvino"))


def _splits() -> list[tuple[int, int]]:
    """Threads and streams: a patch for every CPU, or all CPUs for the same one."""
    cpus = available_cpus()
    return [(1, cpus), (cpus, 1)] if cpus > 1 else [(1, 1)]


def _own_split(spec: VolumeSpec, *, on_gpu: bool) -> tuple[int, int]:
    return spec.model.threads, 1 if on_gpu or spec.model.engine == "pznet" else cpu_streams(spec)


def _precisions(engine: str, *, on_gpu: bool) -> tuple[str, ...]:
    if engine in ("identity", "pznet", "onnx"):
        return ("float32",)
    return ("float32", "bfloat16", "float16") if on_gpu else ("float32", "bfloat16")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(engine: Engine, patches: Sequence[Patch]) -> list[Patch]:
    """Outputs of the patches, run as many at a time as the engine takes.

    A short last batch is filled up.
    """
    size = engine.batch_size
    batches = []
    for start in range(0, len(patches), size):
        batch = np.zeros((size, *patches[0].shape), np.float32)
        for slot, patch in zip(batch, patches[start : start + size], strict=False):
            slot[:] = patch
        batches.append(batch)
    with ThreadPoolExecutor(engine.streams) as pool:
        outputs = [output for batch in pool.map(engine, batches) for output in batch]
    return outputs[: len(patches)]


def _seconds(engine: Engine, patches: Sequence[Patch]) -> float:
    """Seconds per patch, with all streams busy to the end."""
    together = engine.streams * engine.batch_size
    count = -(-len(patches) // together) * together
    repeated = [patches[number % len(patches)] for number in range(count)]
    start = perf_counter()
    _run(engine, repeated)
    return (perf_counter() - start) / count


def _finite(outputs: list[Patch]) -> list[Patch]:
    if not all(np.isfinite(output).all() for output in outputs):
        raise DataError("the model gives NaN or infinity in float32 already: there is nothing to compare with")
    return outputs
