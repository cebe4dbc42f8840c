"""Metadata of new OME-Zarr layers: version 0.5 on zarr 3, one scale.

Source: the `specification of OME-Zarr 0.5 <https://ngff.openmicroscopy.org/0.5/>`_.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.files import put_file
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.zarr_info import LARGEST, layer_scale

_LEVEL: Final = 1
"""Effort of compression: what more would gain is less than it would cost."""

_CRC: Final = {"name": "crc32c"}


@dataclass(frozen=True)
class NewZarr:
    """An OME-Zarr layer that is to be made, or extended."""

    path: str
    """Address of the layer."""
    name: str
    bounds: Box
    dtype: str
    channels: int
    resolution: tuple[float, ...]
    """Voxel size in nm, zyx."""
    chunk: Vector
    """Storage chunk size in voxels, zyx: of a shard, if there are such."""
    read_chunk: Vector | None
    """Size of the pieces of a shard in voxels, zyx."""
    compression: str
    """``gzip``, ``zstd`` or ``none``."""

    @property
    def scale(self) -> LayerScale:
        """The layer's scale, as it is read from the layer that is made."""
        return layer_scale(self.path, LARGEST, self._array, self._group)

    def put_array(self) -> None:
        """Write the array's metadata, in one step.

        Raises:
            StorageError: The storage does not answer.
        """
        self._put(f"{LARGEST}/zarr.json", self._array)

    def publish(self, provenance: dict[str, Any]) -> None:
        """Write the layer's metadata.

        That of the group comes last, since there is a layer from then on.

        Raises:
            StorageError: The storage does not answer.
        """
        self.put_array()
        self._put("provenance", provenance)
        self._put("zarr.json", self._group)

    def _put(self, name: str, content: dict[str, Any]) -> None:
        put_file(plain(self.path), name, json.dumps(content, sort_keys=True, indent=2).encode())

    @property
    def _has_axis(self) -> bool:
        """Whether the array has an axis for channels."""
        return self.channels > 1

    def _with_channels(self, spatial: Any, channels: Any) -> list[Any]:
        return [channels] * self._has_axis + list(spatial)

    @property
    def _array(self) -> dict[str, Any]:
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs: list[dict[str, Any]] = [little if np.dtype(self.dtype).itemsize > 1 else {"name": "bytes"}]
        if self.compression != "none":
            more = {"checksum": True} if self.compression == "zstd" else {}
            codecs.append({"name": self.compression, "configuration": {"level": _LEVEL, **more}})
        if self.read_chunk is not None:
            inner = {
                "chunk_shape": self._with_channels(self.read_chunk, self.channels),
                "codecs": codecs,
                "index_codecs": [little, _CRC],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": inner}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self._with_channels(self.bounds.shape, self.channels),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": self._with_channels(self.chunk, self.channels)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": codecs,
            "attributes": {},
            "dimension_names": self._with_channels("zyx", "c"),
        }

    @property
    def _group(self) -> dict[str, Any]:
        # a scale of 0 is none: voxels whose size is not known measure 1, of no unit
        is_known = all(self.resolution)
        size = self.resolution if is_known else (1.0, 1.0, 1.0)
        space = [{"name": axis, "type": "space"} | ({"unit": "nanometer"} if is_known else {}) for axis in "zyx"]
        position = [a * n for a, n in zip(self.bounds.start, size, strict=True)]
        changes: list[dict[str, Any]] = [{"type": "scale", "scale": self._with_channels(size, 1.0)}]
        if any(position):
            changes.append({"type": "translation", "translation": self._with_channels(position, 0.0)})
        image = {
            "name": self.name,
            "axes": self._with_channels(space, {"name": "c", "type": "channel"}),
            "datasets": [{"path": LARGEST, "coordinateTransformations": changes}],
        }
        return {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"ome": {"version": "0.5", "multiscales": [image]}},
        }
