"""The sections of a volume spec about storage and the model: keys, types, defaults, and what of each can be checked by itself."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from chunkflow_core.lattice.boxes import Vector

_STORES = r"(gs|s3|matrix|nokura|tigerdata)://(?!https?:)[^/]|s3://https?://[^/]+/[^/]"
_PROTOCOL = re.compile(rf"(precomputed://)?(file://[/~]|mem://.|{_STORES}|(\w+\+)?https?://[^/]).*")
_ALIAS = re.compile(r"(?:precomputed://)?(\w+)://[^/]")


def _three_integers(value: Any) -> Any:
    ok = isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int for v in value)
    if not ok:
        raise ValueError("expected three integers in the order z, y, x, such as [16, 128, 128]")
    return tuple(value)


def _three_positive_integers(value: Any) -> Any:
    value = _three_integers(value)
    if min(value) < 1:
        raise ValueError("expected three integers >= 1 in the order z, y, x")
    return value


def check_storage_path(value: Any) -> Any:
    """The value, if it is the address of a place in storage; ``ValueError`` if not. Local ones have to be absolute."""
    if isinstance(value, str) and (_PROTOCOL.fullmatch(value) or _has_alias(value)):
        return value
    if isinstance(value, str) and re.match(r"(precomputed://)?s3://https?:", value):
        raise ValueError('expected endpoint, bucket and path, such as "s3://https://minio.example.org/bucket/em"')
    raise ValueError('expected a storage path such as "file:///data/em", "gs://bucket/em" or "s3://bucket/em"')


def _has_alias(path: str) -> bool:
    """Whether a path begins with an alias for an endpoint, of those that CloudFiles reads from its ``aliases.json``."""
    match = _ALIAS.match(path)
    file = Path(os.environ.get("CLOUD_FILES_DIR") or "~/.cloudfiles").expanduser() / "aliases.json"
    if match is None or not file.is_file():
        return False
    try:
        aliases = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"the aliases in {file} can't be read, they are not JSON: {error}") from error
    return isinstance(aliases, dict) and match[1] in aliases


def _is_fetchable(path: str) -> bool:
    return re.match(rf"file://[/~]|{_STORES}", path) is not None or _has_alias(path)


def _writable_path(value: Any) -> Any:
    check_storage_path(value)
    if re.match(r"(precomputed://)?(\w+\+)?https?://", value):
        raise ValueError(
            'expected a place that can be written, such as "file:///data/em" or "gs://bucket/em", not http'
        )
    return value


def _two_corners(value: Any) -> Any:
    if not (isinstance(value, list | tuple) and len(value) == 2):
        raise ValueError("expected two corners in voxels, [[z, y, x] start, [z, y, x] stop]")
    start, stop = map(_three_integers, value)
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        raise ValueError("expected start < stop on every axis")
    return (start, stop)


def _low_and_high(value: Any) -> Any:
    ok = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    if not ok or not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
        raise ValueError("expected [low, high], two finite numbers, low < high")
    return tuple(map(float, value))


def _key_or_index(value: Any) -> Any:
    if value is not None and type(value) not in (str, int):
        raise ValueError("expected the key or the index of one of the model's outputs")
    return value


Size = Annotated[Vector, BeforeValidator(_three_positive_integers)]
Offset = Annotated[Vector, BeforeValidator(_three_integers)]
StoragePath = Annotated[str, BeforeValidator(check_storage_path)]
WritablePath = Annotated[str, BeforeValidator(_writable_path)]
Corners = Annotated[tuple[Vector, Vector], BeforeValidator(_two_corners)]


class Section(BaseModel):
    """A section of the spec: unknown keys are refused, values are not converted, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputSpec(Section):
    """The layer to read."""

    path: StoragePath
    mip: int = Field(0, ge=0)
    bounds: Corners | None = None
    """What of the layer is looked at; None for all. A run in Airflow sets it, so that a layer may grow meanwhile."""
    padding: Literal["reflect", "edge", "constant"] = "reflect"
    """How patches are filled where they reach past the bounds (numpy's modes; ``constant`` is 0)."""
    fill_missing: bool = False
    """Whether storage chunks that aren't there are read as zeros; otherwise they are an error."""
    prefetch: int = Field(1, ge=1)
    """Steps of one storage chunk's depth that are read ahead of the patches."""


class MaskSpec(Section):
    """A layer that says where there is something to do: nonzero voxels. Aligned with the input by voxel size."""

    path: StoragePath
    mip: int = Field(0, ge=0)
    fill_missing: bool = False
    """Whether storage chunks that aren't there are read as zeros; otherwise they are an error."""


class SkipSpec(Section):
    """Which patches are not run. They contribute nothing."""

    zeros: bool = True
    """Patches whose input is all zeros."""
    mask: MaskSpec | None = None
    """Patches that no nonzero voxel of a mask touches; outside the mask the output is 0."""


