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
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from chunkflow_core.errors import ChunkflowError, MissingInputError, SpecError, StorageError
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.storage.addresses import layer_format, plain
from chunkflow_core.storage.json_text import parsed_json
from chunkflow_core.storage.layer_scale import FARTHEST, MOST_CHANNELS, LayerScale, ZarrArray, is_size
from chunkflow_core.storage.naming import Naming
from chunkflow_core.storage.zarr_space import Space, UnclearError, has_space, ome_space, own_space

if TYPE_CHECKING:
    from chunkflow_core.storage.files import Files

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

_N5_SUFFIX: Final = "s"
"""Before the number of a scale in the names of N5's folders."""

_ROUNDING: Final = 1e-3
"""Part of a voxel up to which a position counts as that of the next voxel.

Others are rounded down: smaller scales begin up to half a voxel after the largest, since their
positions are those of the centres of voxels.
"""

_LARGEST: Final = 2**31
"""Largest number of bytes that are decoded at a time; blosc has no more.

TensorStore ends the process if there is no memory for them.
"""

_COMPRESSION: Final = {
    "raw": (),
    "gzip": ("level", "useZlib"),
    "bzip2": ("blockSize",),
    "xz": ("preset",),
    "blosc": ("cname", "clevel", "shuffle", "blocksize"),
    "zstd": ("level",),
}
"""What TensorStore takes of N5's compressions; other keys are about the writer alone."""


