"""PyTorch networks as they are found in this field, unmodified.

- a ``.py`` file with ``InstantiatedModel`` (optionally ``load_model``, ``pre_process``, ``post_process``) and a checkpoint, as
  chunkflow takes them;
- a ``.py`` file with ``class PatchInferencer``, made with ``(weights, output_patch_mask)`` or ``(weights)``, called with a
  numpy batch; it gets a mask of ones, as the blending is done here;
- TorchScript, and ``torch.export`` programs (``.pt2``).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine, crop_to
from chunkflow_core.errors import ChunkflowError, DataError, MissingInputError, SpecError
from chunkflow_core.spec import VolumeSpec

Network = Callable[[Any], Any]

_MACHINE = re.compile(r"CUDA error|CUDA out of memory|cuDNN error|CUBLAS_STATUS|allocate memory")
_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class PyTorch(Engine):
    """A network that takes and gives tensors."""

    def __init__(self, spec: VolumeSpec, device: torch.device, network: Network, pre: Network, post: Network) -> None:
        self._spec, self._device, self._network, self._pre, self._post = spec, device, network, pre, post
        self._precision = _PRECISIONS.get(spec.model.precision)

    @property
    def description(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        autocast = torch.autocast(self._device.type, self._precision, enabled=self._precision is not None)
        with torch.inference_mode(), autocast:
            output = self._select(self._run(patches))
            if not isinstance(output, torch.Tensor | np.ndarray):
                raise DataError(
                    f"the model gave a {type(output).__name__}, expected a tensor (or a list or dict of them)"
                )
            return self._finish(torch.as_tensor(output), len(patches))

    def _run(self, patches: NDArray[np.float32]) -> Any:
        try:
            return self._post(self._network(self._pre(torch.from_numpy(patches).to(self._device))))
        except Exception as error:
            if _is_of_the_machine(error):
                raise
            raise DataError(
                f"the model failed with a batch of shape {patches.shape} (batch, input channels, z, y, x of patch_size): "
                f"{_told(error)}"
            ) from error

    def _finish(self, output: torch.Tensor, batch: int) -> NDArray[np.float32]:
        spec = self._spec
        expected = (batch, spec.output.channels, *spec.output_size)
        with suppress(ValueError, IndexError):  # told in terms of the spec below
            output = crop_to(output, spec.output_size)
        if tuple(output.shape) != expected:
            raise DataError(
                f"the model gave an output of shape {tuple(output.shape)}, the spec says {expected} "
                "(batch, output.channels, z, y, x of output_patch_size)"
            )
        output = output.float()
        if spec.model.activation == "sigmoid":
            output = torch.sigmoid(output)
        return np.ascontiguousarray(output.cpu().numpy())

    def _select(self, output: Any) -> Any:
        wanted = self._spec.model.output
        if isinstance(output, Mapping):
            return self._select_key(output, wanted)
        if isinstance(output, Sequence):
            index = 0 if wanted is None else wanted
            if not isinstance(index, int) or not -len(output) <= index < len(output):
                raise DataError(f"model.output: {wanted}, but the model gives a list of {len(output)} outputs")
            return output[index]
        if wanted not in (None, 0):
            raise DataError(f"model.output: {wanted}, but the model gives a single output")
        return output

    def _select_key(self, output: Mapping[Any, Any], wanted: str | int | None) -> Any:
        if wanted is not None:
            if wanted not in output:
                raise DataError(f"model.output: {wanted} is not among the model's outputs {list(output)}")
            return output[wanted]
        channels = self._spec.output.channels
        fitting = [v for v in output.values() if getattr(v, "ndim", 0) == 5 and v.shape[1] == channels]
        if len(fitting) != 1:
            raise DataError(
                f"the model gives the outputs {list(output)}, of which {len(fitting)} have {channels} channels; "
                " name the one to take in model.output"
            )
        return fitting[0]


def load(spec: VolumeSpec) -> PyTorch:
    """The engine for a spec; errors as ``load_engine``."""
    _make_deterministic(spec.model.threads)
    torch.manual_seed(0)  # a network without weights of its own is the same in every process
    device = _device(spec.model.device)
    assert spec.model.path is not None
    path = spec.model_path(spec.model.path)
    try:
        if path.suffix == ".py":
            return _from_source(spec, path, device)
        return _from_archive(spec, path, device)
    except ChunkflowError:
        raise
    except (Exception, SystemExit) as error:  # whatever a model file does when it is run, sys.exit included
        if _is_of_the_machine(error):
            raise
        raise SpecError(f"model.path: {path} can't be loaded: {_told(error)}") from error


def _from_source(spec: VolumeSpec, path: Path, device: torch.device) -> PyTorch:
    module = _import_file(path)
    weights = spec.model_path(spec.model.weights) if spec.model.weights else None
    if hasattr(module, "PatchInferencer"):
        if spec.model.batch_statistics:
            raise SpecError(
                "model.batch_statistics: only for InstantiatedModel and load_model, not for PatchInferencer"
            )
        return PyTorch(spec, device, _patch_inferencer(spec, module, weights), _to_numpy, _identity)
    network = _instantiated_model(spec, module, weights, device)
    post = getattr(module, "post_process", _identity)
    pre = getattr(module, "pre_process", None)
    return PyTorch(spec, device, network, _on_numpy(pre, device) if pre else _identity, post)


def _instantiated_model(spec: VolumeSpec, module: ModuleType, weights: Path | None, device: torch.device) -> Network:
    if hasattr(module, "load_model"):
        network = module.load_model(str(weights) if weights else None)
    elif hasattr(module, "InstantiatedModel"):
        network = module.InstantiatedModel
        if weights:
            _load_state(network, weights, trust=spec.model.trust)
    else:
        raise SpecError(
            f"model.path: {module.__file__} defines none of InstantiatedModel, load_model and PatchInferencer"
        )
    if isinstance(network, type) or not callable(network):
        raise SpecError(
            f"model.path: {module.__file__} gives {network!r:.80} as its model, expected an instance of a network"
        )
    if isinstance(network, torch.nn.Module):
        network = network.to(device).eval()
    if spec.model.batch_statistics:
        _use_batch_statistics(network)
    result: Network = network
    return result


def _patch_inferencer(spec: VolumeSpec, module: ModuleType, weights: Path | None) -> Network:
    """An object of the file's own class, called with numpy and giving numpy."""
    parameters = inspect.signature(module.PatchInferencer).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    arguments: list[Any] = [str(weights) if weights else None]
    if len(positional) > 1:
        arguments.append(np.ones(spec.output_size, np.float32))
    inferencer: Network = module.PatchInferencer(*arguments)
    return inferencer


