"""Everything about one volume, checked across sections: geometry, grid of blocks, fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator, model_validator

from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.lattice.affinities import CONVENTIONS, Offsets
from chunkflow_core.lattice.blocks import AxisBlock, BlockGrid
from chunkflow_core.lattice.boxes import AXES, Box, Vector, vector
from chunkflow_core.lattice.weights import MAX_PATCH, NUMERICS_VERSION
from chunkflow_core.spec.affinities import check_conversion, check_orientations
from chunkflow_core.spec.runner import LocalRunner, RunnerSpec
from chunkflow_core.spec.schedule import NotifySpec, OptionalSchedule
from chunkflow_core.spec.sections import (
    Corners,
    ExchangeSpec,
    InputSpec,
    ModelSpec,
    Offset,
    OutputSpec,
    Section,
    Size,
    SkipSpec,
)
from chunkflow_core.spec.values import ValuesSpec
from chunkflow_core.storage.addresses import is_remote, is_same_place
from chunkflow_core.storage.digests import short_digest
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.model_files import fetch, listed_files, with_companions
from chunkflow_core.variables import Place

MOST_BLOCKS = 10**8
"""Number of blocks that a volume may have; each of them is listed in memory."""

_LATER = {
    "model": ("weights_key", "dimensions", "affinities", "channels", "network", "arguments"),
    "output": ("format", "read_chunk_size", "affinities", "threshold", "argmax"),
}
"""Keys that are younger than fingerprints, by section; see ``VolumeSpec.unset_later``."""

_STORED = ("compression", "format", "read_chunk_size")
"""Keys of ``output`` that decide how voxels are stored, and not which."""

STORAGE_CHUNK_TARGET: Vector = (32, 128, 128)
"""Size in voxels, zyx, to which the default storage chunk is near.

