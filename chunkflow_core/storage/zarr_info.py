"""What zarr (versions 2 and 3), OME-Zarr (0.1 to 0.5) and N5 say of an array and its voxels' size.

Sources: the `OME-Zarr specifications <https://ngff.openmicroscopy.org>`_, those of `zarr
<https://zarr-specs.readthedocs.io>`_ and of `N5 <https://github.com/saalfeldlab/n5>`_, and what
funlib.persistence and COSEM write beside an array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from chunkflow_core.errors import ChunkflowError, MissingInputError
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.storage.addresses import layer_format, plain
from chunkflow_core.storage.layer_scale import FARTHEST, MOST_CHANNELS, LayerScale, ZarrArray, is_size
from chunkflow_core.storage.naming import Naming

METADATA: Final = {"zarr3": "zarr.json", "zarr": ".zarray", "n5": "attributes.json"}
"""Name of an array's metadata file, by TensorStore's name of the format."""

_FILES: Final = {
    "zarr": ("zarr.json", ".zarray", ".zattrs", ".zgroup"),
    "zarr2": (".zarray", ".zattrs", ".zgroup"),
    "zarr3": ("zarr.json",),
    "n5": ("attributes.json",),
}
"""Files that are looked for, by the format that an address names."""

LARGEST: Final = "0"
"""Name of the array of a new layer's only scale."""

_NANOMETRES: Final = {
    "angstrom": 0.1,
    "picometer": 1e-3,
    "nanometer": 1.0,
    "micrometer": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "nm": 1.0,
    "mm": 1e6,
    "millimeter": 1e6,
    "centimeter": 1e7,
    "meter": 1e9,
    "m": 1e9,
}
"""Nanometres in a unit of length."""

_N5_SUFFIX: Final = "s"
"""Before the number of a scale in the names of N5's folders."""

_LETTERS: Final = {3: "zyx", 4: "czyx", 5: "tczyx", 2: "yx"}
"""What dimensions are, by their number, where nothing says so."""

_ROUNDING: Final = 1e-3
"""Part of a voxel up to which a position counts as that of the next voxel."""


class _Unclear(ValueError):
    """Metadata can't be understood."""


@dataclass(frozen=True)
class _Space:
    """Where an array is, by its dimensions: letters of ``tczyx``, nm in a step, nm of its start."""

    letters: str
    step: tuple[float, ...]
    start: tuple[float, ...]


