"""The sections of a volume spec about storage and the model.

They say keys, types and defaults, and what of each section can be checked by itself.
"""

from __future__ import annotations

import json
import math
from pathlib import PurePath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from chunkflow_core.lattice.boxes import Vector
from chunkflow_core.lattice.conversion import Conversion
from chunkflow_core.lattice.weights import ExactStep
from chunkflow_core.spec.affinities import Convention
from chunkflow_core.spec.values import ValuesSpec
from chunkflow_core.storage.addresses import (
    ZARR,
    check_address,
    check_writable,
    is_fetchable,
    is_remote,
    layer_format,
    plain,
)
from chunkflow_core.storage.layer_scale import FARTHEST

_MOST = 2**16
"""Largest number of channels, patches, threads and the like: what is above was a slip."""

_FARTHEST, _NARROWEST = 2.0**126, 2.0**-100
"""Largest number of ``output.range``, and least difference of its numbers.

Sums are computed in float32, which ends at 2¹²⁸. With R the power of two that bounds the range (see
``ExactStep``), sums within ±2R and the range's width, at most 2R, have to be less than that. At the
other end, R is at least half of the width, 2⁻¹⁰¹. So the step's reciprocal, 2²³/R, is less than
2¹²⁸; a weighted value that counts, of half a step or more, is above 2⁻¹²⁶, below which float32 has
fewer bits; and 255 over the width, by which ``uint8`` is scaled, is finite.
"""


_LEAST_HALF, _LARGEST_HALF = 2.0**-14, 65504.0
"""Least and largest number that float16 has with all of its bits."""

_MOST_CLASSES = 2**8
"""Largest number of channels whose indices uint8 holds."""


def _three_integers(value: Any) -> Any:
    ok = isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int for v in value)
    if not ok:
        raise ValueError("expected three integers in the order z, y, x, such as [16, 128, 128]")
    if max(map(abs, value)) > FARTHEST:
        raise ValueError("expected integers within 2^53 (9.0e15), in the order z, y, x")
    return tuple(value)


def _three_positive_integers(value: Any) -> Any:
    value = _three_integers(value)
    if min(value) < 1:
        raise ValueError("expected three integers >= 1 in the order z, y, x")
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
    if not ok or not -math.inf < value[0] < value[1] < math.inf:
        raise ValueError("expected [low, high], two finite numbers, low < high")
    if max(map(abs, value)) > _FARTHEST:
        raise ValueError("expected numbers that float32 sums can hold, from -2^126 to 2^126 (8.5e37)")
    low, high = map(float, value)
    if float(np.float32(high)) - float(np.float32(low)) < _NARROWEST:
        raise ValueError("expected numbers that differ in float32, by 2^-100 (7.9e-31) or more")
    return low, high


def _of_json(value: Any) -> Any:
    """The value, if JSON can tell it, as fingerprints and pods need; else ``ValueError``."""
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected texts, numbers, true, false, null, lists and keys with values; write others in quotes ({error})"
        ) from error
    return value


def _true_false_or_all(value: Any) -> Any:
    if not isinstance(value, bool) and value != "all":
        raise ValueError("expected true, false or all")
    return value


def _channels(value: Any) -> Any:
    listed = isinstance(value, list | tuple)
    numbers = value if listed else [value]
    if not all(type(number) is int and 0 <= number <= _MOST for number in numbers) or value == 0 or not numbers:
        raise ValueError(
            f"expected the number of channels that the model gives, from 1 to {_MOST}, or a list of those of them to "
            "take, counted from 0, such as [1, 3]"
        )
    if len(set(numbers)) != len(numbers):
        raise ValueError("expected each channel once")
    return tuple(numbers) if listed else value


def _key_or_index(value: Any) -> Any:
    if value is not None and type(value) not in (str, int):
        raise ValueError("expected the key or the index of one of the model's outputs")
    return value


Size = Annotated[Vector, BeforeValidator(_three_positive_integers)]
Offset = Annotated[Vector, BeforeValidator(_three_integers)]
StoragePath = Annotated[str, BeforeValidator(check_address)]
WritablePath = Annotated[str, BeforeValidator(check_writable)]
FillMissing = Annotated[bool | Literal["all"], BeforeValidator(_true_false_or_all)]
Corners = Annotated[tuple[Vector, Vector], BeforeValidator(_two_corners)]