def _from_archive(spec: VolumeSpec, path: Path, device: torch.device) -> PyTorch:
    if spec.model.batch_statistics:
        raise SpecError("model.batch_statistics: only for networks in a .py file, a compiled one has its mode built in")
    if spec.model.weights:
        raise SpecError(f"model.weights: only for networks in a .py file; {path} has its weights inside")
    if path.suffix == ".pt2":
        network: Any = torch.export.load(path).module().to(device)
    else:
        network = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    return PyTorch(spec, device, network, _identity, _identity)


def _load_state(network: torch.nn.Module, weights: Path, *, trust: bool) -> None:
    try:
        checkpoint = torch.load(weights, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise SpecError(f"model.weights: {weights} is not a checkpoint, or damaged: {_told(error)}") from error
        raise SpecError(
            f"model.weights: {weights} is not a plain checkpoint: loading it could run code that it carries, or it is "
            "damaged. If you know where it comes from, set model.trust: true"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise MissingInputError(
            f"model.weights: {weights} can't be read, it may be truncated: {_told(error)}"
        ) from error
    except Exception as error:
        raise SpecError(f"model.weights: {weights} can't be loaded: {_told(error)}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping):
        raise SpecError(f"model.weights: {weights} holds a {type(state).__name__}, expected a state_dict")
    prefix = "module."  # of networks that were trained in DataParallel
    if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in network.state_dict()):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise SpecError(f"model.weights: {weights} does not fit the model: {_told(error)}") from error


class _Imports:
    """What the model file that was loaded last has brought into this process."""

    folder: Path | None = None
    before: frozenset[str] = frozenset()
    """Names of the modules that were there before it."""


def _import_file(path: Path) -> ModuleType:
    """Run a model file as a module; it may import its siblings.

    The siblings of the model before are forgotten first, as another model's may have the same names.
    """
    if _Imports.folder is not None:
        for name in set(sys.modules) - _Imports.before:
            if _is_beside(sys.modules[name], name, _Imports.folder):
                del sys.modules[name]
        with suppress(ValueError):
            sys.path.remove(str(_Imports.folder))
    _Imports.folder, _Imports.before = path.parent.resolve(), frozenset(sys.modules)
    sys.path.insert(0, str(_Imports.folder))
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location("chunkflow_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _is_beside(module: ModuleType, name: str, folder: Path) -> bool:
    """Whether a module is a file or package directly in a folder, or inside such a package."""
    top = name.partition(".")[0]
    places = [Path(place) for place in (getattr(module, "__file__", None), *getattr(module, "__path__", ())) if place]
    return any(place.is_relative_to(folder / top) or place == folder / f"{top}.py" for place in places)


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is for want of memory or of the accelerator, not the model's: then it is worth a retry."""
    kinds = (
        MemoryError,
        torch.OutOfMemoryError,
        *([kind] if (kind := getattr(torch, "AcceleratorError", None)) else []),
    )
    return isinstance(error, kinds) or _MACHINE.search(str(error)) is not None


def _told(error: BaseException) -> str:
    """An error in one line, with the line of the model's folder where it arose."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else f"{text[:497]}..."
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _Imports.folder is not None and Path(f.filename).is_relative_to(_Imports.folder)]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{where}"


def _use_batch_statistics(network: Any) -> None:
    """Let normalisation use the patch's own statistics; everything else stays in evaluation mode."""
    if not isinstance(network, torch.nn.Module):
        raise SpecError("model.batch_statistics: only for a torch.nn.Module, which the model file does not give")
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            module.train()
            module.track_running_stats = False  # the stored statistics stay as they are


def _make_deterministic(threads: int) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("model.device: cuda, but PyTorch finds no CUDA device here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _on_numpy(function: Network, device: torch.device) -> Network:
    """chunkflow hands ``pre_process`` a numpy array and takes whatever the network likes."""

    def run(tensor: torch.Tensor) -> Any:
        result = function(_to_numpy(tensor))
        return torch.from_numpy(result).to(device) if isinstance(result, np.ndarray) else result

    return run


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.cpu().numpy()
    return array


def _identity(value: Any) -> Any:
    return value
