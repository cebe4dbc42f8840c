"""The volume spec: one YAML file that says everything about a run. Parsed, validated, completed, fingerprinted.

This module is imported whenever Airflow parses its DAG files, so it imports neither torch nor cloudvolume.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path, PurePath
from types import UnionType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from chunkflow_core.digests import short_digest
from chunkflow_core.errors import MissingInputError, SpecError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import AXES, Box, Vector, vector
from chunkflow_core.lattice.weights import MAX_PATCH, NUMERICS_VERSION
from chunkflow_core.runner_spec import RUNNERS, LocalRunner, RunnerSpec
from chunkflow_core.schedule_spec import NotifySpec, Schedule
from chunkflow_core.spec_transport import FROM_ENVIRONMENT, check_transportable, from_environment
from chunkflow_core.storage.layer_info import LayerScale, read_scale
from chunkflow_core.storage.model_files import fetch, with_companions
from chunkflow_core.yaml_text import parse_yaml, problem_in_yaml

ENGINES = ("identity", "pytorch", "openvino", "onnx", "pznet")
"""Names of the engines; each is a module of ``chunkflow_core.engines``."""

STORAGE_CHUNK_TARGET: Vector = (32, 128, 128)
"""The default storage chunk is the divisor of the block that is nearest to this, per axis."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputSpec(_Section):
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


class MaskSpec(_Section):
    """A layer that says where there is something to do: nonzero voxels. Aligned with the input by voxel size."""

    path: StoragePath
    mip: int = Field(0, ge=0)
    fill_missing: bool = False
    """Whether storage chunks that aren't there are read as zeros; otherwise they are an error."""


class SkipSpec(_Section):
    """Which patches are not run. They contribute nothing."""

    zeros: bool = True
    """Patches whose input is all zeros."""
    mask: MaskSpec | None = None
    """Patches that no nonzero voxel of a mask touches; outside the mask the output is 0."""


class OutputSpec(_Section):
    """The layer to write."""

    path: WritablePath
    channels: int = Field(1, ge=1)
    dtype: Literal["uint8", "float32"] = "uint8"
    chunk_size: Size | None = None
    compression: Literal["gzip", "br", "zstd", "none"] = "gzip"
    range: Annotated[tuple[float, float], BeforeValidator(_low_and_high)] = (0.0, 1.0)
    """The values that the model can give; sets the exact grid of the sums and what uint8 0 and 255 mean."""


class KeepDays(_Section):
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


class ExchangeSpec(_Section):
    """Where blocks leave donations and receipts for each other."""

    path: WritablePath
    donations: Annotated[Literal["delete", "keep"] | KeepDays, BeforeValidator(_retention)] = "delete"
    """What cleanup does with donations once the blocks that they are for are complete."""


class ModelSpec(_Section):
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


