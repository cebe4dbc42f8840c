"""Turns PyTorch networks into OpenVINO's format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray

from chunkflow_core.engines.base import network_shape
from chunkflow_core.engines.failures import is_of_the_machine, told
from chunkflow_core.engines.networks import Model, load_model
from chunkflow_core.engines.outputs import select
from chunkflow_core.engines.settings import held
from chunkflow_core.errors import ChunkflowError, SpecError
from chunkflow_core.spec import VolumeSpec

Structure = dict[str, Any]
"""How a network's outputs were put together.

They are a ``single`` tensor, or a list of a ``length``, or a dict of ``keys``; ``tensors`` are the
positions of those parts that are tensors.
"""

_TOLERANCE = 1e-3
"""Largest difference to PyTorch, relative to the largest output, that rounding could explain."""


class _Flat(torch.nn.Module):
    """A network whose outputs are a tuple of tensors."""

    def __init__(self, spec: VolumeSpec, model: Model) -> None:
        super().__init__()
        self._spec, self._network = spec, model.network
        self._is_whole = model.post_process is not None  # which may want all of the outputs
        self.structure: Structure = {}
        """Structure of the outputs, for a ``post_process``; known after the first call."""

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self._network(patches)
        if not self._is_whole:
            return (select(output, self._spec),)
        keys = list(output) if isinstance(output, Mapping) else None
        single = isinstance(output, torch.Tensor)
        parts = [output] if single else list(output.values() if isinstance(output, Mapping) else output)
        tensors = [index for index, part in enumerate(parts) if isinstance(part, torch.Tensor)]
        self.structure = {"keys": keys, "single": single, "length": len(parts), "tensors": tensors}
        return tuple(parts[index] for index in tensors)


class Around:
    """The functions of a model file that are called before and after its network."""

    def __init__(self, spec: VolumeSpec, structure: Structure) -> None:
        """Load the model of a spec, on CPUs, for its ``pre_process`` and ``post_process``.

        Args:
            spec: The volume.
            structure: How the outputs are put together for ``post_process``.
        """
        self._spec, self._structure = spec, structure
        self._model = load_model(spec, torch.device("cpu"))

    def before(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        """What goes into the network for a patch: float32, contiguous."""
        if self._model.pre_process is None:
            return patch
        with held(self._spec):
            return np.ascontiguousarray(self._model.pre_process(patch.copy()), np.float32)

    def after(self, outputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The output that the spec names, given those of the converted network."""
        if self._model.post_process is None:  # then the selected one is the only one
            return outputs[0]
        with held(self._spec), torch.inference_mode():
            value = self._model.post_process(self._put_together([torch.from_numpy(output) for output in outputs]))
            output = select(value, self._spec)
            return np.asarray(output.float() if isinstance(output, torch.Tensor) else output)  # numpy has no bfloat16

    def _put_together(self, tensors: Sequence[torch.Tensor]) -> Any:
        structure = self._structure
        if structure["single"]:
            return tensors[0]
        parts: list[Any] = [None] * structure["length"]
        for index, tensor in zip(structure["tensors"], tensors, strict=True):
            parts[index] = tensor
        return parts if structure["keys"] is None else dict(zip(structure["keys"], parts, strict=True))


def convert(spec: VolumeSpec, folder: Path) -> None:
    """Write the spec's PyTorch network to a folder, in OpenVINO's format.

    The files are ``network.xml``, ``network.bin`` and ``structure.json``.

    Raises:
        SpecError: The network can't be converted, or the result gives other numbers.
    """
    model = load_model(spec, torch.device("cpu"))
    if model.takes_numpy:
        raise SpecError("model.engine: openvino can't convert a PatchInferencer; the engine pytorch runs it")
    if model.dtype == torch.bfloat16:
        raise SpecError(
            f"model.engine: openvino can't convert {spec.model.path}, which takes bfloat16, to what gives the same "
            "numbers: run it by pytorch, or convert its weights to float32 and set model.precision: bfloat16"
        )
    generator = np.random.default_rng(0)
    shape = network_shape(spec)
    example, other, dark = (generator.random(shape, np.float32) * np.float32(scale) for scale in (1, 1, 0.2))
    try:
        example, *others = (_prepared(model, patch) for patch in (example, other, dark))
        flat = _Flat(spec, model)
        network = openvino.convert_model(_traced(flat, torch.from_numpy(example)), input=[list(example.shape)])
        _check(spec, network, flat, others)
    except ChunkflowError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise SpecError(
            f"model.engine: openvino can't convert {spec.model.title}: {told(error, spec)}. The engine pytorch may "
            "run it"
        ) from error
    openvino.save_model(network, folder / "network.xml", compress_to_fp16=False)
    wrapped = model.pre_process is not None or model.post_process is not None
    (folder / "structure.json").write_text(json.dumps(flat.structure if wrapped else None))


def _prepared(model: Model, patch: NDArray[np.float32]) -> NDArray[np.float32]:
    return patch if model.pre_process is None else np.ascontiguousarray(model.pre_process(patch), np.float32)


def _traced(network: torch.nn.Module, example: torch.Tensor) -> Any:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a trace gets wrong is found by comparing
        return torch.jit.trace(network, example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]


def _check(spec: VolumeSpec, network: Any, flat: _Flat, patches: Sequence[NDArray[np.float32]]) -> None:
    """Compare with PyTorch on patches that were not traced.

    A trace is silent about branches that it did not take.
    """
    compiled = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for patch in patches:
        given = compiled([patch])
        with torch.inference_mode():
            expected = [tensor.float().numpy() for tensor in flat(torch.from_numpy(patch.copy()))]
        for index, wanted in enumerate(expected):
            differs = given[index] != wanted  # an infinite number has no difference to itself
            difference = float(np.abs(given[index][differs] - wanted[differs]).max(initial=0))
            if not difference <= _TOLERANCE * float(np.abs(wanted[np.isfinite(wanted)]).max(initial=1)):
                raise SpecError(
                    f"model.engine: openvino, but {spec.model.title} gives other numbers when it is converted (by up "
                    f"to {difference:.3g}): it may decide by the content of a patch. The engine pytorch runs it as it "
                    "is"
                )
