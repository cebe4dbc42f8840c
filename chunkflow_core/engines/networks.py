"""PyTorch networks as they are found in this field, unmodified.

- a ``.py`` file with ``InstantiatedModel`` (optionally ``load_model``, ``pre_process``,
  ``post_process``) and a checkpoint, as chunkflow takes them;
- a class or function of a ``.py`` file or of an installed package, which ``model.network`` names,
  and a checkpoint;
- a ``.py`` file with ``class PatchInferencer``, made with ``(weights, output_patch_mask)`` or
  ``(weights)``, called with a numpy batch; it gets a mask of ones, as the blending is done here;
- TorchScript, and ``torch.export`` programs (``.pt2``), which need ``model.trust``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from chunkflow_core.engines.base import network_shape
from chunkflow_core.engines.building import Mean, maker
from chunkflow_core.engines.checkpoints import load_weights
from chunkflow_core.engines.element_types import input_type
from chunkflow_core.engines.failures import is_of_the_machine, told
from chunkflow_core.engines.model_imports import import_file
from chunkflow_core.engines.opened_files import watched
from chunkflow_core.engines.settings import undone
from chunkflow_core.errors import ChunkflowError, SpecError
from chunkflow_core.spec import VolumeSpec

Function = Callable[[Any], Any]


@dataclass(frozen=True)
class Model:
    """What a model file gives."""

    network: Function
    takes_numpy: bool = False
    """Whether the network takes and gives numpy arrays (``PatchInferencer``), or tensors."""
    pre_process: Function | None = None
    """Function that gets a numpy batch, and returns what goes into the network."""
    post_process: Function | None = None
    """Function that gets what the network returns, and gives the model's output."""
    dtype: torch.dtype = torch.float32
    """Type of the elements that the network takes, where its file declares one."""
    fixed_batch: int | None = None
    """Number of patches that the network takes at a time, where its file fixes one."""


def load_model(spec: VolumeSpec, device: torch.device) -> Model:
    """The spec's model on a device, in evaluation mode, and PyTorch's settings as they have to be.

    Raises:
        SpecError: The model can't be used as the spec says.
        MissingInputError: A file isn't there.
    """
    path = spec.model_path(spec.model.path) if spec.model.path else None
    torch.manual_seed(0)  # a network without weights of its own is the same in every process
    with undone(spec):  # model files may say otherwise, for their training
        return _loaded(spec, path, device)


def _loaded(spec: VolumeSpec, path: Path | None, device: torch.device) -> Model:
    what = f"model.path: {path}" if path else f"model.network: {spec.model.network}"
    try:
        if path is not None and path.suffix != ".py":
            return _from_archive(spec, path, device)
        with watched(spec.model_files, Path(spec.folder)):
            return _from_source(spec, path, device)
    except ChunkflowError:
        raise
    except FileNotFoundError as error:
        raise SpecError(
            f"{what} can't be loaded: {told(error, spec)}. What a network opens besides model.path, "
            "model.weights and the modules that it imports has to stand in model.files"
        ) from error
    except (Exception, SystemExit) as error:  # whatever a model file does when it is run, sys.exit included
        if is_of_the_machine(error):
            raise
        raise SpecError(f"{what} can't be loaded: {told(error, spec)}") from error


def _from_source(spec: VolumeSpec, path: Path | None, device: torch.device) -> Model:
    module = import_file(path) if path else None
    weights = [spec.model_path(name) for name in spec.model.checkpoints]
    if spec.model.network is None and hasattr(module, "PatchInferencer"):
        assert module is not None
        _refuse(spec, ("batch_statistics", "compile"), "InstantiatedModel and load_model, not for PatchInferencer")
        _refuse(spec, ("weights_key",), "InstantiatedModel, not for PatchInferencer")
        if len(weights) > 1:
            raise SpecError("model.weights: a list is not for PatchInferencer, which takes one")
        return Model(_patch_inferencer(spec, module, *weights), takes_numpy=True)
    networks = _networks(spec, module, weights)
    network = networks[0] if len(networks) == 1 else Mean(networks)
    if isinstance(network, torch.nn.Module):
        network = network.to(device).eval()
    if spec.model.batch_statistics:
        _use_batch_statistics(network)
    pre_process = getattr(module, "pre_process", None)
    return Model(
        network,
        pre_process=pre_process,
        post_process=getattr(module, "post_process", None),
        dtype=_taken_by(spec, network, device, pre_process),
    )