class VolumeSpec(_Section):
    """Everything about one volume. Sizes in voxels, order z, y, x."""

    name: str
    input: InputSpec
    output: OutputSpec
    exchange: ExchangeSpec
    roi: Corners | None = None
    patch_size: Size
    output_patch_size: Size | None = None
    patch_overlap: Offset
    block_size: Size
    model: ModelSpec
    skip: SkipSpec = SkipSpec()
    runner: RunnerSpec = LocalRunner()
    schedule: Schedule = None
    """When runs start by themselves; in the file also a cron expression or preset such as ``@weekly``."""
    notify: NotifySpec | None = None
    """Who is told how a run has ended."""
    folder: str = Field(".", exclude=True)
    """Folder of the spec file, to which the model's paths are relative; set on loading."""

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
                    f"output_patch_size: {patch} along {n}, expected at most patch_size {self.patch_size[a]} and smaller "
                    "by an even number (the same margin on both sides)"
                )
            if not 0 <= overlap < patch:
                raise ValueError(f"patch_overlap: {overlap} along {n}, expected 0 to {patch - 1} (less than the patch)")
            chunk = self.output.chunk_size[a] if self.output.chunk_size else 1
            _check_block(n, block, patch - overlap, chunk, overlap)
        self._check_augmentation()
        paths = {"input": self.input.path, "output": self.output.path, "exchange": self.exchange.path}
        for (first, one), (second, other) in [
            ((a, p), (b, q)) for a, p in paths.items() for b, q in paths.items() if a < b
        ]:
            if _normalised(one) == _normalised(other):
                raise ValueError(f"{second}.path: {other} is {first}.path too, expected another place")
        return self

    def _check_augmentation(self) -> None:
        if self.model.outputs == "affinity" and self.output.channels != 3:
            raise ValueError(f"model.outputs: affinity needs output.channels: 3, got {self.output.channels}")
        if self.model.augmentation == "flips_transpose":
            for key, (_, y, x) in {"patch_size": self.patch_size, "output_patch_size": self.output_size}.items():
                if y != x:
                    raise ValueError(f"model.augmentation: flips_transpose needs {key} with y = x, got {y} and {x}")

    @property
    def output_size(self) -> Vector:
        """Size of the patches that the model gives."""
        return self.output_patch_size or self.patch_size

    @property
    def halo(self) -> Vector:
        """Context that an input patch has around its output patch, per side."""
        return vector((i - o) // 2 for i, o in zip(self.patch_size, self.output_size, strict=True))

    @property
    def storage_chunk(self) -> Vector:
        """Storage chunk size of the output layer."""
        return self.output.chunk_size or vector(map(_divisor_near, self.block_size, STORAGE_CHUNK_TARGET))

    @cached_property
    def input_scale(self) -> LayerScale:
        """Bounds, resolution and dtype of the input layer; ``MissingInputError`` if it can't be read."""
        return read_scale(self.input.path, self.input.mip)

    @cached_property
    def input_bounds(self) -> Box:
        """Where voxels are read; patches that reach past are padded. ``SpecError`` if the layer does not have them."""
        bounds, layer = self.input.bounds, self.input_scale.bounds
        if bounds is None:
            return layer
        if Box(*bounds) not in layer:
            raise SpecError(
                f"input.bounds: {Box(*bounds)} reach past the layer {self.input.path}, which has {layer}; give a part of it"
            )
        return Box(*bounds)

    @cached_property
    def grid(self) -> BlockGrid:
        """The lattice and its blocks. Reads the input layer's bounds if the spec has no ``roi``."""
        roi = Box(*self.roi) if self.roi else self.input_bounds
        return BlockGrid(roi, self.output_size, self.patch_overlap, self.block_size, self.storage_chunk)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the output's numbers, and of where they go: names the folder in the exchange.

        The ROI's end and the input's bounds are left out, so that a growing volume keeps its finished blocks: what of them
        matters is in each block's own digest (``block_digest``).
        """
        model = self.model.model_dump(exclude={"path", "weights", "device", "streams"})
        facts = {
            "numerics": NUMERICS_VERSION,
            "input": self.input.model_dump(exclude={"prefetch", "bounds"}),
            "skip": self.skip.model_dump(),
            "output": self.output.model_dump(exclude={"compression"}),
            "origin": self.grid.roi.start,
            "patch": [self.patch_size, self.output_size, self.patch_overlap],
            "block": self.block_size,
            "chunk": self.storage_chunk,
            "model": model,
            "files": [_digest(path) for path in self.model_files],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def block_digest(self, index: Vector) -> str:
        """Hash of what decides a block's numbers: the fingerprint, its geometry, and where its input is padded.

        The ends of the ROI and of the input count only where the block's patches reach them: a block far from them
        stays valid when the volume grows.
        """
        texts = (texts[i] for texts, i in zip(self._axis_digests, index, strict=True))
        return short_digest("|".join((self.fingerprint, *texts)).encode())

    @cached_property
    def _axis_digests(self) -> list[list[str]]:
        """For each axis and each block along it, what of it decides numbers, as text."""
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
                texts.append(json.dumps([asdict(block), padded]))
            digests.append(texts)
        return digests

    def model_path(self, name: str) -> Path:
        """Path of a model file of the spec on this machine (a folder for pznet); ``MissingInputError`` if there is none.

        One at a storage address is fetched into the cache, with its companions.
        """
        if "://" in name and not name.startswith("file://"):
            return fetch(name, folder=self.model.engine == "pznet")
        path = Path(self.folder) / Path(name.removeprefix("file://")).expanduser()
        if self.model.engine == "pznet":
            if not path.is_dir():
                raise MissingInputError(f"the folder {path} does not exist (model.path of the spec, a net of pznet)")
        elif not path.is_file():
            raise MissingInputError(f"model file {path} does not exist (model.path and model.weights of the spec)")
        return path

    @property
    def model_files(self) -> list[Path]:
        """The files that make the model: weights, model file, and what it brings along.

        That is: the siblings that a Python file imports, the weights beside an OpenVINO or ONNX file, a net's whole folder.
        """
        files = [self.model_path(self.model.weights)] if self.model.weights else []
        return files + (with_companions(self.model_path(self.model.path)) if self.model.path else [])


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> VolumeSpec:
    """Read a spec file.

    Args:
        path: YAML file; values may contain ``${ENVIRONMENT_VARIABLE}``. Or ``env:CHUNKFLOW_SPEC``: what
            ``spec_transport.to_environment`` gave, in which they have been replaced already.
        overrides: ``key.sub=value`` texts, the value in YAML; they replace what the file says.

    Raises:
        SpecError: naming file, key, value and what was expected.
    """
    if str(path).startswith(FROM_ENVIRONMENT):
        return _load_from_environment(str(path), overrides)
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot read the volume spec: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {problem_in_yaml(error)}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected keys and values (name, input, output, …), got {data!r:.60}")
    for override in overrides:
        _apply(data, override)
    return parse_spec(_substitute(data, str(path)), source=str(path), folder=str(path.resolve().parent))


def _load_from_environment(source: str, overrides: Iterable[str]) -> VolumeSpec:
    data = from_environment(source.removeprefix(FROM_ENVIRONMENT))
    for override in overrides:
        _apply(data, override)
    spec = parse_spec(data, source=source)
    check_transportable(spec, source=source)
    return spec


def parse_spec(data: dict[str, Any], *, source: str = "spec", folder: str = ".") -> VolumeSpec:
    """Validate the content of a spec; ``SpecError`` as in ``load_spec``, ``source`` naming where it came from."""
    if "folder" in data:
        raise SpecError(f"{source}: folder: unknown key")
    try:
        return VolumeSpec.model_validate({**data, "folder": folder})
    except ValidationError as error:
        raise SpecError("\n".join(f"{source}: {line}" for line in map(_explain, error.errors()))) from error


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {override}: expected key=value, such as model.threads=2")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, UnicodeEncodeError) as error:  # the latter: bytes of a command line that are no text
        value = text  # such as @daily or */5 * * * *, which in YAML would need quotes
        if text.startswith(("[", "{", '"', "'")):
            raise SpecError(f"--set {override}: the value is not valid YAML: {problem_in_yaml(error)}") from error
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:  # not there, or a section without keys
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise SpecError(f"--set {override}: {parent} is a value, it has no keys below it")
    data[last] = value


def _substitute(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {k: _substitute(v, f"{where}: {k}" if ": " not in where else f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise SpecError(f"{where}: {value}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return _VARIABLE.sub(lookup, value)


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: key, value, what was expected."""
    location = [str(part) for part in error["loc"] if part not in ("int", "str")]
    kind = location.pop(1) if location[:1] == ["runner"] and len(location) > 1 else "local"
    key, message, value = ".".join(location), error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] == "missing":
        return f"{key}: missing; this key is required"
    if error["type"] == "model_type":
        message = f"expected a section with keys below it ({', '.join(_fields(location, kind))})"
    if error["type"] == "extra_forbidden":
        known = _fields(location[:-1], kind)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    # of a whole section: the message begins with the key
    if error["type"] == "value_error" and isinstance(value, dict) and _fields(location, kind):
        return f"{key}.{message}" if key else message
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return f"{key}: {shown if len(shown) < 80 else shown[:77] + '...'}: {message[:1].lower() + message[1:]}"


def _fields(location: Sequence[str], runner: str) -> list[str]:
    """Keys of the section at a location; none if there is a value. ``runner`` is the kind of the runner section."""
    section: Any = VolumeSpec
    for name in location:
        fields = getattr(section, "model_fields", {})
        if name.isdigit() or name not in fields:  # an element of a list, or a key of a mapping
            section = next((part for part in get_args(section) if hasattr(part, "model_fields")), None)
        else:
            section = RUNNERS[runner] if (section, name) == (VolumeSpec, "runner") else fields[name].annotation
            if isinstance(section, UnionType):  # such as Section | None
                section = next((part for part in get_args(section) if hasattr(part, "model_fields")), None)
    return [name for name in getattr(section, "model_fields", ()) if name != "folder"]


def _normalised(path: str) -> str:
    """A storage path without what makes no difference."""
    protocol, _, place = path.removeprefix("precomputed://").partition("://")
    return f"{protocol}://{posixpath.normpath(place).lstrip('/')}"


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
