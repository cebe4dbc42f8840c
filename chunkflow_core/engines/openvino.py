"""OpenVINO, for CPUs: ``.xml`` (its own format), ``.onnx``, and PyTorch networks.

The latter are converted once, and kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine, cpu_streams, network_input, network_shape
from chunkflow_core.engines.element_types import BFLOAT16, cast, input_type, of_bfloat16
from chunkflow_core.engines.failures import is_of_the_machine, required, told
from chunkflow_core.engines.outputs import choose, each_by_itself, failed, finished
from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.model_files import cache_folder, made_once

# OpenVINO reports each conversion to its makers, by processes forked from this one, unless it finds
# no package to do so.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

_FORMATS = (".xml", ".onnx")
"""Extensions of the files that OpenVINO reads by itself."""

_PRECISIONS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}
"""OpenVINO's hint for each precision, and the name of the capability that CPUs have to have."""


class OpenVINO(Engine):
    """A network on this machine's CPUs; each calling thread has a request of its own."""

    def __init__(self, spec: VolumeSpec, compiled: Any, output: int, around: Any) -> None:
        """Take a network.

        Args:
            spec: The volume.
            compiled: Network with a single input, for one patch.
            output: Index of the output to take.
            around: What of the model file is called before and after the network
                (``tracing.Around``); None if nothing.

        Raises:
            SpecError: The network's input is of a type in which the spec's numbers can't be given.
        """
        self._spec, self._compiled, self._output, self._around = spec, compiled, output, around
        self._dtype = input_type(spec, _numpy_name(compiled.input()))
        self._thread = threading.local()
        self.streams = cpu_streams(spec)

    @property
    def description(self) -> dict[str, Any]:
        """Version of OpenVINO, device, and threads."""
        return {"openvino": version("openvino"), "device": "cpu", "threads": self._spec.model.threads}

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the patches of a batch one at a time; see ``Engine.__call__``."""
        return each_by_itself(self._one, patches)

    def _one(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            given = network_input(patch, self._spec)
            given = self._around.before(given) if self._around else given
            request = self._request()
            request.infer([self._tensor(cast(given, self._dtype))])
            if self._around:
                output = self._around.after([np.array(tensor.data) for tensor in request.output_tensors])
            else:
                output = _numbers(request.get_output_tensor(self._output))
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise failed(told(error, self._spec), patch.shape) from error
        return finished(output, self._spec, 1)

    def _tensor(self, given: NDArray[Any]) -> Any:
        """What goes into the network: an array, or a tensor where numpy lacks the type."""
        if self._dtype != BFLOAT16:
            return given
        openvino = required("openvino", "openvino")
        return openvino.Tensor(given, given.shape, openvino.Type.bf16)

    def _request(self) -> Any:
        if not hasattr(self._thread, "request"):
            self._thread.request = self._compiled.create_infer_request()
        return self._thread.request


def _numbers(tensor: Any) -> NDArray[Any]:
    """The numbers of a tensor, in memory that it may share."""
    data: NDArray[Any] = tensor.data
    # OpenVINO gives the bits of bfloat16 as those of float16
    return of_bfloat16(data.view(np.uint16)) if _numpy_name(tensor) == BFLOAT16 else data


def load(spec: VolumeSpec) -> OpenVINO:
    """The engine for a spec; errors as ``load_engine``."""
    openvino = required("openvino", "openvino")
    path = spec.model_path(spec.model.path) if spec.model.path else None
    core = openvino.Core()
    # What makes arrays of tensors is set up at its first use, and threads that begin with it at the
    # same time wait for each other for ever.
    _ = openvino.Tensor(np.zeros(1, np.float32)).data
    hint = _precision(spec, core)
    converted = None if path is not None and path.suffix.lower() in _FORMATS else _converted(spec)
    file = path if converted is None else converted.network
    try:
        model = core.read_model(file)
        if converted is None:
            _fix_shape(spec, model)
        streams = cpu_streams(spec)
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * spec.model.threads,
            "ENABLE_CPU_PINNING": False,  # processes that share the machine would be pinned to the same CPUs
        }
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        if is_of_the_machine(error):
            raise
        raise SpecError(f"model.path: {file} can't be loaded by OpenVINO: {told(error, spec)}") from error
    if converted is None:
        return OpenVINO(spec, compiled, _output(spec, compiled), None)
    return OpenVINO(spec, compiled, 0, _around(spec, converted) if converted.is_wrapped else None)


def _precision(spec: VolumeSpec, core: Any) -> str:
    hint, ability = _PRECISIONS[spec.model.precision]
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if ability not in able:  # OpenVINO would compute in float32 and not say so
        known = [name for name, (_, other) in _PRECISIONS.items() if other in able]
        raise SpecError(
            f"model.precision: {spec.model.precision}: this machine's CPU can't compute in it, expected one of "
            f"{', '.join(known)}"
        )
    return hint


def _fix_shape(spec: VolumeSpec, model: Any) -> None:
    """Give the network the shape of a patch: what is static is faster, and found wrong at once."""
    if len(model.inputs) != 1:
        raise SpecError(f"model.path: {spec.model.path} has {len(model.inputs)} inputs, expected a network with one")
    shape = network_shape(spec)
    try:
        model.reshape(list(shape))
    except RuntimeError as error:
        own = model.input().get_partial_shape()
        flat = "; for a network of two dimensions: model.dimensions: 2" if own.rank == 4 and len(shape) == 5 else ""
        raise SpecError(
            f"model.path: {spec.model.path} does not take patches of shape {shape} (batch, input channels, z, y, x of "
            f"patch_size), its input is {own}: {told(error, spec)}{flat}"
        ) from error


def _numpy_name(port: Any) -> str:
    """Numpy's name of an element type, of a port or tensor, or OpenVINO's where numpy has none."""
    name = str(port.get_element_type().get_type_name())  # to_dtype would take bf16 for float16, and u4 for uint8
    if name == "bf16":
        return BFLOAT16
    match = re.fullmatch(r"([fiu])(8|16|32|64)", name)
    return {"f": "float", "i": "int", "u": "uint"}[match[1]] + match[2] if match else name


def _output(spec: VolumeSpec, compiled: Any) -> int:
    outputs = []
    for port in compiled.outputs:
        shape = port.get_partial_shape()
        static = not shape.rank.is_dynamic and len(shape) == 2 + spec.model.dimensions and not shape[1].is_dynamic
        outputs.append((port.get_names(), shape[1].get_length() if static else None))
    return choose(outputs, spec)


@dataclass(frozen=True)
class _Converted:
    """A PyTorch network in OpenVINO's format, in the cache."""

    folder: Path

    @property
    def network(self) -> Path:
        return self.folder / "network.xml"

    @property
    def structure(self) -> Any:
        """How the network's outputs are put together; None if the selected one is the only one."""
        return json.loads((self.folder / "structure.json").read_text())

    @property
    def is_wrapped(self) -> bool:
        return self.structure is not None


def _converted(spec: VolumeSpec) -> _Converted:
    """The spec's PyTorch network for OpenVINO.

    PyTorch is needed only to convert it, its first time on this machine.
    """
    return _Converted(made_once(cache_folder("openvino") / _digest(spec), lambda folder: _convert(spec, folder)))


def _convert(spec: VolumeSpec, folder: Path) -> None:
    from chunkflow_core.engines.tracing import convert

    convert(spec, folder)


def _around(spec: VolumeSpec, converted: _Converted) -> Any:
    from chunkflow_core.engines.tracing import Around

    return Around(spec, converted.structure)


def _digest(spec: VolumeSpec) -> str:
    """Hash of all that decides what a conversion gives."""
    facts = {
        "format": 2,
        "versions": [version("openvino"), version("torch")],
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in spec.model_files],
        "patch": network_shape(spec),
        "output": [spec.model.output, spec.output.channels, *([spec.model.channels] if spec.model.channels else [])],
        "network": [spec.model.network, spec.model.arguments],
        "weights_key": spec.model.weights_key,
        "batch_statistics": spec.model.batch_statistics,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
