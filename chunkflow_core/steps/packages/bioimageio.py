"""Packages of bioimage.io, of the versions 0.4 and 0.5 of its model description.

https://bioimage-io.github.io/spec-bioimage-io/
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.errors import SpecError
from chunkflow_core.steps.packages.package import (
    Package,
    Section,
    TestTensors,
    chosen,
    content_of,
    dimensions_of,
    existing,
    geometry,
    reading,
)
from chunkflow_core.steps.packages.values import Normalisation, Values

_NAMES = ("rdf.yaml", "bioimageio.yaml", "rdf.yml")
_FORMATS = ("torchscript", "onnx", "pytorch_state_dict")
_LETTERS = {"batch": "b", "channel": "c", "index": "i", "time": "t"}


@dataclass(frozen=True)
class _Tensor:
    """An input or output, whichever version describes it."""

    name: str
    axes: str
    """One letter an axis, such as ``bczyx``."""
    halo: tuple[int, ...]
    """What is to be cropped on each side of the axes z, y, x, or y, x."""
    steps: list[tuple[str, Section]]
    """Name and arguments of what is done before or after the network."""
    file: Path
    """Its test tensor."""

    @property
    def test(self) -> NDArray[Any]:
        """The test tensor, not read yet."""
        array: NDArray[Any] = np.load(self.file, mmap_mode="r", allow_pickle=False)
        if array.ndim != len(self.axes) or self.axes not in ("bczyx", "bcyx"):
            raise ValueError(
                f"the tensor {self.name} has the axes {self.axes} and the shape {array.shape}, expected bczyx or bcyx; "
                "a .py file with pre_process and post_process can turn them"
            )
        return array


def found(path: Path) -> Path | None:
    """The description in a folder, or the file itself if it is one; None if it is none."""
    for file in [path / name for name in _NAMES] if path.is_dir() else [path]:
        if file.suffix in (".yaml", ".yml") and file.is_file():
            content = content_of(file)
            if content.get("type") == "model" or {"inputs", "outputs", "weights"} <= content.keys():
                return file
    return None


def read(file: Path, weights: str | None) -> Package:
    """What a package says; ``weights`` is one of its formats.

    Errors are those of ``read_package``.
    """
    content = content_of(file)
    with reading(file, "bioimage.io model"):
        (given, *more), (result, *others) = _tensors(file, content, "input"), _tensors(file, content, "output")
        if more:
            raise ValueError(f"the network takes {len(more) + 1} inputs, expected one")
        notes = []
        kinds = {name: content["weights"][name] for name in _FORMATS if content["weights"].get(name)}
        kind = chosen(kinds, weights, file)
        shape, expected = given.test.shape, result.test
        model = _model(file, kind, kinds[kind]) | dimensions_of(shape[2:])
        values = _values(f"{file}: preprocessing of {given.name}", given, shape)
        activation, rest = _activation(result.steps)
        if activation:
            model["activation"] = activation
        if rest:
            notes.append(f"Not done: {', '.join(rest)}, which the package does after the network.")
        if others:
            model["output"] = 0
            notes.append(f"The network also gives {', '.join(other.name for other in others)} (model.output).")
        output = {"channels": expected.shape[1]} | _range(expected, activation, notes)
        size = [n - 2 * halo for n, halo in zip(expected.shape[2:], result.halo, strict=True)]
        sections = {"input": {"values": values}, "model": model, "output": output}
        sections |= geometry(shape[2:], output=size, overlap=0.25)
        notes.append("patch_size is that of the test tensors, patch_overlap a quarter of it; others may do as well.")
        tests = None if rest else _tests(content, kind, given, result)
        return Package(f"bioimage.io package {file.parent}", sections, tuple(notes), tests)


def _tensors(file: Path, content: Section, side: str) -> list[_Tensor]:
    """The inputs or outputs."""
    key = {"input": "preprocessing", "output": "postprocessing"}[side]
    tensors = []
    for index, told in enumerate(content[f"{side}s"]):
        steps = [(step.get("id") or step["name"], step.get("kwargs") or {}) for step in told.get(key) or []]
        if isinstance(told["axes"], str):  # version 0.4
            axes, halo = told["axes"], dict(zip(told["axes"], told.get("halo") or [], strict=False))
            name, source = told["name"], content[f"test_{side}s"][index]
        else:
            letters = [_LETTERS.get(axis["type"]) or axis.get("id", "?") for axis in told["axes"]]
            axes, name, source = "".join(letters), told["id"], told["test_tensor"]
            halo = {letter: axis.get("halo", 0) for letter, axis in zip(letters, told["axes"], strict=True)}
        cropped = tuple(int(halo.get(letter, 0)) for letter in axes if letter in "zyx")
        tensors.append(_Tensor(str(name), axes, cropped, steps, _file(file, source)))
    return tensors


def _file(file: Path, source: Any) -> Path:
    """A file of the package."""
    name = source["source"] if isinstance(source, dict) else source
    if "://" in str(name):
        raise SpecError(f"{file}: names {name}; download the whole package from bioimage.io, and unpack it")
    return existing(file.parent / str(name), file)


def _model(file: Path, kind: str, entry: Section) -> Section:
    """The keys that name network and weights."""
    source = str(_file(file, entry["source"]))
    if kind != "pytorch_state_dict":
        return {"engine": "onnx" if kind == "onnx" else "pytorch", "path": source}
    architecture, arguments = entry["architecture"], entry.get("kwargs") or {}
    if isinstance(architecture, dict):  # version 0.5
        arguments, name = architecture.get("kwargs") or {}, architecture["callable"]
        place = {"path": str(_file(file, architecture["source"]))} if "source" in architecture else {}
        name = name if place else f"{architecture['import_from']}.{name}"
    elif ":" in architecture:
        code, _, name = architecture.rpartition(":")
        place = {"path": str(_file(file, code))}
    else:
        place, name = {}, architecture
    keys: Section = {"engine": "pytorch"} | place | {"network": name}
    return keys | ({"arguments": arguments} if arguments else {}) | {"weights": source}


def _activation(steps: list[tuple[str, Section]]) -> tuple[str | None, list[str]]:
    """The activation among the steps after a network, and what else they do."""
    names = [name for name, _ in steps if name != "ensure_dtype"]
    if names and names[0] in ("sigmoid", "softmax"):
        return names[0], names[1:]
    return None, names


def _range(expected: NDArray[Any], activation: str | None, notes: list[str]) -> Section:
    """The key ``output.range`` and its dtype, if the default ones do not hold the numbers."""
    low, high = float(np.min(expected)), float(np.max(expected))
    if activation or (low >= 0 and high <= 1):
        return {}
    bound = 2.0 ** math.ceil(math.log2(2 * max(-low, high)))
    notes.append(f"output.range holds twice what the test tensor has ({low:.3g} to {high:.3g}).")
    return {"dtype": "float32", "range": [-bound if low < 0 else 0.0, bound]}


def _tests(content: Section, kind: str, given: _Tensor, result: _Tensor) -> TestTensors:
    """The test tensors, and how near the package says that its output is reproduced."""
    config = (content.get("config") or {}).get("bioimageio") or {}
    tolerance: Section = (config.get("test_kwargs") or {}).get(kind) or {}
    for entry in config.get("reproducibility_tolerance") or []:
        if kind in (entry.get("weights_formats") or [kind]) and result.name in (
            entry.get("output_ids") or [result.name]
        ):
            tolerance = entry
            break
    relative = float(tolerance.get("relative_tolerance", 1e-3))
    absolute = float(tolerance.get("absolute_tolerance", 1e-3))
    if "decimal" in tolerance:
        relative, absolute = 0.0, 1.5 * 10.0 ** -int(tolerance["decimal"])
    mismatches = float(tolerance.get("mismatched_elements_per_million", 100))
    return TestTensors(given.file, result.file, relative, absolute, mismatches)


def _values(where: str, tensor: _Tensor, shape: tuple[int, ...]) -> Values:
    """``input.values`` for the steps before a network."""
    values = Normalisation(where)
    for name, arguments in tensor.steps:
        if name not in _STEPS:
            raise values.unfit(name)
        _STEPS[name](values, arguments, tensor, shape)
    return values.values


def _linear(values: Normalisation, arguments: Section, _tensor: _Tensor, _shape: tuple[int, ...]) -> None:
    values.linear(arguments.get("gain", 1.0), arguments.get("offset", 0.0), "scale_linear")


def _fixed(values: Normalisation, arguments: Section, _tensor: _Tensor, _shape: tuple[int, ...]) -> None:
    values.fixed(arguments["mean"], arguments["std"])


def _zero_mean(values: Normalisation, arguments: Section, tensor: _Tensor, shape: tuple[int, ...]) -> None:
    if arguments.get("mode") == "fixed":
        _fixed(values, arguments, tensor, shape)
        return
    _check_axes(values, arguments, tensor, shape)
    values.measured({"mean": "measured", "std": "measured"} | _measured_of(tensor), "zero_mean_unit_variance")


def _scale_range(values: Normalisation, arguments: Section, tensor: _Tensor, shape: tuple[int, ...]) -> None:
    _check_axes(values, arguments, tensor, shape)
    if arguments.get("reference_tensor") not in (None, tensor.name):
        raise values.unfit("scale_range by another tensor")
    percentiles = [arguments.get("min_percentile", 0.0), arguments.get("max_percentile", 100.0)]
    values.measured({"percentiles": percentiles} | _measured_of(tensor), "scale_range")


def _clip(values: Normalisation, arguments: Section, _tensor: _Tensor, _shape: tuple[int, ...]) -> None:
    values.clip(arguments["min"], arguments["max"])


def _ensure_dtype(values: Normalisation, arguments: Section, _tensor: _Tensor, _shape: tuple[int, ...]) -> None:
    if not str(arguments.get("dtype", "float32")).startswith("float"):
        raise values.unfit(f"ensure_dtype {arguments['dtype']}")


def _measured_of(tensor: _Tensor) -> Section:
    """What is measured counts all voxels of an image, which is a section for flat networks."""
    return ({} if "z" in tensor.axes else {"per_section": True}) | {"count_zeros": True}


def _check_axes(values: Normalisation, arguments: Section, tensor: _Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is not measured over the whole of each channel."""
    told = arguments.get("axes")
    axes = {"c" if axis == "channel" else axis for axis in (told if told is not None else tensor.axes)} - {"b", "batch"}
    space = set(tensor.axes) & set("zyx")
    if axes - {"c"} != space or ("c" in axes and shape[1] > 1):
        raise values.unfit(f"measuring over the axes {told}")


_STEPS: dict[str, Callable[[Normalisation, Section, _Tensor, tuple[int, ...]], None]] = {
    "scale_linear": _linear,
    "fixed_zero_mean_unit_variance": _fixed,
    "zero_mean_unit_variance": _zero_mean,
    "scale_range": _scale_range,
    "clip": _clip,
    "ensure_dtype": _ensure_dtype,
}