def read_array(path: str, mip: int) -> LayerScale:
    """One scale of the layer at ``path``, which is an array, or a group with arrays of an image.

    Raises:
        MissingInputError: There is no layer at ``path``, its metadata is not that of an array of
            voxels, or the layer does not have this mip.
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage did not answer.
    """
    found = _read(path, "", layer_format(path))
    if not found and layer_format(path) == "n5" and _read(path, f"{_N5_SUFFIX}{mip}", "n5"):
        found = {"attributes.json": {}}  # a group need not have any
    if not found:
        names, other = " or ".join(_FILES[layer_format(path)]), format_there(path)
        advice = f"There is one of another format: write {other}" if other else "Check the path"
        raise MissingInputError(f"{path}: there is no layer of this format here (no {names}). {advice}")
    try:
        return _Layer(path, found).scale(mip)
    except MissingInputError:
        raise
    except (UnclearError, KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
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
    return found.scale(path, key, ome_space(image, image["datasets"][0], found.rank, is_n5=False))


def _read(path: str, key: str, kind: str) -> dict[str, Any]:
    """The JSON objects of the metadata files in a folder of a layer, by name."""
    from chunkflow_core.storage.files import open_files, storage_errors  # a DAG of file:// layers need not pay them

    folder, files = f"{key}/" if key else "", open_files(plain(path))
    names = [f"{folder}{name}" for name in _FILES[kind]]
    try:
        with storage_errors(f"{path}: cannot read the layer's metadata"):
            answers = files.get(names)
    except SpecError:  # who may not list a bucket of S3 is refused what isn't there
        answers = _each(path, files, names)
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            raise MissingInputError(f"{path}: it is below a file, expected the folder of a layer") from error
        raise
    found = {}
    for answer in answers:
        if answer["content"] is not None:
            name = answer["path"].rpartition("/")[2]
            found[name] = _parsed(path, answer["path"], answer["content"])
    return found


def _each(path: str, files: Files, names: list[str]) -> list[dict[str, Any]]:
    """Answers to questions for each file; the refusal if all are refused."""
    from chunkflow_core.storage.files import storage_errors

    answers, refusal = list[dict[str, Any]](), None
    for name in names:
        try:
            with storage_errors(f"{path}: cannot read the layer's metadata"):
                answers += files.get([name])
        except SpecError as error:
            refusal = error
    if refusal and not any(answer["content"] is not None for answer in answers):
        raise refusal
    return answers


def _parsed(path: str, name: str, content: bytes) -> dict[str, Any]:
    parsed = parsed_json(content, f"{path}: {name}")
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
        is_n5, group = array.driver == "n5", {"key": key, **_attributes(self._found)} if key else {}
        names = array.names or _named(attributes)
        if not key and not has_space(attributes, names):
            image, group = self._above()
        if image:
            space = ome_space(image[0], image[1], array.rank, is_n5=is_n5)
        else:
            space = own_space(attributes, group, array.rank, names, is_n5=is_n5)
        return array.scale(self._path, key, space)

    def _above(self) -> tuple[Any, dict[str, Any]]:
        """What a group above says of the array at the address: an image of it, or attributes."""
        prefix, _, place = self._path.rstrip("/").rpartition("://")
        parts, beside = place.split("/"), dict[str, Any]()
        for depth in (1, 2):
            above, key = "/".join(parts[:-depth]), "/".join(parts[-depth:])
            if len(parts) - depth < 2 or not parts[-depth - 1]:  # a layer is below its bucket, or the root
                break
            try:
                attributes = _attributes(_read(f"{prefix}://{above}", "", self._kind))
            except SpecError:  # of all that isn't there, in a bucket that may not be listed
                continue
            image = _ome_image(attributes)
            for dataset in image["datasets"] if image else ():
                if dataset["path"].strip("/") == key:
                    return (image, dataset), {}
            beside = beside or ({"key": key, **attributes} if attributes and depth == 1 else {})
        return None, beside


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

    @property
    def _decoded_bytes(self) -> int:
        """Bytes that are decoded at a time: a storage chunk; of a shard, a piece, and its index."""
        itemsize, size, index = np.dtype(self.dtype).itemsize, math.prod(self.chunk), 0
        for codec in self.metadata.get("codecs", ()):
            if codec["name"] == "sharding_indexed":
                piece = math.prod(codec["configuration"]["chunk_shape"])
                size, index = piece, 16 * (size // max(1, piece))
        return max(size * itemsize, index)

    def scale(self, path: str, key: str, space: Space) -> LayerScale:
        at = {letter: i for i, letter in enumerate(space.letters)}
        if len(at) != self.rank or "y" not in at or "x" not in at or not set(at) <= set("tczyx"):
            raise UnclearError(
                f"its {self.rank} dimensions are {', '.join(space.letters)}, expected z, y, x, with c and t"
            )
        if self.rank != len(self.chunk) or min(*self.shape, *self.chunk) < 1:
            raise UnclearError(f"shape {self.shape}, storage chunks of {self.chunk}")
        if self._decoded_bytes > _LARGEST:
            raise UnclearError(f"storage chunks of {self.chunk}, expected at most {_LARGEST:,} bytes decoded at a time")
        if "t" in at and self.shape[at["t"]] != 1:
            raise MissingInputError(
                f"{path}: it has {self.shape[at['t']]} time points; a layer has one. Copy the one that is meant into "
                "an array of its own"
            )
        if np.dtype(self.dtype).kind not in "uifb":
            raise UnclearError(f"data type {self.dtype}, expected integers or floating point numbers")

        def along(values: Sequence[Any], default: Any) -> list[Any]:
            return [values[at[a]] if a in at else default for a in "zyx"]

        step = along(space.step, 0.0)
        start = [math.floor(position + _ROUNDING) for position in along(space.start, 0.0)]
        if not all(map(is_size, step)) or max(*self.shape, *map(abs, start)) > FARTHEST:
            raise UnclearError(f"voxel size {step} nm, shape {self.shape}, position {start}")
        channels = self.shape[at["c"]] if "c" in at else 1
        if channels > MOST_CHANNELS:
            raise UnclearError(f"{channels} channels, expected at most {MOST_CHANNELS}")
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
            dtype="uint8" if self.dtype == "bool" else self.dtype,
            channels=channels,
            encoding=f"{self.driver} {letters} {_form(self.metadata)}",
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


def _array_file(found: dict[str, Any]) -> str:
    """The file that describes an array, if one does."""
    version_3 = found.get("zarr.json", {})
    if version_3.get("node_type") == "array" or {"shape", "chunk_grid", "codecs"} <= version_3.keys():
        return "zarr.json"  # CloudVolume 12.15 calls its arrays groups
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
    encoding = _codec(metadata["chunk_key_encoding"])
    is_default = encoding["name"] == "default"
    separator = (encoding.get("configuration") or {}).get("separator", "/" if is_default else ".")
    beside = ("attributes", "dimension_names", "consolidated_metadata")
    kept = {key: value for key, value in metadata.items() if key not in beside} | {
        "node_type": "array",
        "chunk_key_encoding": encoding,
        "codecs": list(map(_codec, metadata["codecs"])),
    }
    names = metadata.get("dimension_names")
    has_names = names is not None and any(name is not None for name in names)
    return _Array(
        driver="zarr3",
        shape=metadata["shape"],
        chunk=metadata["chunk_grid"]["configuration"]["chunk_shape"],
        dtype=metadata["data_type"],
        metadata=kept,
        separator=separator,
        beginning="c" if is_default else "",
        names=names if has_names else None,
    )


def _codec(value: Any) -> dict[str, Any]:
    """A codec, or an encoding of keys, which may be written as its name alone."""
    found: dict[str, Any] = {"name": value} if isinstance(value, str) else value
    return found


def _zarr2(metadata: dict[str, Any]) -> _Array:
    dtype, compressor = metadata["dtype"], metadata.get("compressor")
    if compressor and compressor["id"] == "zstd":
        compressor = {key: value for key, value in compressor.items() if key != "checksum"}
    if not isinstance(dtype, str):
        raise UnclearError("data type with several fields")
    return _Array(
        driver="zarr",
        shape=metadata["shape"],
        chunk=metadata["chunks"],
        dtype="bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name,
        metadata={"filters": None, "order": "C", "fill_value": None} | metadata | {"compressor": compressor},
        separator=metadata.get("dimension_separator", "."),
        beginning="",
    )


def _n5(metadata: dict[str, Any]) -> _Array:
    kept = ("dimensions", "blockSize", "dataType", "compression", "compressionType")
    compression = metadata.get("compression") or {"type": metadata.get("compressionType", "raw")}
    kind = "zstd" if compression["type"] == "zstandard" else compression["type"]
    taken = ("type", *_COMPRESSION.get(kind, compression))
    compression = {key: value for key, value in (compression | {"type": kind}).items() if key in taken}
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
        raise UnclearError(f"it has {len(images)} images; name the array of the one that is meant")
    image: dict[str, Any] = images[0]
    return image


def _named(attributes: dict[str, Any]) -> list[Any] | None:
    """Names of the dimensions, as xarray, funlib and TensorStore write them beside an array."""
    found = (attributes.get(key) for key in ("_ARRAY_DIMENSIONS", "axis_names", "axes"))
    return next((names for names in found if isinstance(names, list) and names), None)


def _what_else(attributes: dict[str, Any]) -> str:
    """What a group is that has no image of its own."""
    inside = attributes.get("ome")
    found = inside if isinstance(inside, dict) else attributes
    if "bioformats2raw.layout" in found:
        return "it is a container of images: name one, such as …/0"
    if "plate" in found or "well" in found:
        return "it is a plate of many images: name one"
    return "it is a group, neither an array nor an image of several scales (no multiscales): name the array"