Along each axis it is the nearest divisor of the block size.
"""


class VolumeSpec(Section):
    """Everything about one volume. Sizes in voxels, order z, y, x."""

    name: str
    """Name of the volume and its DAG: letters, digits, ``.``, ``-``, ``_``."""
    input: InputSpec
    """The layer to read."""
    output: OutputSpec
    """The layer to write."""
    exchange: ExchangeSpec
    """Where blocks leave donations and receipts for each other."""
    roi: Corners | None = None
    """Region of interest: what of the input gets an output, ``[[z, y, x] start, [z, y, x] stop]``.

    A DAG whose input is not ``file://`` should state it, or each parsing asks the storage. Default:
    the input's bounds.
    """
    patch_size: Size
    """Size of an input patch."""
    output_patch_size: Size | None = None
    """Size of an output patch, for networks whose output is smaller; the difference must be even.

    Default: ``patch_size``.
    """
    patch_overlap: Offset
    """Overlap of output patches along each axis: any from 0 to patch − 1."""
    block_size: Size
    """What one task does: a multiple of the stride (patch − overlap) and of the storage chunk."""
    model: ModelSpec
    """The convnet and how it is run."""
    skip: SkipSpec = SkipSpec()
    """Which patches are not run."""
    runner: RunnerSpec = LocalRunner()
    """What does the tasks of the DAG."""
    schedule: OptionalSchedule = None
    """When runs start by themselves: a cron expression or preset (``"0 3 * * 1"``, ``"@weekly"``),
    or a section. Default: only by hand.
    """
    notify: NotifySpec | None = None
    """Who is told how a run has ended. Default: nobody."""
    folder: str = Field(".", exclude=True)
    """Folder of the spec file, to which the model's paths are relative; set on loading."""
    _texts: dict[Place, str] = PrivateAttr(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _identifier(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]{1,200}", value, re.ASCII):
            raise ValueError("expected 1 to 200 letters, digits, dots, dashes and underscores (it names the DAG)")
        return value

    @model_validator(mode="after")
    def _geometry(self) -> VolumeSpec:
        output = self.output_size
        for a, n in enumerate(AXES):
            patch, overlap, block = output[a], self.patch_overlap[a], self.block_size[a]
            if patch > MAX_PATCH:
                raise ValueError(f"patch_size: {patch} along {n}, expected at most {MAX_PATCH}")
            if patch > self.patch_size[a] or (self.patch_size[a] - patch) % 2:
                raise ValueError(
                    f"output_patch_size: {patch} along {n}, expected at most patch_size {self.patch_size[a]} and "
                    "smaller by an even number (the same margin on both sides)"
                )
            if not 0 <= overlap < patch:
                raise ValueError(f"patch_overlap: {overlap} along {n}, expected 0 to {patch - 1} (less than the patch)")
            chunk = self.output.chunk_size[a] if self.output.chunk_size else 1
            _check_block(n, block, patch - overlap, chunk, overlap)
        if self.model.dimensions == 2 and output[0] != self.patch_size[0]:
            raise ValueError(
                f"output_patch_size: {output[0]} along z, expected patch_size {self.patch_size[0]}, as a network of "
                "two dimensions (model.dimensions: 2) gives a section for each section"
            )
        self._check_augmentation()
        self._check_channels()
        paths = {"input": self.input.path, "output": self.output.path, "exchange": self.exchange.path}
        for (first, one), (second, other) in [
            ((a, p), (b, q)) for a, p in paths.items() for b, q in paths.items() if a < b
        ]:
            if is_same_place(one, other):
                raise ValueError(f"{second}.path: {other} is {first}.path too, expected another place")
        return self

    def _check_augmentation(self) -> None:
        if self.model.outputs == "affinity" and self.output.summed_channels != 3:
            raise ValueError(
                f"model.outputs: affinity needs output.channels: 3, or a list of three, got {self.output.told_channels}"
            )
        self._check_affinities()
        if self.model.augmentation == "flips_transpose":
            for key, (_, y, x) in {"patch_size": self.patch_size, "output_patch_size": self.output_size}.items():
                if y != x:
                    raise ValueError(f"model.augmentation: flips_transpose needs {key} with y = x, got {y} and {x}")

    def _check_affinities(self) -> None:
        given, wanted = self.network_affinities, self.layer_affinities
        if self.model.outputs == "affinity" and self.model.affinities:
            raise ValueError(
                "model.outputs: affinity is the same as model.affinities: abiss, expected only one of them"
            )
        if not given:
            if wanted:
                raise ValueError("output.affinities: needs model.affinities, which says what the network gives")
            return
        if len(given) != self.output.summed_channels:
            raise ValueError(
                f"model.affinities: {len(given)} offsets for output.channels: {self.output.told_channels}, expected "
                "one for each channel that is taken"
            )
        check_orientations(given, self.model.augmentation)
        check_conversion(given, wanted, self.model.augmentation, self.patch_overlap)

    @property
    def network_affinities(self) -> Offsets:
        """Offsets of the affinities that are taken of the network's; empty if it gives none."""
        return self.model.affinities or (CONVENTIONS["abiss"] if self.model.outputs == "affinity" else ())

    @property
    def layer_affinities(self) -> Offsets:
        """Offsets of the affinities that the layer holds; empty if it holds none."""
        return self.output.affinities or self.network_affinities

    def _check_channels(self) -> None:
        model, output, are_affinities = self.model, self.output, bool(self.network_affinities)
        problems = {
            f"model.channels: {model.channels}, but output.channels: {output.channels}, which is all that the model "
            "gives; list there which of them to take, such as [0, 1]": (
                output.taken is None and model.channels not in (None, output.channels)
            ),
            f"output.channels: {output.told_channels}: the model gives {model.channels} channels (model.channels), "
            "which are counted from 0": model.channels is not None and max(output.taken or (0,)) >= model.channels,
            "model.activation: softmax is for channels of which one holds, expected none or sigmoid with "
            "model.outputs: affinity or model.affinities": model.activation == "softmax" and are_affinities,
            "model.activation: softmax of a single channel is 1 everywhere; expected sigmoid, or output.channels: "
            "2 or more": model.activation == "softmax" and 1 in (output.channels, model.channels),
            "output.argmax: the largest of several affinities is no class, expected model.outputs: independent": (
                output.argmax and are_affinities
            ),
            f"output.threshold: {output.threshold or 0:g}: voxels of patches that are not run as their input is all "
            "zeros have the value 0, which is as large; set skip.zeros: false, or a threshold above 0": (
                output.threshold is not None and output.threshold <= 0 and self.skip.zeros
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)

    @property
    def texts(self) -> Mapping[Place, str]:
        """What the file says where it has variables, such as ``gs://${BUCKET}/em``, by place.

        Such a text, and not the value, goes into whatever is for people or lies in storage.
        """
        return self._texts

    def came_from(self, texts: Mapping[Place, str]) -> VolumeSpec:
        """Note what the file says where it has variables; returns this spec."""
        self._texts = dict(texts)
        return self

    def written(self, section: str, key: str = "path") -> str:
        """A text of a section as the file has it, with variables in place of their values."""
        return self._texts.get((section, key)) or str(getattr(getattr(self, section), key))

    @property
    def output_size(self) -> Vector:
        """Size of the patches that the model gives, in voxels."""
        return self.output_patch_size or self.patch_size

    @property
    def halo(self) -> Vector:
        """Context of an input patch around its output patch, in voxels on each side."""
        return vector((i - o) // 2 for i, o in zip(self.patch_size, self.output_size, strict=True))

    @property
    def storage_chunk(self) -> Vector:
        """Storage chunk size of the output layer, in voxels."""
        return self.output.chunk_size or vector(map(_divisor_near, self.block_size, STORAGE_CHUNK_TARGET))

    @cached_property
    def input_scale(self) -> LayerScale:
        """The input layer's scale, with bounds, resolution and dtype.

        Raises:
            MissingInputError: There is no such layer, or it does not have the mip.
            SpecError: ``input.values`` makes no sense for its voxels.
            StorageError: The storage does not answer.
        """
        scale = read_scale(self.input.path, self.input.mip)
        self.input.values.check_layer(scale.dtype, scale.channels)
        return scale

    @cached_property
    def input_bounds(self) -> Box:
        """Box whose voxels are read; patches that extend past it are padded.

        Raises:
            SpecError: The layer does not have all of ``input.bounds``.
            MissingInputError: The layer can't be read.
        """
        bounds, layer = self.input.bounds, self.input_scale.bounds
        if bounds is None:
            return layer
        if Box(*bounds) not in layer:
            raise SpecError(
                f"input.bounds: {Box(*bounds)} reach past the layer {self.input.path}, which has {layer}; give a part "
                "of it"
            )
        return Box(*bounds)

    @cached_property
    def grid(self) -> BlockGrid:
        """The lattice and its blocks.

        The input layer's bounds are read if the spec has no ``roi``.

        Raises:
            SpecError: There are more blocks than can be listed.
        """
        roi = Box(*self.roi) if self.roi else self.input_bounds
        grid = BlockGrid(roi, self.output_size, self.patch_overlap, self.block_size, self.storage_chunk)
        if math.prod(grid.shape) > MOST_BLOCKS:
            raise SpecError(
                f"block_size: {' × '.join(map(str, grid.shape))} blocks along z, y, x for the ROI {roi}, expected at "
                f"most {MOST_BLOCKS:,}; give larger blocks, or a smaller roi"
            )
        return grid

    @property
    def unset_later(self) -> dict[str, dict[str, Any]]:
        """Keys, by section, that are younger than fingerprints and records, and are not set.

        These say what was done before there were such keys, so nothing is said of them. They are
        given as pydantic's ``exclude`` takes them.
        """
        values = self.input.values
        unset = True if values.is_default else dict.fromkeys(_defaults(values, type(values).model_fields), True)
        later = {name: dict.fromkeys(_defaults(getattr(self, name), keys), True) for name, keys in _LATER.items()}
        return {**later, "input": {"values": unset}}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the output's numbers, and of where they go.

        It names the folder in the exchange. The ROI's end and the input's bounds are left out, so
        that a growing volume keeps its finished blocks: what of them matters is in each block's own
        digest (``block_digest``).
        """
        later = self.unset_later
        meaningless = dict.fromkeys(("path", "weights", "files", "device", "mixed_hardware", "streams"), True)
        facts = {
            "numerics": NUMERICS_VERSION,
            "input": _same_voxels(
                self.input.model_dump(exclude=dict.fromkeys(("prefetch", "bounds"), True) | later["input"])
            ),
            "skip": _same_voxels(self.skip.model_dump()),
            "output": self.output.model_dump(exclude=dict.fromkeys(_STORED, True) | later["output"]),
            "origin": self.grid.roi.start,
            "patch": [self.patch_size, self.output_size, self.patch_overlap],
            "block": self.block_size,
            "chunk": self.storage_chunk,
            "model": self.model.model_dump(exclude=meaningless | later["model"]),
            "files": self._file_digests,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _file_digests(self) -> list[str]:
        """Digests of the model's files, as they were when the fingerprint was made."""
        return [_digest(path) for path in self.model_files]

    def check_model_files(self) -> None:
        """Check that the model's files are still those of the fingerprint.

        Call it after they have been loaded: what was replaced before that is noticed.

        Raises:
            SpecError: One of them has been replaced since.
            MissingInputError: One of them is gone.
        """
        known = self._file_digests
        if [_digest(path) for path in self.model_files] != known:
            raise SpecError(
                f"the files of the model have changed since the fingerprint {self.fingerprint} was made of them: start "
                "the run again, and replace model files only between runs"
            )

    def block_digest(self, index: Vector) -> str:
        """Hash of what decides a block's numbers.

        It covers the fingerprint, the block's geometry, and where its input is padded. The ends of
        the ROI and of the input count only where the block's patches touch them: a block far from
        them stays valid when the volume grows.
        """
        texts = (texts[i] for texts, i in zip(self._axis_digests, index, strict=True))
        return short_digest("|".join((self.fingerprint, *texts)).encode())

    @cached_property
    def _axis_digests(self) -> list[list[str]]:
        """Texts of what decides numbers, for each axis and each block along it."""
        grid, bounds = self.grid, self.input_bounds
        digests = []
        for a, blocks in enumerate(grid.axis_blocks):
            halo, low, high = self.halo[a], bounds.start[a], bounds.stop[a]
            texts = []
            for block in blocks:
                first = grid.roi.start[a] + block.first_patch * grid.stride[a]
                last = grid.roi.start[a] + (block.stop_patch - 1) * grid.stride[a] + grid.patch[a]
                before, after = low - (first - halo), last + halo - high
                both = max(before, after) >= high - low  # what is padded is reflected more than once
                padded = [low if before > 0 or both else None, high if after > 0 or both else None]
                texts.append(json.dumps([_geometry(block), padded]))
            digests.append(texts)
        return digests

    def model_path(self, name: str) -> Path:
        """Path of a model file of the spec on this machine; for pznet, of a folder.

        One at a storage address is fetched into the cache, with its companions.

        Raises:
            MissingInputError: There is no such file or folder.
            SpecError: The storage refuses the credentials, or the cache can't be written.
            StorageError: The storage does not answer.
        """
        if is_remote(name):
            files = self.model.files_beside if name == self.model.path else ()
            return fetch(name, folder=self.model.engine == "pznet", files=files)
        path = Path(self.folder) / Path(name.removeprefix("file://")).expanduser()
        if self.model.engine == "pznet":
            if not path.is_dir():
                raise MissingInputError(f"the folder {path} does not exist (model.path of the spec, a net of pznet)")
        elif path.is_dir():
            raise SpecError(
                f"{path} is a folder, expected a file (model.path and model.weights of the spec). Of a published "
                f"model, `chunkflow-core model {path}` prints the lines to write"
            )
        elif not path.is_file():
            raise MissingInputError(f"model file {path} does not exist (model.path and model.weights of the spec)")
        return path

    @property
    def model_files(self) -> list[Path]:
        """The files that make the model: weights, model file, and what it brings along.

        That is: the siblings that a Python file imports, the weights beside an OpenVINO file, the
        files that an ONNX file names, a net's whole folder; and what ``model.files`` lists.
        """
        files, folder = [self.model_path(name) for name in self.model.checkpoints], Path(self.folder)
        if self.model.path is not None:
            path = self.model_path(self.model.path)
            files += with_companions(path)
            folder = path.parent if is_remote(self.model.path) else folder
        return files + [file for file in listed_files(folder, self.model.files_beside) if file not in files]


def _defaults(section: Section | ValuesSpec, keys: Iterable[str]) -> Iterator[str]:
    """Those of some keys of a section that have their defaults."""
    return (key for key in keys if getattr(section, key) == type(section).model_fields[key].default)


def _same_voxels(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section in which ``fill_missing`` says what is read, not what ``prepare`` refuses."""
    return {
        key: _same_voxels(value) if isinstance(value, dict) else bool(value) if key == "fill_missing" else value
        for key, value in section.items()
    }


def _geometry(block: AxisBlock) -> dict[str, int]:
    """What of a block along one axis is digested.

    The names are stored for good, whatever the fields are called.
    """
    return {
        "start": block.start,
        "stop": block.stop,
        "chunk_stop": block.reach_stop,
        "core_start": block.core_start,
        "first_patch": block.first_patch,
        "stop_patch": block.stop_patch,
        "near": block.near,
    }


def _check_block(axis: str, block: int, stride: int, chunk: int, overlap: int) -> None:
    step = math.lcm(stride, chunk)
    least = max(step, -(-overlap // step) * step)
    if block % step == 0 and block >= least:
        return
    nearest = sorted({max(least, block // step * step), max(least, -(-block // step) * step)})
    parts = f"the stride {stride} (patch - overlap)" + (f" and of output.chunk_size {chunk}" if chunk > 1 else "")
    raise ValueError(
        f"block_size: {block} along {axis}, expected a multiple of {parts}, at least the overlap {overlap}; "
        f"nearest: {' or '.join(map(str, nearest))}"
    )


def _divisor_near(block: int, target: int) -> int:
    small = [d for d in range(1, math.isqrt(block) + 1) if block % d == 0]
    return min([*small, *(block // d for d in small)], key=lambda d: (abs(math.log(d / target)), d))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MissingInputError(f"model file {path} can't be read: {error.strerror}") from error