def _networks(spec: VolumeSpec, module: ModuleType | None, weights: Sequence[Path]) -> list[Any]:
    """The networks, one for each checkpoint; one if there is none."""
    count = max(1, len(weights))
    what = f"model.path: {module.__file__}" if module else f"model.network: {spec.model.network}"
    if module is None or spec.model.network is not None:
        make = maker(spec, module)
        networks = [_checked(spec, make(), what) for _ in range(count)]
    elif hasattr(module, "load_model"):
        _refuse(spec, ("weights_key",), "InstantiatedModel, not for load_model, which chooses by itself")
        files: list[str | None] = [str(file) for file in weights]
        return [_checked(spec, module.load_model(file), what) for file in files or [None]]
    elif hasattr(module, "InstantiatedModel"):
        first = _checked(spec, module.InstantiatedModel, what)
        networks = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    else:
        raise SpecError(
            f"{what} defines none of InstantiatedModel, load_model and PatchInferencer; "
            "model.network can name another class or function of it that makes the network"
        )
    for network, file in zip(networks, weights, strict=False):
        load_weights(spec, network, file)
    return networks


def _checked(spec: VolumeSpec, network: Any, what: str) -> Any:
    """A network, if it is one; ``what`` gives it, for messages."""
    if isinstance(network, type) or not callable(network):
        raise SpecError(f"{what} gives {network!r:.80} as its model, expected an instance of a network")
    if len(spec.model.checkpoints) > 1 and not isinstance(network, torch.nn.Module):
        raise SpecError(f"model.weights: a list is only for a torch.nn.Module, and {what} gives another object")
    return network


def _refuse(spec: VolumeSpec, keys: tuple[str, ...], place: str) -> None:
    """Refuse what would be ignored: keys of ``model`` that are for networks of some form only."""
    for key in keys:
        if getattr(spec.model, key) not in (None, False):
            raise SpecError(f"model.{key}: only for {place}")


def _patch_inferencer(spec: VolumeSpec, module: ModuleType, weights: Path | None = None) -> Function:
    """An object of the file's own class, called with numpy and giving numpy."""
    parameters = inspect.signature(module.PatchInferencer).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    arguments: list[Any] = [str(weights) if weights else None]
    if len(positional) > 1:
        arguments.append(np.ones(spec.output_size, np.float32))
    inferencer: Function = module.PatchInferencer(*arguments)
    return inferencer


def _from_archive(spec: VolumeSpec, path: Path, device: torch.device) -> Model:
    _refuse(spec, ("batch_statistics", "compile"), "networks in a .py file, a compiled one has its mode built in")
    if spec.model.weights:
        raise SpecError(f"model.weights: only for networks in a .py file; {path} has its weights inside")
    if path.suffix == ".pt2":
        if not spec.model.trust:  # torch.export.load unpickles the archive's sample inputs, whatever they are
            raise SpecError(
                f"model.path: {path} is a .pt2 archive: loading it can run code that it carries. If you know where it "
                "comes from, set model.trust: true"
            )
        return _from_program(spec, path, device)
    torch.jit.set_fusion_strategy([])  # or GPUs run later patches otherwise than the first ones
    network = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    return Model(network, dtype=_taken_by(spec, network, device))


def _taken_by(
    spec: VolumeSpec, network: Function, device: torch.device, pre_process: Function | None = None
) -> torch.dtype:
    """The type of the elements that a network takes whose file does not declare it.

    It is float32 if it takes such patches, else the first of the types of its weights that it
    takes; the type of the first ones, if it takes nothing.
    """
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    kinds = list(dict.fromkeys(parameter.dtype for parameter in parameters if parameter.is_floating_point()))
    if set(kinds) <= {torch.float32}:
        return torch.float32
    patch = torch.zeros(network_shape(spec))
    given = patch if pre_process is None else pre_process(patch.numpy())
    if not isinstance(given, torch.Tensor | np.ndarray):  # it takes what it likes
        return torch.float32
    patch = torch.as_tensor(given)
    taken = (kind for kind in dict.fromkeys([torch.float32, *kinds]) if _takes(network, patch.to(device, kind)))
    kind = next(taken, kinds[0])
    input_type(spec, str(kind).removeprefix("torch."))
    return kind


def _takes(network: Function, patch: torch.Tensor) -> bool:
    """Whether a network does not fail with a patch."""
    with torch.inference_mode():
        try:
            network(patch)
        except RuntimeError as error:
            if is_of_the_machine(error):
                raise
            return False
    return True


def _from_program(spec: VolumeSpec, path: Path, device: torch.device) -> Model:
    """A ``torch.export`` program, with what it declares of its input."""
    program = torch.export.load(path)
    names = program.graph_signature.user_inputs
    inputs = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    if len(inputs) != 1:
        raise SpecError(f"model.path: {path} has {len(inputs)} inputs, expected a network with one")
    (declared,) = inputs
    input_type(spec, str(declared.dtype).removeprefix("torch."))
    batch = declared.shape[0] if isinstance(declared.shape[0], int) else None
    return Model(program.module().to(device), dtype=declared.dtype, fixed_batch=batch)


def _use_batch_statistics(network: Any) -> None:
    """Let normalisation use the patch's own statistics.

    Everything else stays in evaluation mode.
    """
    if not isinstance(network, torch.nn.Module):
        raise SpecError("model.batch_statistics: only for a torch.nn.Module, which the model file does not give")
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            module.train()
            module.track_running_stats = False  # the stored statistics stay as they are
