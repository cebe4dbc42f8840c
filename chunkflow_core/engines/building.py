"""Makes networks as the spec names them: a class or function, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from chunkflow_core.engines.model_imports import forget_model
from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec

_IMPORT = "import"
"""Only key of a dict among the arguments that stands for what has a dotted name."""

_INSTALLED_BY = {
    "monai": "pip install monai",
    "dynamic_network_architectures": "pip install dynamic-network-architectures",
    "connectomics": "pip install git+https://github.com/PytorchConnectomics/pytorch_connectomics",
}
"""How libraries of this field's networks are installed, by the name that they are imported by."""


def maker(spec: VolumeSpec, module: ModuleType | None) -> Callable[[], Any]:
    """What makes the spec's ``model.network``, each time it is called.

    Args:
        spec: The volume.
        module: The file of ``model.path``; None if there is none.

    Raises:
        SpecError: There is nothing of this name, or of a name among the arguments.
    """
    name = spec.model.network
    assert name is not None
    if module is None:
        forget_model()
        made: Any = _named(name, "model.network")
    else:
        made = module
        for part in name.split("."):
            made = getattr(made, part, None)
        if made is None:
            raise SpecError(f"model.network: {name}: {module.__file__} has nothing of this name")
    if not callable(made):
        raise SpecError(f"model.network: {name} is a {type(made).__name__}, expected a class or function")
    return partial(made, **_argument(spec.model.arguments, "model.arguments"))


def _argument(value: Any, key: str) -> Any:
    """An argument with what it names in place of names."""
    if isinstance(value, dict):
        if set(value) == {_IMPORT} and isinstance(value[_IMPORT], str):
            return _named(value[_IMPORT], key)
        return {name: _argument(part, f"{key}.{name}") for name, part in value.items()}
    return [_argument(part, key) for part in value] if isinstance(value, list) else value


def _named(name: str, key: str) -> Any:
    """What has a dotted name in an installed package; ``key`` of the spec is for messages."""
    package, *parts = name.split(".")
    try:
        found: Any = import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise SpecError(f"{key}: {name}: {package} needs {error.name}, which is not installed here") from error
        way = f": {_INSTALLED_BY[package]}" if package in _INSTALLED_BY else ""
        raise SpecError(f"{key}: {name}: the package {package} is not installed here{way}") from error
    place = package
    for part in parts:
        place = f"{place}.{part}"
        if not hasattr(found, part):
            try:
                import_module(place)
            except ModuleNotFoundError as error:
                raise SpecError(f"{key}: {name}: there is no {place} ({error})") from error
        found = getattr(found, part)
    return found


class Mean(torch.nn.Module):
    """The mean of what networks give for the same patch, part by part where that are several."""

    def __init__(self, networks: Sequence[torch.nn.Module]) -> None:
        """Take the networks, which have the same outputs."""
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, patches: torch.Tensor) -> Any:
        """Run all networks, each on a patch of its own, as one may work in place."""
        return _mean([network(patches.clone()) for network in self.networks])


def _mean(outputs: Sequence[Any]) -> Any:
    """The mean of tensors, or of those at the same place; of what is no tensor, the first."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return sum(outputs[1:], first) / len(outputs)
    if isinstance(first, Mapping):
        return {key: _mean([output[key] for output in outputs]) for key in first}
    if isinstance(first, list | tuple):
        return [_mean(parts) for parts in zip(*outputs, strict=True)]
    return first