def read_array(path: str, mip: int) -> LayerScale:
    """One scale of the layer at ``path``, which is an array, or a group with arrays of an image.

    Raises:
        MissingInputError: There is no layer at ``path``, its metadata is not that of an array of
            voxels, or the layer does not have this mip.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage did not answer.
    """
    found = _read(path, "", layer_format(path))
    if not found:
        names, other = " or ".join(_FILES[layer_format(path)]), format_there(path)
        advice = f"There is one of another format: write {other}" if other else "Check the path"
        raise MissingInputError(f"{path}: there is no layer of this format here (no {names}). {advice}")
    try:
        return _Layer(path, found).scale(mip)
    except MissingInputError:
        raise
    except (_Unclear, KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        told = f"{error.args[0]} is missing" if isinstance(error, KeyError) else f"{error!s:.300}"
        raise MissingInputError(f"{path}: its metadata can't be understood as that of a volume ({told})") from error


def format_there(path: str) -> str:
    """The address, with its format, of the layer of zarr or N5 that is at a path.

    It is empty if there is none, or none that can be read.
    """
    found = []
    for kind in ("zarr", "n5"):
        with suppress(ChunkflowError):
            found += [kind] * bool(_read(path, "", kind))
    return f"{found[0]}://{plain(path)}" if len(found) == 1 else ""


def layer_scale(path: str, key: str, array: dict[str, Any], group: dict[str, Any]) -> LayerScale:
    """The scale that an OME-Zarr layer on zarr 3 has by its metadata.

    Args:
        path: Address of the layer.
        key: Name of the array.
        array: The array's metadata.
        group: The group's metadata.
    """
    image = _ome_image(_attributes({"zarr.json": group}))
    assert image is not None
    found = _zarr3(array)
    return found.scale(path, key, _ome_space(image, image["datasets"][0], found.rank))


def _read(path: str, key: str, kind: str) -> dict[str, Any]:
    """The JSON objects of the metadata files in a folder of a layer, by name."""
    from chunkflow_core.storage.files import open_files, storage_errors

    folder = f"{key}/" if key else ""
    names = [f"{folder}{name}" for name in _FILES[kind]]
    with storage_errors(f"{path}: cannot read the layer's metadata"):
        answers = open_files(plain(path)).get(names)
    found = {}
    for answer in answers:
        if answer["content"] is not None:
            name = answer["path"].rpartition("/")[2]
            found[name] = _parsed(path, answer["path"], answer["content"])
    return found


def _parsed(path: str, name: str, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        page = " It is a web page: check the address" if content.lstrip().startswith(b"<") else ""
        raise MissingInputError(f"{path}: {name} is not JSON: {error}.{page}".rstrip(".")) from error
    if not isinstance(parsed, dict):
        raise MissingInputError(f"{path}: {name} is not a JSON object")
    return parsed


class _Layer:
    """An array, or a group with the arrays of an image's scales."""

    def __init__(self, path: str, found: dict[str, Any]) -> None:
        self._path, self._found = path, found
        self._kind = "n5" if layer_format(path) == "n5" else "zarr3" if "zarr.json" in found else "zarr2"

    def scale(self, mip: int) -> LayerScale:
        if _array_file(self._found):
            if mip:
                raise MissingInputError(f"{self._path}: mip {mip} does not exist; this is a single array, mip 0")
            return self._scale("", self._found, None)
        attributes = _attributes(self._found)
        if image := _ome_image(attributes):
            levels = [dataset["path"] for dataset in image["datasets"]]
        elif self._kind == "n5":
            levels = self._n5_levels(attributes, mip)
        else:
            raise MissingInputError(f"{self._path}: {_what_else(attributes)}")
        if mip >= len(levels):
            raise MissingInputError(
                f"{self._path}: mip {mip} does not exist; the layer has mips 0 to {len(levels) - 1}"
            )
        key = levels[mip].strip("/")
        found = _read(self._path, key, self._kind)
        if not _array_file(found):
            raise MissingInputError(f"{self._path}: there is no array at {key}, which its metadata names as mip {mip}")
        return self._scale(key, found, image and (image, image["datasets"][mip]))

    def _n5_levels(self, attributes: dict[str, Any], mip: int) -> list[str]:
        scales = attributes.get("scales") or attributes.get("downsamplingFactors")
        count = len(scales) if isinstance(scales, list) else mip + 1
        if not isinstance(scales, list) and not _read(self._path, f"{_N5_SUFFIX}{mip}", "n5"):
            raise MissingInputError(
                f"{self._path}: it is neither an N5 array nor a group of scales {_N5_SUFFIX}0, {_N5_SUFFIX}1, …; name "
                "the array"
            )
        return [f"{_N5_SUFFIX}{number}" for number in range(count)]

    def _scale(self, key: str, found: dict[str, Any], image: Any) -> LayerScale:
        file = _array_file(found)
        read = {"zarr.json": _zarr3, ".zarray": _zarr2, "attributes.json": _n5}[file]
        array = read(found[file])
        attributes = _attributes(found)
        if image:
            space = _ome_space(image[0], image[1], array.rank)
        else:
            space = _own_space(attributes, array, self._group_of(key))
        return array.scale(self._path, key, space)

    def _group_of(self, key: str) -> dict[str, Any]:
        """Attributes of the group above an array, and its place there, where those tell of it."""
        return {"key": key, **_attributes(self._found)} if key else {}


@dataclass(frozen=True)
class _Array:
    """An array as it is stored; sizes along its dimensions."""

    driver: str
    shape: list[int]
    chunk: list[int]
    dtype: str
    metadata: dict[str, Any]
    separator: str
    beginning: str
    """What stands before the numbers in the name of a storage chunk's file, such as ``c``."""
    names: list[str] | None = None
    """Names of the dimensions, if the array has some."""

    @property
    def rank(self) -> int:
        return len(self.shape)

    def scale(self, path: str, key: str, space: _Space) -> LayerScale:
        at = {letter: i for i, letter in enumerate(space.letters)}
        if len(at) != self.rank or "y" not in at or "x" not in at or not set(at) <= set("tczyx"):
            raise _Unclear(f"its {self.rank} dimensions are {', '.join(space.letters)}, expected z, y, x, with c and t")
        if self.rank != len(self.chunk) or min(*self.shape, *self.chunk) < 1:
            raise _Unclear(f"shape {self.shape}, storage chunks of {self.chunk}")
        if "t" in at and self.shape[at["t"]] != 1:
            raise MissingInputError(
                f"{path}: it has {self.shape[at['t']]} time points; a layer has one. Copy the one that is meant into "
                "an array of its own"
            )
        if np.dtype(self.dtype).kind not in "uif":
            raise _Unclear(f"data type {self.dtype}, expected integers or floating point numbers")

        def along(values: Sequence[Any], default: Any) -> list[Any]:
            return [values[at[a]] if a in at else default for a in "zyx"]

        step = along(space.step, 0.0)
        start = [_voxels(s, n) for s, n in zip(along(space.start, 0.0), step, strict=True)]
        if not all(map(is_size, step)) or max(*self.shape, *map(abs, start)) > FARTHEST:
            raise _Unclear(f"voxel size {step} nm, shape {self.shape}, position {start}")
        channels = self.shape[at["c"]] if "c" in at else 1
        if channels > MOST_CHANNELS:
            raise _Unclear(f"{channels} channels, expected at most {MOST_CHANNELS}")
        per_file = self.chunk[at["c"]] if "c" in at else 1
        parts = -(-channels // per_file)
        places = {"t": "0", "c": "{c}" if parts > 1 else "0"}
        letters = space.letters
        names = [places.get(letter, "{" + letter + "}") for letter in letters]
        folder = f"{key}/" if key else ""
        is_nested = self.separator == "/"
        template = self.separator.join([self.beginning, *names] if self.beginning and not is_nested else names)
        metadata = json.dumps(self.metadata, sort_keys=True)
        return LayerScale(
            bounds=Box(vector(start), vector(a + n for a, n in zip(start, along(self.shape, 1), strict=True))),
            resolution=tuple(map(_tidy, step)),
            chunk=vector(along(self.chunk, 1)),
            dtype=self.dtype,
            channels=channels,
            encoding=f"{self.driver} {_form(self.metadata)}",
            info={},
            address=path,
            codec=self.driver,
            key=folder + self.beginning if self.beginning and is_nested else key,
            naming=Naming(template, by_range=False, parts=parts),
            array=ZarrArray(self.driver, folder, letters, metadata),
        )


def _tidy(nanometres: float) -> float:
    """A voxel size without what the change of its unit has rounded: 0.0081 µm are 8.1 nm."""
    value = float(f"{nanometres:.12g}")
    return int(value) if value.is_integer() else value


def _form(metadata: dict[str, Any]) -> str:
    """How an array's storage chunks are to be read, without its size, which may grow."""
    kept = {key: value for key, value in metadata.items() if key not in ("shape", "dimensions")}
    return json.dumps(kept, sort_keys=True)


def _voxels(nanometres: float, step: float) -> int:
    """A position in whole voxels, rounded down.

    Smaller scales begin up to half a voxel after the largest: their positions are those of the
    centres of voxels.
    """
    return math.floor(nanometres / step + _ROUNDING) if step else 0


def _array_file(found: dict[str, Any]) -> str:
    """The file that describes an array, if one does."""
    if found.get("zarr.json", {}).get("node_type") == "array":
        return "zarr.json"
    if ".zarray" in found:
        return ".zarray"
    return "attributes.json" if "dimensions" in found.get("attributes.json", {}) else ""


def _attributes(found: dict[str, Any]) -> dict[str, Any]:
    """What somebody has written beside an array or group."""
    if "zarr.json" in found:
        attributes: dict[str, Any] = found["zarr.json"].get("attributes") or {}
        return attributes
    return found.get(".zattrs") or found.get("attributes.json") or {}


def _zarr3(metadata: dict[str, Any]) -> _Array:
    encoding = metadata["chunk_key_encoding"]
    is_default = encoding["name"] == "default"
    separator = (encoding.get("configuration") or {}).get("separator", "/" if is_default else ".")
    kept = {key: value for key, value in metadata.items() if key not in ("attributes", "dimension_names")}
    names = metadata.get("dimension_names")
    return _Array(
        driver="zarr3",
        shape=metadata["shape"],
        chunk=metadata["chunk_grid"]["configuration"]["chunk_shape"],
        dtype=metadata["data_type"],
        metadata=kept,
        separator=separator,
        beginning="c" if is_default else "",
        names=names if names and None not in names else None,
    )


def _zarr2(metadata: dict[str, Any]) -> _Array:
    dtype = metadata["dtype"]
    if not isinstance(dtype, str):
        raise _Unclear("data type with several fields")
    return _Array(
        driver="zarr",
        shape=metadata["shape"],
        chunk=metadata["chunks"],
        dtype="bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name,
        metadata=metadata,
        separator=metadata.get("dimension_separator", "."),
        beginning="",
    )


def _n5(metadata: dict[str, Any]) -> _Array:
    kept = ("dimensions", "blockSize", "dataType", "compression", "compressionType")
    compression = metadata.get("compression") or {"type": metadata.get("compressionType", "raw")}
    return _Array(
        driver="n5",
        shape=metadata["dimensions"],
        chunk=metadata["blockSize"],
        dtype=metadata["dataType"],
        metadata={key: metadata[key] for key in kept[:3]} | {"compression": compression},
        separator="/",
        beginning="",
    )


def _ome_image(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """OME's description of an image of several scales, if there is one."""
    inside = attributes.get("ome")
    images = (inside if isinstance(inside, dict) else attributes).get("multiscales")
    if not images:
        return None
    if len(images) > 1:
        raise _Unclear(f"it has {len(images)} images; name the array of the one that is meant")
    image: dict[str, Any] = images[0]
    return image


def _ome_space(image: dict[str, Any], dataset: dict[str, Any], rank: int) -> _Space:
    axes = image.get("axes") or (list("tczyx") if rank == 5 else [])
    names = [axis if isinstance(axis, str) else axis["name"] for axis in axes]
    units = [None if isinstance(axis, str) else axis.get("unit") for axis in axes]
    if transform := dataset.get("transform"):  # of COSEM's N5
        return _cosem_space(transform)
    if len(names) != rank:
        raise _Unclear(f"axes {names} of an array of {rank} dimensions")
    step, start = np.ones(rank), np.zeros(rank)
    image_changes = image.get("coordinateTransformations", [])
    for change in [*dataset.get("coordinateTransformations", []), *image_changes]:
        if change["type"] == "scale":
            factors = np.array(change["scale"], float)
            if not np.isfinite(factors).all():
                raise _Unclear(f"scale {change['scale']}")
            step, start = step * factors, start * factors
        elif change["type"] == "translation":
            start = start + change["translation"]
        elif change["type"] != "identity":
            raise _Unclear(f"coordinate transformation of type {change['type']}, expected scale and translation")
    is_said = any("coordinateTransformations" in part for part in (dataset, image))
    nm = np.array([_nanometres(unit) for unit in units]) * is_said
    return _Space(_letters(names), tuple(step * nm), tuple(start * nm))


def _cosem_space(transform: dict[str, Any]) -> _Space:
    """Where an array is by COSEM's attribute, whose order is that of C: the last axis is first."""
    nm = [_nanometres(unit) for unit in transform.get("units") or [None] * len(transform["axes"])]
    rows = zip(transform["axes"], transform["scale"], transform["translate"], nm, strict=True)
    named, step, start, factors = zip(*reversed(list(rows)), strict=True)
    return _Space(
        _letters(list(named)),
        tuple(a * n for a, n in zip(step, factors, strict=True)),
        tuple(a * n for a, n in zip(start, factors, strict=True)),
    )


def _own_space(attributes: dict[str, Any], array: _Array, group: dict[str, Any]) -> _Space:
    """Where an array is, by what stands beside it."""
    if "transform" in attributes:
        return _cosem_space(attributes["transform"])
    rank, is_n5 = array.rank, array.driver == "n5"
    names = array.names or attributes.get("_ARRAY_DIMENSIONS") or attributes.get("axis_names")
    letters = _letters(names) if names else _LETTERS.get(rank, "?" * rank)
    if is_n5:
        letters = letters[::-1]
    size, unit = _size_beside(attributes, group)
    nm = _nanometres(unit) if unit else 1.0
    space_axes = [i for i, letter in enumerate(letters) if letter in "zyx"]
    step, start = [0.0] * rank, [0.0] * rank
    offset = attributes.get("offset") or [0.0] * len(space_axes)
    if size is not None and len(size) in (len(space_axes), rank):
        size, offset = ([*values][-len(space_axes) :] if not is_n5 else [*values] for values in (size, offset))
        for i, s, o in zip(space_axes, size, offset, strict=False):
            step[i], start[i] = float(s) * nm, float(o) * nm
    return _Space(letters, tuple(step), tuple(start))


def _size_beside(attributes: dict[str, Any], group: dict[str, Any]) -> tuple[list[float] | None, str]:
    """Voxel size in the array's order, and its unit, by one of the attributes in use."""
    units = attributes.get("units") or group.get("units") or ""
    unit = units[0] if isinstance(units, list) else units
    if isinstance(pixel := attributes.get("pixelResolution") or group.get("pixelResolution"), dict):
        found, unit = pixel["dimensions"], pixel.get("unit", unit)
    else:
        found = pixel or attributes.get("resolution") or attributes.get("voxel_size") or group.get("resolution")
    factors = attributes.get("downsamplingFactors")
    if factors is None and group.get("key") and isinstance(group.get("scales"), list):
        factors = group["scales"][int(group["key"].removeprefix(_N5_SUFFIX))]
    if found and factors and not attributes.get("pixelResolution") and not attributes.get("resolution"):
        found = [a * b for a, b in zip(found, factors, strict=True)]
    return found, str(unit)


def _letters(names: list[str]) -> str:
    """What dimensions are, a letter each, by their names."""
    return "".join(name.strip().lower()[:1] if name.strip().lower()[:1] in "tczyx" else "?" for name in names)


def _nanometres(unit: str | None) -> float:
    """Nanometres in a unit; 0 for one that is not known or not said."""
    return _NANOMETRES.get(str(unit).lower(), 0.0)


def _what_else(attributes: dict[str, Any]) -> str:
    """What a group is that has no image of its own."""
    inside = attributes.get("ome")
    found = inside if isinstance(inside, dict) else attributes
    if "bioformats2raw.layout" in found:
        return "it is a container of images: name one, such as …/0"
    if "plate" in found or "well" in found:
        return "it is a plate of many images: name one"
    return "it is a group, neither an array nor an image of several scales (no multiscales): name the array"
