"""PyTorch's settings that decide numbers: the same for every network, whatever model files say.

Model files set them for all of PyTorch, to train faster: TensorFloat-32, ``cudnn.benchmark``. What
they set while they are loaded is undone; a network that sets them while it runs is refused, as some
patches would be computed with one setting and some with another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

from chunkflow_core.errors import SpecError
from chunkflow_core.spec import VolumeSpec

_LIBRARIES = (
    *("", "cuda.matmul.", "cudnn.", "cudnn.conv.", "cudnn.rnn."),
    *("mkldnn.", "mkldnn.matmul.", "mkldnn.conv.", "mkldnn.rnn."),
)
_VALUES = {
    **{f"{library}fp32_precision": "ieee" for library in _LIBRARIES},
    "cudnn.benchmark": False,
    "cudnn.enabled": True,
    "mkldnn.enabled": True,
    "cuda.matmul.allow_fp16_accumulation": False,
    "cuda.matmul.allow_fp16_reduced_precision_reduction": True,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": True,
}
"""Attributes of ``torch.backends``, and what they have to be; versions before 2.9 lack some."""

_VARIABLES = ("ATEN_", "CUBLAS_", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_", "ONEDNN_", "TORCH_", "TORCHINDUCTOR_")
"""How names of environment variables begin by which libraries are told to compute otherwise.

They read them late: NVIDIA's at the first convolution.
"""

_LEAST = sys.float_info.min


@contextmanager
def undone(spec: VolumeSpec) -> Iterator[None]:
    """Load a model within this: settings are what they have to be before and after.

    So are environment variables that decide numbers.
    """
    settle(spec)
    before = _environment()
    try:
        yield
    finally:
        for name in _environment().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        settle(spec)


def settle(spec: VolumeSpec) -> None:
    """Make all settings what they have to be."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
    torch.set_num_threads(spec.model.threads)
    # use_deterministic_algorithms would also import the compiler, at half the cost of PyTorch
    # itself; the variable is for models that import it later
    torch.set_deterministic_debug_mode("error")
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if spec.model.compile or "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(False)  # a matter of each thread, which others inherit that it starts
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as that writes all twice
    for name, value in _VALUES.items():
        place, _, key = name.rpartition(".")
        if _get(name) is not None:
            setattr(_module(place), key, value)
    # the older names of some of these, which have a state of their own
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def held(spec: VolumeSpec) -> Iterator[None]:
    """Run a network's own code within this: in the spec's number of threads, and settled.

    Raises:
        SpecError: The code has changed a setting.
    """
    threads = spec.model.threads
    if torch.get_num_threads() != threads:  # each thread of the process has a number of its own
        torch.set_num_threads(threads)
    yield
    changed = [f"torch.backends.{name}" for name, value in _VALUES.items() if _get(name) not in (value, None)]
    others = {
        "torch.set_deterministic_debug_mode": torch.get_deterministic_debug_mode() != 2,
        "torch.set_num_threads": torch.get_num_threads() != threads,
        "torch.set_flush_denormal": _LEAST / 2 == 0,
    }
    changed += [name for name, is_changed in others.items() if is_changed]
    if changed:
        raise SpecError(
            f"model.path: {spec.model.path} sets {', '.join(changed)} while it runs, so that some patches would be "
            "computed otherwise than others. Leave that out; what a model file sets while it is loaded is undone, as "
            "model.precision and model.threads are what counts"
        )


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}


def _module(place: str) -> Any:
    return reduce(getattr, filter(None, place.split(".")), torch.backends)


def _get(name: str) -> Any:
    """The value of an attribute of ``torch.backends``; None if this version has none."""
    place, _, key = name.rpartition(".")
    try:
        return getattr(_module(place), key)
    except AttributeError:
        return None