class Section(BaseModel):
    """A section of the spec, frozen. Unknown keys are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputSpec(Section):
    """The layer to read."""

    path: StoragePath
    """Address of the layer to read: any that CloudVolume reads (``file://``, ``gs://``, ``s3://``,
    ``https://``, …), with ``zarr://`` or ``n5://`` before it for those formats.
    """
    mip: int = Field(0, ge=0)
    """Scale of the layer."""
    bounds: Corners | None = None
    """What of the layer is looked at, ``[[z, y, x] start, [z, y, x] stop]``.

    Patches that reach past are padded. A run in Airflow sets it, and ``roi``, to what its
    ``prepare`` has found. Of a layer that grows, write the new storage chunks first and ``info``
    last; those that the old end had cut short may go then. Default: the layer's.
    """
    padding: Literal["reflect", "edge", "constant"] = "reflect"
    """How patches are filled beyond the input's bounds: ``reflect``, ``edge``, ``constant`` (0)."""
    fill_missing: FillMissing = False
    """Whether missing storage chunks are read as zeros, instead of stopping with exit code 66.

    ``all``: also if not a single one is there, which ``prepare`` refuses otherwise.
    """
    values: ValuesSpec = ValuesSpec()
    """Which numbers the network gets for the voxels of the layer."""
    prefetch: int = Field(1, ge=1, le=_MOST)
    """Number of steps, each of one storage chunk's depth, that are read ahead of the patches."""


class MaskSpec(Section):
    """A layer whose nonzero voxels say where there is something to do.

    It is aligned with the input by voxel size.
    """

    path: StoragePath
    """Address of a layer whose nonzero voxels say where there is something to do.

    It is aligned with the input by voxel size and offset in nm. Patches outside are not run, and
    blocks outside read nothing; the output is 0 outside the mask.
    """
    mip: int = Field(0, ge=0)
    """Scale of the layer."""
    fill_missing: FillMissing = False
    """Whether missing storage chunks are read as zeros, instead of stopping with exit code 66.

    ``all``: also if not a single one is there, which ``prepare`` refuses otherwise.
    """


class SkipSpec(Section):
    """Which patches are not run. They contribute nothing."""

    zeros: bool = True
    """Whether patches whose input is all zeros are not run. They contribute zeros."""
    mask: MaskSpec | None = None
    """A layer that says where there is something to do."""


class OutputSpec(Section):
    """The layer to write."""

    @model_validator(mode="before")
    @classmethod
    def _format_of_path(cls, values: Any) -> Any:
        """Let the format say what the path's prefix does, and the other way round."""
        if not isinstance(values, dict) or not isinstance(path := values.get("path"), str):
            return values
        prefix = layer_format(path)
        if prefix in ("zarr", "zarr3"):
            values = {"format": "ome-zarr"} | values
            if values["format"] != "ome-zarr":
                raise ValueError(f"format: {values['format']}, and the path says {prefix}, expected the same format")
        if prefix in ("zarr2", "n5"):
            raise ValueError(f"path: {prefix} is not written, expected format: precomputed or ome-zarr")
        if values.get("format") != "ome-zarr":
            return values
        if path.startswith("precomputed://") or values.get("compression") == "br":
            what = "path: it says precomputed" if path.startswith("precomputed://") else "compression: zarr has no br"
            raise ValueError(f"{what}, and format says ome-zarr")
        return values | {"path": ZARR + plain(path)}

    @model_validator(mode="after")
    def _read_chunk(self) -> OutputSpec:
        if self.read_chunk_size is not None:
            if self.format != "ome-zarr" or self.chunk_size is None:
                raise ValueError("read_chunk_size: needs format: ome-zarr, and chunk_size")
            if any(size % part for size, part in zip(self.chunk_size, self.read_chunk_size, strict=True)):
                raise ValueError(f"read_chunk_size: {self.read_chunk_size}, expected a divisor of chunk_size")
        return self

    path: WritablePath
    """Address of the layer to write, which ``prepare`` makes."""
    channels: Annotated[int | tuple[int, ...], BeforeValidator(_channels)] = 1
    """Number of channels that the model gives; or which of them to take, in this order, counted
    from 0: ``[1, 3]`` takes two. The others are neither blended nor stored.
    """
    dtype: Literal["uint8", "uint16", "float16", "float32"] = "uint8"
    """``uint8`` and ``uint16`` map ``output.range`` to 0–255 and 0–65535, ``float32`` stores the
    values as they are, ``float16`` rounds them. See docs/models.md.
    """
    threshold: float | None = None
    """Stores 1 where a blended value is at least this number, and 0 elsewhere, as ``uint8``.
    Default: values are stored.
    """
    argmax: bool = False
    """Whether one channel is stored, as ``uint8``, with the index of the channel whose blended
    value is the largest; of several that are, of the first. See docs/models.md.
    """
    chunk_size: Size | None = None
    """Size of a storage chunk in voxels, zyx.

    Default: a divisor of the block near 32 × 128 × 128.
    """
    format: Literal["precomputed", "ome-zarr"] = "precomputed"
    """Format of the layer: ``precomputed``, or ``ome-zarr`` (version 0.5, on zarr 3)."""
    read_chunk_size: Size | None = None
    """With ``ome-zarr``: size of what readers can read of a storage chunk, which is then a shard.

    It divides ``chunk_size``. Default: none, a storage chunk is read whole.
    """
    compression: Literal["gzip", "br", "zstd", "none"] = "gzip"
    """Compression of storage chunks: ``gzip``, ``br`` (not in ``ome-zarr``), ``zstd``, ``none``."""
    range: Annotated[tuple[float, float], BeforeValidator(_low_and_high)] = (0.0, 1.0)
    """Least and largest value that the model can give.

    It sets the exact step of the sums. Other values stop the block with exit code 65.
    """
    affinities: Convention = None
    """Affinities that the layer holds, told as ``model.affinities``: the network's edges in another
    order, or stored at the other voxel. See docs/models.md. Default: those of the network, as it
    gives them.
    """

    @property
    def taken(self) -> tuple[int, ...] | None:
        """Which channels of the model's output are taken; None for all."""
        return None if isinstance(self.channels, int) else self.channels

    @property
    def told_channels(self) -> str:
        """``channels`` as YAML has it, for a message."""
        return str(self.channels if isinstance(self.channels, int) else list(self.channels))

    @property
    def summed_channels(self) -> int:
        """Number of channels that are blended."""
        return self.channels if isinstance(self.channels, int) else len(self.channels)

    @property
    def stored_channels(self) -> int:
        """Number of channels of the layer."""
        return self.conversion.channels(self.summed_channels)

    @property
    def kind(self) -> Literal["image", "segmentation"]:
        """What the layer is: one of labels has a single channel, by its format."""
        return "segmentation" if not self.conversion.is_plain and self.stored_channels == 1 else "image"

    @property
    def conversion(self) -> Conversion:
        """What becomes of complete sums."""
        return Conversion(self.dtype, ExactStep(*self.range), self.threshold, self.argmax)

    @model_validator(mode="after")
    def _storable(self) -> OutputSpec:
        low, high = self.range
        largest = max(abs(low), abs(high))
        problems = {
            "argmax: with threshold, expected one of the two": self.argmax and self.threshold is not None,
            f"dtype: {self.dtype}, expected uint8 with {'argmax' if self.argmax else 'threshold'}": (
                self.dtype != "uint8" and not self.conversion.is_plain
            ),
            f"argmax: of {self.summed_channels} channels (output.channels), expected from 2 to {_MOST_CLASSES}": (
                self.argmax and not 2 <= self.summed_channels <= _MOST_CLASSES
            ),
            f"threshold: {self.threshold or 0:g}, expected a number above {low:g} and up to {high:g} "
            "(output.range), as values lie there": self.threshold is not None and not low < self.threshold <= high,
            f"range: [{low:g}, {high:g}]: float16 goes to {_LARGEST_HALF:g}, and has fewer bits below "
            f"{_LEAST_HALF:.2g}; expected numbers whose larger one is between, or output.dtype: float32": (
                self.dtype == "float16" and not _LEAST_HALF <= largest <= _LARGEST_HALF
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
        return self


class KeepDays(Section):
    """How long donations are kept after their blending, in days."""

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
    """Address of the folder where blocks leave donations and receipts: any storage that CloudFiles
    reaches.
    """
    donations: Annotated[Literal["delete", "keep"] | KeepDays, BeforeValidator(_retention)] = "delete"
    """What cleanup does with donations once the blocks that they are for are complete: ``delete``,
    ``keep``, or ``{days: N}``, which deletes them N days later. Kept donations spare their donors a
    second inference when a neighbour changes.
    """


class ModelSpec(Section):
    """The convnet and how it is run."""

    engine: Literal["identity", "pytorch", "openvino", "onnx", "pznet"]
    """What runs the network: ``pytorch``, ``openvino``, ``onnx``, ``pznet``, or ``identity`` (the
    input repeated over the channels). See docs/models.md.
    """
    path: str | None = None
    """Model file, or the folder of a net of pznet: relative to the spec's folder, or an address
    (``gs://``, ``s3://``). See docs/models.md and docs/storage.md.
    """
    network: str | None = None
    """What makes the network: a class or function of the ``.py`` file in ``path``, or, without
    ``path``, one of an installed package by its dotted name, such as
    ``monai.networks.nets.BasicUNet``. Default: the file's own ``InstantiatedModel``,
    ``load_model`` or ``PatchInferencer``.
    """
    arguments: Annotated[dict[str, Any], BeforeValidator(_of_json)] = {}
    """What ``network`` is called with, by name.

    ``{import: torch.nn.Conv3d}`` stands for what has that dotted name.
    """
    weights: str | list[str] | None = None
    """Checkpoint, relative to the spec's folder, or an address (``gs://``, ``s3://``).

    A list, such as of folds, is for the mean of the outputs of as many networks.
    """
    weights_key: str | None = None
    """Which weights of the checkpoint to take, if several fit the network: the keys that lead to
    them, with dots between, such as ``ema`` or ``state_dict.model``. Default: the only ones that
    fit. See docs/models.md.
    """
    files: list[str] = []
    """Further files that the network opens: paths or globs relative to the spec's folder, or
    addresses in the folder of ``model.path`` if that is one. See docs/models.md.
    """
    dimensions: Literal[2, 3] = 3
    """Dimensions of the network: 3, or 2 for one that takes ``(batch, channels, y, x)``.

    Each section of a patch is then run by itself.
    """
    batch_size: int = Field(1, ge=1, le=_MOST)
    """Number of patches of one forward pass on a GPU; a short last batch is filled up.

    CPUs run each patch by itself.
    """
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers that the network computes with: ``float32``, ``bfloat16``, ``float16``."""
    threads: int = Field(1, ge=1, le=_MOST)
    """Number of CPU threads of one forward pass.

    It is part of the fingerprint, as it can change a network's last bits.
    """
    streams: int | None = Field(None, ge=1, le=_MOST)
    """Number of forward passes at a time on CPUs.

    It changes no bit; more of them need more memory for the network. Default: CPUs ÷ threads.
    """
    compile: bool = False
    """Whether PyTorch compiles the network (``torch.compile``)."""
    augmentation: Literal["none", "flips", "flips_transpose"] = "none"
    """Orientations of each patch to average over: ``none``, ``flips`` (8), ``flips_transpose`` (16,
    with y and x exchanged).
    """
    outputs: Literal["independent", "affinity"] = "independent"
    """What the channels are: ``independent``, or ``affinity``: 3 channels, the affinities of a
    voxel to the one before it along x, y, z, in this order; augmentation then permutes and shifts
    them. Other affinities: ``model.affinities``.
    """
    affinities: Convention = None
    """Affinities that the network gives: ``abiss``, ``deepem``, ``waterz``, ``pytc_deepem``,
    ``pytc_banis``, or the offset of each channel, such as ``[[-1, 0, 0], [0, -9, 0]]`` (zyx, the
    affinity of v and v + offset stored at v). See docs/models.md. Default: as ``model.outputs``
    says.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs: ``auto``, ``cpu``, ``cuda``."""
    mixed_hardware: bool = False
    """Whether blocks may be done on machines that give other last bits than the one on which
    ``prepare`` ran; their receipts say so. Otherwise such a machine stops with exit code 78. See
    docs/models.md.
    """
    channels: int | None = Field(None, ge=1, le=_MOST)
    """Number of channels that the network gives, where ``output.channels`` lists some of them; any
    other number is then refused. Default: any that has those.
    """
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    """Function applied to the network's output, before anything is blended: ``none``, or for
    networks that give logits ``sigmoid``, or ``softmax`` over all of the network's channels.
    """
    output: Annotated[str | int | None, BeforeValidator(_key_or_index)] = None
    """Key or index of the output to take, of a network with several.

    Default: the first of a list, the fitting one of a dict.
    """
    batch_statistics: bool = False
    """Whether batch normalisation takes the statistics of the patch itself, instead of those of the
    training. It needs ``batch_size: 1``.
    """
    trust: bool = False
    """Whether files are allowed that can run code when they are loaded: checkpoints that are
    pickles, and ``.pt2`` archives.
    """
    options: Annotated[dict[str, Any], BeforeValidator(_of_json)] = {}
    """What only one engine knows, such as OpenVINO's own settings."""

    @model_validator(mode="after")
    def _complete(self) -> ModelSpec:
        if self.engine != "identity" and self.path is None and self.network is None:
            raise ValueError(f"path: missing; the engine {self.engine} needs a model file")
        if self.engine == "identity" and (self.path or self.network or self.weights or self.files):
            raise ValueError("path, network, weights, files: the identity engine takes none")
        if self.batch_statistics and self.batch_size != 1:
            raise ValueError(
                "batch_size: with batch_statistics it must be 1, or a patch's output would depend on its neighbours"
            )
        self._check_engine()
        self._check_network()
        for name in self.files:
            self._check_file(name)
        return self

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints that ``weights`` names."""
        return [self.weights] if isinstance(self.weights, str) else self.weights or []

    @property
    def title(self) -> str:
        """What messages call the model: its file, or else the dotted name of its network."""
        return self.path or self.network or self.engine

    def _check_network(self) -> None:
        """Refuse keys that say in another way, or not at all, what makes the network."""
        if self.weights == []:
            raise ValueError("weights: expected a checkpoint, or a list of one or more")
        if self.network is None:
            if self.arguments:
                raise ValueError("arguments: only with model.network, which is called with them")
            return
        if not all(part.isidentifier() for part in self.network.split(".")):
            raise ValueError(f"network: {self.network}: expected a name of Python, such as UNet")
        if self.engine not in ("pytorch", "openvino"):
            raise ValueError(f"network: only for the engines pytorch and openvino, not for {self.engine}")
        if self.path is None and "." not in self.network:
            raise ValueError(
                f"network: {self.network}: expected the file that has it in model.path, or the dotted name of what an "
                "installed package has, such as monai.networks.nets.UNet"
            )
        if self.path is not None and PurePath(self.path).suffix != ".py":
            raise ValueError(f"network: only with a .py file, or none; {self.path} has its network inside")

    def _check_file(self, name: str) -> None:
        """Refuse a file that can't be brought to where the model is."""
        place = self._place
        if "\0" in name:
            raise ValueError(f"files: {name!r}: expected a path without the character \\0")
        if place is None and is_remote(name):
            raise ValueError(f"files: {name}: expected a path, as model.path is one")
        if place is not None and self.engine == "pznet":
            raise ValueError(f"files: {name}: the whole folder {self.path} is fetched, expected none")
        if place is not None and (not name.startswith(place) or ".." in name.split("/")):
            raise ValueError(f"files: {name}: expected an address in the folder of model.path, such as {place}name")

    @property
    def _place(self) -> str | None:
        """Address of the folder of ``path``, with a slash at its end; None if it is on a disk."""
        return f"{self.path.rpartition('/')[0]}/" if self.path and is_remote(self.path) else None

    @property
    def files_beside(self) -> tuple[str, ...]:
        """``files``, relative to the folder of ``path`` if that is an address."""
        return tuple(name.removeprefix(self._place or "") for name in self.files)

    def _check_engine(self) -> None:
        """Refuse addresses that models can't be fetched from, and what the engine would ignore."""
        for key, value in [("path", self.path), *(("weights", name) for name in self.checkpoints)]:
            if value and "://" in value and not is_fetchable(value):
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
            "weights_key: only with model.weights, in which it chooses": self.weights_key is not None
            and not self.weights,
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
