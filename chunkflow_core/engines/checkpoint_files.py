"""Reads checkpoints, whatever else their trainer has left in them."""

from __future__ import annotations

import pickle
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch

from chunkflow_core.engines.failures import told
from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.spec import VolumeSpec

_CARRIED = re.compile(r"GLOBAL ([\w.]+)")
"""How PyTorch names the class that it will not make."""

_FUNCTIONS = [getattr(import_module("numpy._core.multiarray"), name) for name in ("scalar", "_reconstruct")]
_NUMBERS: list[Any] = [
    *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}),
    *((f, f"numpy.{core}.multiarray.{f.__name__}") for f in _FUNCTIONS for core in ("core", "_core")),
]
"""What NumPy's numbers and arrays are made by, which carry no code.

Trainers keep a metric or a history so.
"""


def read_checkpoint(spec: VolumeSpec, file: Path) -> Any:
    """What a checkpoint holds, its tensors on CPUs.

    Raises:
        SpecError: It needs ``model.trust``, or is no checkpoint.
        MissingInputError: It is truncated, or can't be read.
    """
    try:
        if file.suffix.lower() == ".safetensors":
            return _safetensors(file)
        if is_torchscript(file):
            raise SpecError(
                f"model.weights: {file} is a TorchScript network with its weights inside: give it as model.path, "
                "without model.weights"
            )
        if spec.model.trust:
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_Tolerant("tolerant"))
        return _plain(file)
    except SpecError:
        raise
    except pickle.UnpicklingError as error:
        raise _not_plain(spec, file, error) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise MissingInputError(
            f"model.weights: {file} can't be read, it may be truncated: {told(error, spec)}"
        ) from error
    except Exception as error:
        raise SpecError(f"model.weights: {file} can't be loaded: {told(error, spec)}") from error


def plain_content(file: Path) -> Any:
    """What a checkpoint holds; None if it carries objects that could run code.

    Raises:
        MissingInputError: It is truncated, or can't be read.
    """
    try:
        return _plain(file)
    except pickle.UnpicklingError:
        return None
    except (RuntimeError, EOFError, OSError) as error:
        raise MissingInputError(f"{file} can't be read, it may be truncated: {' '.join(str(error).split())}") from error


def _plain(file: Path) -> Any:
    with torch.serialization.safe_globals(_NUMBERS):
        return torch.load(file, map_location="cpu", weights_only=True)


def _safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _not_plain(spec: VolumeSpec, file: Path, error: Exception) -> SpecError:
    if spec.model.trust:
        return SpecError(f"model.weights: {file} is not a checkpoint, or damaged: {told(error, spec)}")
    carried = _CARRIED.search(str(error))
    what = f" (it has an object of {carried[1]})" if carried else ""
    return SpecError(
        f"model.weights: {file} is not a plain checkpoint{what}: loading it could run code that it carries, or it is "
        "damaged. If you know where it comes from, set model.trust: true"
    )


def is_torchscript(file: Path) -> bool:
    """Whether a file is a network in TorchScript, not a checkpoint."""
    try:
        with ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except BadZipFile:  # of the older format, or damaged
        return False


class _StandIn:
    """In the place of an object whose class can't be imported here, such as the trainer's."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        """Take whatever the class would take."""

    def __setstate__(self, _state: Any) -> None:
        """Forget what the object was made of."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Forget an item, of a class that was a dict."""

    def append(self, _value: Any) -> None:
        """Forget an item, of a class that was a list."""

    def extend(self, _values: Any) -> None:
        """Forget items, of a class that was a list."""

    def __call__(self, *_arguments: Any, **_named: Any) -> _StandIn:
        return self


class _Unpickler(pickle.Unpickler):
    """Does without the classes that can't be imported here."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name.rpartition(".")[2], (_StandIn,), {"__module__": module})


class _Tolerant(ModuleType):
    """What ``torch.load`` takes in place of the module ``pickle``."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **settings: Any) -> Any:
        return _Unpickler(file, **settings).load()
