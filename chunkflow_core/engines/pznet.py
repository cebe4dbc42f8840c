"""PZNet: networks compiled to machine code for one kind of CPU.

The project is https://github.com/supersergiy/znnphi_interface. ``model.path`` is the folder of a
compiled net. It is loaded by the package ``pznet`` where that is installed, by either of its
interfaces (``PZNet(folder)``, or in older versions ``znet()`` and ``load_net(folder)``); otherwise
by the extension module ``znet`` in the folder itself, which is what the package loads too. A net
has its threads built in.
"""

from __future__ import annotations

import math
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkflow_core.engines.base import Engine, network_input, network_shape
from chunkflow_core.engines.failures import is_of_the_machine, told
from chunkflow_core.engines.model_imports import forget_files
from chunkflow_core.engines.outputs import each_by_itself, failed, finished
from chunkflow_core.errors import ChunkflowError, SpecError
from chunkflow_core.spec import VolumeSpec


class PZNet(Engine):
    """A compiled net; it has one set of buffers, so only one call is made at a time."""

    def __init__(self, spec: VolumeSpec, net: Any) -> None:
        """Take a net that is loaded."""
        self._spec, self._net = spec, net

    @property
    def description(self) -> dict[str, Any]:
        """Device, and the module that has loaded the net."""
        return {"device": "cpu", "interface": type(self._net).__module__}

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the patches of a batch one at a time; see ``Engine.__call__``."""
        return each_by_itself(self._one, patches)

    def _one(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            output = np.asarray(self._net.forward(np.ascontiguousarray(network_input(patch, self._spec))))
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise failed(told(error, self._spec), patch.shape) from error
        return finished(output, self._spec, 1)


def load(spec: VolumeSpec) -> PZNet:
    """The engine for a spec; errors as ``load_engine``."""
    assert spec.model.path is not None
    folder = spec.model_path(spec.model.path)
    try:
        net = _net(folder)
    except ChunkflowError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise SpecError(f"model.path: the net in {folder} can't be loaded: {told(error, spec)}") from error
    _check_size(spec, net)
    return PZNet(spec, net)


def _net(folder: Path) -> Any:
    module = _module_of(folder)
    package = _package()
    if package is not None and hasattr(package, "PZNet"):
        return package.PZNet(str(folder))
    if package is not None:
        net = package.znet()
        net.load_net(str(folder))
        return net
    if module is None:
        raise SpecError(
            f"model.path: {folder} has no module znet (znet.so) for this Python, and the package pznet is not "
            "installed; install it from https://github.com/supersergiy/znnphi_interface, or give the folder of a "
            "compiled net"
        )
    layers = folder / "lib"
    layers.mkdir(exist_ok=True)  # the net compiles its layers into it
    return module.znet(f"{folder / 'weights'}/", str(layers))


def _module_of(folder: Path) -> ModuleType | None:
    """The folder's own ``znet``.

    From then on ``import znet`` finds it, also in the package ``pznet``.
    """
    sys.modules.pop("znet", None)
    forget_files()
    found = PathFinder.find_spec("znet", [str(folder)])
    if found is None or found.loader is None:
        return None
    module = module_from_spec(found)
    sys.modules["znet"] = module
    found.loader.exec_module(module)
    return module


def _package() -> ModuleType | None:
    for name in ("pznet.pznet", "pznet"):
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "pznet":
                continue
            raise
        if hasattr(module, "PZNet") or hasattr(module, "znet"):
            return module
    return None


def _check_size(spec: VolumeSpec, net: Any) -> None:
    """Refuse patches of another size than the net was compiled for: they would end the process."""
    shape = getattr(net, "in_shape", None) or (net.get_in_shape() if hasattr(net, "get_in_shape") else None)
    expected = network_shape(spec)
    if shape is not None and math.prod(shape) != math.prod(expected):
        raise SpecError(
            f"patch_size: the net in {spec.model.path} was compiled for patches of shape {tuple(shape)}, the spec "
            f"gives {expected} (batch, input channels, z, y, x)"
        )
