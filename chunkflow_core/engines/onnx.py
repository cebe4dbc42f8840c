"""ONNX Runtime: ``.onnx`` files, on CPUs or, with ``onnxruntime-gpu``, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine, cpu_streams, network_input, network_shape
from chunkflow_core.engines.element_types import BFLOAT16, cast, input_type
from chunkflow_core.engines.failures import is_of_the_machine, required, told
from chunkflow_core.engines.gpu import claim
from chunkflow_core.engines.outputs import choose, each_by_itself, failed, finished
from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

_NO_CPU = "session.disable_cpu_ep_fallback"
"""Setting of a session with which it refuses a network that it can't run on the GPU as a whole."""
_IS_NO_CPU = "fallback to CPU EP has been explicitly disabled"
"""What ONNX Runtime says of such a network."""
_NOT_STARTED = (
    "could not be started: a library of NVIDIA's is missing or of another version. ONNX Runtime's log says which"
)

_BFLOAT16 = 16
"""Number of the type in the format (``TensorProto.BFLOAT16``)."""

Provider = tuple[str, dict[str, Any]]


class ONNX(Engine):
    """A network in a session of ONNX Runtime, shared by the threads of the caller."""

    def __init__(self, spec: VolumeSpec, session: Any, version: str) -> None:
        """Take a session.

        Args:
            spec: The volume.
            session: An ``onnxruntime.InferenceSession`` with a single input.
            version: Version of ONNX Runtime.

        Raises:
            SpecError: The network has several inputs, or not the output that the spec says, or its
                input is not what the spec gives.
        """
        self._spec, self._session, self._version = spec, session, version
        given = _single_input(spec, session)
        self._input, self._dtype = given.name, input_type(spec, _numpy_name(given.type))
        self._batch_size = _fixed_batch(spec, given.shape)
        outputs = session.get_outputs()
        names = [({output.name}, _channels(output.shape, spec)) for output in outputs]
        output = outputs[choose(names, spec)]
        if _numpy_name(output.type) == BFLOAT16:
            raise SpecError(
                f"model.path: {spec.model.path} gives {BFLOAT16}, which ONNX Runtime does not hand over: cast its "
                f"output {output.name} to float32 in the file, or run it by openvino"
            )
        self._output = output.name
        if session.get_providers()[0] == _CPU:
            self.streams = cpu_streams(spec)

    @property
    def description(self) -> dict[str, Any]:
        """Version of ONNX Runtime, its execution provider, and threads."""
        provider = self._session.get_providers()[0]
        return {"onnxruntime": self._version, "device": provider, "threads": self._spec.model.threads}

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the patches of a batch one at a time; see ``Engine.__call__``."""
        return each_by_itself(self._one, patches)

    def _one(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a patch; a batch whose size is fixed in the file is filled up with copies of it."""
        try:
            batch = np.repeat(cast(network_input(patches, self._spec), self._dtype), self._batch_size, axis=0)
            given = _of_bits(batch) if self._dtype == BFLOAT16 else batch
            (output,) = self._session.run([self._output], {self._input: given})
            output = output[: len(output) // self._batch_size]
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise failed(told(error, self._spec), patches.shape) from error
        return finished(output, self._spec, len(patches))


def _of_bits(bits: NDArray[Any]) -> Any:
    """A value of ONNX Runtime's in bfloat16, of the bits of its numbers."""
    return required("onnxruntime", "onnx").OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)


def load(spec: VolumeSpec) -> ONNX:
    """The engine for a spec; errors as ``load_engine``."""
    if spec.model.precision != "float32":
        raise SpecError(
            f"model.precision: {spec.model.precision}: the precision of an ONNX file is in the file, expected float32. "
            "TensorRT, which could choose another, picks its kernels by the time that they take, so that each machine "
            "would give other bits. Convert the file, or run the network by pytorch or openvino"
        )
    runtime = required("onnxruntime", "onnx")
    providers = _providers(spec, runtime.get_available_providers())
    assert spec.model.path is not None
    path = spec.model_path(spec.model.path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec.model.threads, 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; they are raised too
    if _CPU not in dict(providers):
        options.add_session_config_entry(_NO_CPU, "1")
    try:
        # without ONNX Runtime's own fallback, which tries other settings and says nothing
        session = runtime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        if _IS_NO_CPU in str(error):
            raise SpecError(
                f"model.device: cuda, but ONNX Runtime would run layers of {path} on CPUs: its provider for the GPU "
                f"does not know them, or {_NOT_STARTED}. model.device: auto lets single layers run on CPUs"
            ) from error
        raise SpecError(f"model.path: {path} can't be loaded by ONNX Runtime: {told(error, spec)}") from error
    if session.get_providers()[0] != providers[0][0]:
        raise SpecError(
            f"model.device: {spec.model.device}: there is a GPU, but ONNX Runtime's provider for it {_NOT_STARTED}. "
            "model.device: cpu does without the GPU"
        )
    return ONNX(spec, session, runtime.__version__)


def _providers(spec: VolumeSpec, available: list[str]) -> list[Provider]:
    """The execution providers that may run the network's layers, the preferred one first.

    With ``device: cuda`` that is the GPU's only. TensorRT is none: it chooses among its kernels by
    the time that they take, and in float32 also rounds to TensorFloat-32.
    """
    count = _gpus() if _CUDA in available and spec.model.device != "cpu" else 0
    if spec.model.device == "cuda" and not count:
        raise SpecError(
            f"model.device: cuda, but ONNX Runtime has no GPU here (its providers: {', '.join(available)}); install "
            "onnxruntime-gpu where there is one, or use auto or cpu"
        )
    cpu: list[Provider] = [(_CPU, {})]
    if not count:
        return cpu
    # searching would choose by time taken, another algorithm in another process
    settings = {"device_id": claim(count), "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    return [(_CUDA, settings)] if spec.model.device == "cuda" else [(_CUDA, settings), *cpu]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _single_input(spec: VolumeSpec, session: Any) -> Any:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise SpecError(f"model.path: {spec.model.path} has {len(inputs)} inputs, expected a network with one")
    return inputs[0]


def _numpy_name(declared: str) -> str:
    """Numpy's name of an element type, of ONNX Runtime's, such as ``tensor(float)``."""
    name = declared.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _fixed_batch(spec: VolumeSpec, shape: list[Any]) -> int:
    """Number of patches that the network takes at a time: 1 where the file leaves it open.

    Raises:
        SpecError: The file fixes another shape of patches than the spec has.
    """
    _, *wanted = network_shape(spec)
    fixed = len(shape) == len(wanted) + 1 and all(
        not isinstance(n, int) or n == m for n, m in zip(shape[1:], wanted, strict=True)
    )
    if not fixed and shape:
        told = [n if isinstance(n, int) else "any" for n in shape]
        flat = "; for a network of two dimensions: model.dimensions: 2" if len(shape) == 4 < len(wanted) + 1 else ""
        raise SpecError(
            f"patch_size: {spec.model.path} takes {told}, the spec gives {['any', *wanted]} (batch, input channels, "
            f"z, y, x of patch_size){flat}"
        )
    return shape[0] if shape and isinstance(shape[0], int) else 1


def _channels(shape: list[Any], spec: VolumeSpec) -> int | None:
    return shape[1] if len(shape) == 2 + spec.model.dimensions and isinstance(shape[1], int) else None
