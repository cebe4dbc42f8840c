"""PyTorch: runs networks in any of the forms that ``networks`` loads, on CPUs or on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine, cpu_streams, network_input
from chunkflow_core.engines.element_types import check_half
from chunkflow_core.engines.failures import is_of_the_machine, told
from chunkflow_core.engines.gpu import claim
from chunkflow_core.engines.networks import Model, load_model
from chunkflow_core.engines.opened_files import first_patch_run
from chunkflow_core.engines.outputs import cropped, failed, select, taken
from chunkflow_core.engines.settings import held
from chunkflow_core.errors import SpecError
from chunkflow_core.machine import keep_large_arrays
from chunkflow_core.spec import VolumeSpec

_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class PyTorch(Engine):
    """A network on one device.

    On CPUs each patch is run by itself, in several threads of the caller at once.
    """

    def __init__(self, spec: VolumeSpec, device: torch.device, model: Model) -> None:
        """Take a model that is loaded.

        Args:
            spec: The volume.
            device: Device of the model.
            model: The network, and the functions around it.

        Raises:
            SpecError: The network can't be compiled, and the spec says that it has to be; or it
                takes other batches than the spec says.
        """
        self._spec, self._device, self._model, self._network = spec, device, model, model.network
        self._precision = _PRECISIONS.get(spec.model.precision)
        self._channels_last = False
        self._shortages = _shortages(device)
        on_gpu = device.type == "cuda"
        if on_gpu and not model.takes_numpy:
            if model.fixed_batch and model.fixed_batch % spec.model.batch_size:
                raise SpecError(
                    f"model.batch_size: {spec.model.batch_size}, but {spec.model.path} takes {model.fixed_batch} "
                    "patches at a time; expected a divisor of that"
                )
            self.batch_size, self.device = spec.model.batch_size, device
        elif (
            not on_gpu and not model.takes_numpy
        ):  # an object of the model file's own class may keep state between calls
            self.streams = cpu_streams(spec)
        if isinstance(model.network, torch.nn.Module) and (on_gpu or self._precision is not None):
            self._try_channels_last(model.network)
        if spec.model.compile:
            self._compile()

    @property
    def description(self) -> dict[str, Any]:
        """Versions of PyTorch and of what it uses, device, instruction set, and threads."""
        facts: dict[str, Any] = {"torch": torch.__version__, "device": "cpu", "threads": self._spec.model.threads}
        facts["instruction set"] = torch.backends.cpu.get_cpu_capability()
        if self._device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name(self._device)
            cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
            facts |= {"cuda": torch.version.cuda or "", "cudnn": cudnn or 0}
        return facts

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch, on CPUs one patch at a time; see ``Engine.__call__``."""
        batch = torch.from_numpy(patches)
        if self.device is not None:
            return _to_numpy(self.forward(batch.to(self.device)))
        outputs = [self.forward(batch[i : i + 1]) for i in range(len(batch))]
        return _to_numpy(outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Run a batch of tensors; see ``Engine.forward``."""
        try:
            output = self._run(patches)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise failed(told(error, self._spec), tuple(patches.shape)) from error
        with torch.inference_mode():
            tensor = torch.as_tensor(select(output, self._spec), device=self.device)
            if self._model.fixed_batch:  # filled up with copies
                tensor = tensor[: len(patches)]
            return self._finished(cropped(tensor, self._spec, len(patches)))

    def _finished(self, output: torch.Tensor) -> torch.Tensor:
        """An output activated, with the channels that are taken: float32, contiguous."""
        activation = self._spec.model.activation
        if activation == "softmax":
            output = torch.softmax(output.float(), dim=1)
        # no index tensor: a device would wait for it to come from the host
        tensor: torch.Tensor = taken(output, self._spec, torch.stack).float()
        return (torch.sigmoid(tensor) if activation == "sigmoid" else tensor).contiguous()

    def _run(self, patches: torch.Tensor) -> Any:
        if self._device.type == "cuda":  # this too is a matter of each thread, and model files may say just "cuda"
            torch.cuda.set_device(self._device)
        autocast = torch.autocast(self._device.type, self._precision, enabled=self._precision is not None)
        with held(self._spec), torch.inference_mode(), autocast:
            # a network may work in place, on memory that is the caller's; and is compiled again for
            # other strides
            own = network_input(patches, self._spec).clone(memory_format=torch.contiguous_format)
            prepared = self._prepared(own)
            output = self._network(prepared)
            output = self._model.post_process(output) if self._model.post_process else output
        self._check_memory()
        first_patch_run()
        return output

    def _check_memory(self) -> None:
        """Raise ``MemoryError`` if the GPU's memory has run short since the model was loaded.

        PyTorch says nothing where a convolution finds no room to work in: it tries other
        algorithms, which give other bits, and keeps to the one that does (``try_configs`` in its
        ``cudnn/Conv_v8.cpp``). So no later patch of this process can be trusted.
        """
        if _shortages(self._device) != self._shortages:
            raise MemoryError(
                "the GPU's memory has run short while the network ran, so that cuDNN may have taken another algorithm, "
                "which gives other bits: run fewer processes on the GPU, or smaller batches (model.batch_size)"
            )

    def _prepared(self, patches: torch.Tensor) -> Any:
        """What goes into the network.

        chunkflow hands ``pre_process`` a numpy array, and takes whatever the network likes.
        """
        if self._model.takes_numpy:
            return _to_numpy(patches)
        value: Any = patches
        if self._model.pre_process is not None:
            value = self._model.pre_process(_to_numpy(patches))
            value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            # one that was written for a CPU leaves it there, one for a GPU doesn't
            value = value.to(self._device) if isinstance(value, torch.Tensor) else value
        if self._model.dtype != torch.float32:
            value = self._cast(value)
        if self._model.fixed_batch:
            value = torch.cat([value] * (self._model.fixed_batch // len(value)))
        if self._channels_last and isinstance(value, torch.Tensor) and value.ndim == 5:
            value = value.contiguous(memory_format=torch.channels_last_3d)
        return value

    def _cast(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches in the type that the network declares; errors as ``element_types.cast``."""
        if self._model.dtype == torch.float16:
            check_half(float(patches.abs().max()))
        return patches.to(self._model.dtype)

    def _try_channels_last(self, network: torch.nn.Module) -> None:
        """Keep channels innermost in memory, which is faster here, if the network works with that.

        One that looks at the order in memory (``view``) does not, and then fails at the first patch
        already.
        """
        self._channels_last = True
        _lay_out(network, torch.channels_last_3d)
        try:
            self._run(self._blank())
        except Exception as error:
            if is_of_the_machine(error):
                raise
            self._channels_last = False
            _lay_out(network, torch.contiguous_format)

    def _compile(self) -> None:
        """Compile the network for the spec's patches.

        It is done at once, as the threads of the caller would all do it at the same time.
        """
        self._network = torch.compile(self._model.network, dynamic=False)
        try:
            self._run(self._blank())
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise SpecError(
                f"model.compile: the network can't be compiled: {told(error, self._spec)}. torch.compile needs a C++ "
                "compiler (g++, or what the environment variable CXX names) for CPUs; model.compile: false does without"
            ) from error

    def _blank(self) -> torch.Tensor:
        shape = (self.batch_size, self._spec.input_scale.channels, *self._spec.patch_size)
        return torch.zeros(shape, device=self._device)


def load(spec: VolumeSpec) -> PyTorch:
    """The engine for a spec; errors as ``load_engine``."""
    device = _device(spec.model.device)
    if device.type == "cpu":
        keep_large_arrays()
    return PyTorch(spec, device, load_model(spec, device))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("model.device: cuda, but PyTorch finds no CUDA device here; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", claim(torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _shortages(device: torch.device) -> int:
    """How often this process has been refused memory of a GPU; 0 for CPUs."""
    if device.type != "cuda":
        return 0
    count: int = torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0)
    return count


def _lay_out(network: torch.nn.Module, order: torch.memory_format) -> None:
    for parameter in network.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=order)


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.cpu().numpy()
    return array
