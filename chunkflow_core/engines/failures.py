"""How an engine tells what went wrong with a model."""

from __future__ import annotations

import re
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType

from chunkflow_core.errors import ChunkflowError, SpecError
from chunkflow_core.spec import VolumeSpec

_MACHINE = re.compile(
    r"(CUDA|cuDNN|CUBLAS) (error|failure)|CUDA out of memory|CUBLAS_STATUS|allocate memory|bad_?alloc", re.IGNORECASE
)
_MACHINE_KINDS = {"OutOfMemoryError", "AcceleratorError"}
_OF_TORCHSCRIPT = re.compile(r"The following operation failed in the TorchScript interpreter\. .*(?=\b\w+: )")
"""The listings that TorchScript puts before what has happened."""
_LONGEST = 500


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is for want of memory or of the accelerator, and so worth a retry.

    Errors of this library count, too: they say already what they are. All others are the model's.
    """
    named = type(error).__name__ in _MACHINE_KINDS
    return named or isinstance(error, MemoryError | ChunkflowError) or _MACHINE.search(str(error)) is not None


def told(error: BaseException, spec: VolumeSpec) -> str:
    """An error in one line, with the line of the model's folder where it arose."""
    text = " ".join(str(error).split())
    text = _OF_TORCHSCRIPT.sub("", text)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    folder = (spec.model_path(spec.model.path) if spec.model.path else Path(spec.folder) / "-").parent.resolve()
    own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{where}"


def required(package: str, engine: str) -> ModuleType:
    """An optional package; ``SpecError`` that says how to install it where it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        raise SpecError(
            f"model.engine: {engine} needs the package {package}, which can't be imported here ({error}); "
            f'pip install "chunkflow-airflow[{engine}]"'
        ) from error