class OutputSpec(Section):
    """The layer to write."""

    path: WritablePath
    channels: int = Field(1, ge=1)
    dtype: Literal["uint8", "float32"] = "uint8"
    chunk_size: Size | None = None
    compression: Literal["gzip", "br", "zstd", "none"] = "gzip"
    range: Annotated[tuple[float, float], BeforeValidator(_low_and_high)] = (0.0, 1.0)
    """The values that the model can give; sets the exact step of the sums and what uint8 0 and 255 mean."""


class KeepDays(Section):
    """For how long donations are kept after their blending."""

    days: float


def _retention(value: Any) -> Any:
    if value in ("delete", "keep") or isinstance(value, KeepDays):
        return value
    if (
        isinstance(value, dict)
        and list(value) == ["days"]
        and type(value["days"]) in (int, float)
        and value["days"] > 0
    ):
        return value
    raise ValueError("expected delete, keep, or {days: N} with N > 0")


class ExchangeSpec(Section):
    """Where blocks leave donations and receipts for each other."""

    path: WritablePath
    donations: Annotated[Literal["delete", "keep"] | KeepDays, BeforeValidator(_retention)] = "delete"
    """What cleanup does with donations once the blocks that they are for are complete."""


class ModelSpec(Section):
    """The convnet and how it is run."""

    engine: Literal["identity", "pytorch", "openvino", "onnx", "pznet"]
    path: str | None = None
    """Model file, relative to the spec's folder, or an address in gs:// or s3://; for pznet the folder of the net."""
    weights: str | None = None
    """Checkpoint, relative to the spec's folder, or an address in gs:// or s3://."""
    batch_size: int = Field(1, ge=1)
    """Patches of one forward pass on a GPU. On CPUs each patch is run by itself."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(1, ge=1)
    """CPU threads of one forward pass. Fixed rather than taken from the machine, since it can decide a sum's order."""
    streams: int | None = Field(None, ge=1)
    """Forward passes at a time on CPUs; default: as many as the process's CPUs allow. Decides no number."""
    compile: bool = False
    """Compile the network by ``torch.compile``."""
    augmentation: Literal["none", "flips", "flips_transpose"] = "none"
    """Average over the 8 flips of a patch, or those and their transpositions of y and x (16)."""
    outputs: Literal["independent", "affinity"] = "independent"
    """What the channels are. ``affinity``: those of a voxel to the one before it along x, y, z, in this order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    activation: Literal["none", "sigmoid"] = "none"
    """Applied to the network's output."""
    output: Annotated[str | int | None, BeforeValidator(_key_or_index)] = None
    """Which of several outputs to take: a key or an index. Default: the first of a list, the fitting one of a dict."""
    batch_statistics: bool = False
    """Normalise by the statistics of the patch itself instead of those of the training (needs ``batch_size: 1``)."""
    trust: bool = False
    """Allow checkpoints that run code when they are loaded (pickles)."""
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> ModelSpec:
        if self.engine != "identity" and self.path is None:
            raise ValueError(f"path: missing; the engine {self.engine} needs a model file")
        if self.engine == "identity" and (self.path or self.weights):
            raise ValueError("path, weights: the identity engine takes none")
        if self.batch_statistics and self.batch_size != 1:
            raise ValueError(
                "batch_size: with batch_statistics it must be 1, or a patch's output would depend on its neighbours"
            )
        self._check_engine()
        return self

    def _check_engine(self) -> None:
        """Refuse addresses that models can't be fetched from, and what the engine would have to ignore."""
        for key, value in {"path": self.path, "weights": self.weights}.items():
            if value and "://" in value and not _is_fetchable(value):
                raise ValueError(
                    f'{key}: {value}: expected a path, or an address such as "gs://bucket/net.py" or "s3://bucket/net.py"'
                )
        suffix = PurePath(self.path or "").suffix.lower()
        compiled = self.engine in ("onnx", "pznet") or suffix in (".onnx", ".xml")
        fits = {"pytorch": suffix not in (".onnx", ".xml"), "onnx": suffix == ".onnx"}
        problems = {
            f"path: {self.path}: the engine {self.engine} does not run such files": not fits.get(self.engine, True),
            "weights: only for networks in a .py file, a compiled one has its weights inside": compiled
            and self.weights,
            "batch_statistics: only for networks in a .py file": compiled and self.batch_statistics,
            "compile: only for the engine pytorch": self.compile and self.engine != "pytorch",
            f"device: cuda: the engine {self.engine} runs on CPUs, expected auto or cpu": (
                self.device == "cuda" and self.engine in ("openvino", "pznet")
            ),
            f"precision: {self.precision}: the engine pznet computes in float32": (
                self.precision != "float32" and self.engine == "pznet"
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
