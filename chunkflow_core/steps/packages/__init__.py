"""Published models as they come: what of a spec their packages say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chunkflow_core.errors import MissingInputError, UsageError
from chunkflow_core.steps.packages import bioimageio, connectomics, monai, nnunet
from chunkflow_core.steps.packages.package import Package

_KINDS: list[tuple[Callable[[Path], Path | None], Callable[[Path, str | None], Package]]] = [
    (kind.found, kind.read) for kind in (bioimageio, nnunet, monai, connectomics)
]
"""Of each kind, what finds the file that describes a package, and what reads it."""


def read_package(place: str, weights: str | None = None) -> Package:
    """What a package says, of whatever kind it is.

    Args:
        place: Its folder, or the file that describes it.
        weights: Which of its weights to take; None for the ones that need the least besides.

    Raises:
        UsageError: It is of no kind that is known.
        SpecError: It can't be run as its description says, or does not have these weights.
        MissingInputError: A file of it isn't there.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise MissingInputError(f"{place}: there is no such file or folder; expected a package on this machine")
    for found, read in _KINDS:
        if (file := found(path)) is not None:
            return read(file, weights)
    raise UsageError(
        f"{place}: expected a bioimage.io package (unpacked, with rdf.yaml), a MONAI bundle (a folder with "
        "configs/metadata.json, or a .ts file with metadata inside), a folder of results of nnU-Net (plans.json, "
        "dataset.json), or the configuration of PyTorch Connectomics. A .py, TorchScript, .pt2 or .onnx file goes into "
        "model.path as it is"
    )
