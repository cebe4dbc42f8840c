"""The output layer's life: made, checked against the spec, extended when the volume has grown."""

from __future__ import annotations

import json
from contextlib import suppress

from chunkflow_core.errors import SpecError
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.spec import VolumeSpec
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.files import put_file, storage_errors
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_scale import LayerScale
from chunkflow_core.storage.layers import NO_PROVENANCE, NewLayer, OutputLayer, layer_files
from chunkflow_core.storage.zarr_new import NewZarr


def open_output(spec: VolumeSpec, *, may_grow: bool = False) -> OutputLayer:
    """The output layer of a spec.

    Args:
        spec: The volume.
        may_grow: Whether one will do, to look at, that ends inside the ROI.

    Raises:
        MissingInputError: ``prepare`` has not made the layer.
        SpecError: The layer does not fit the spec.
    """
    return OutputLayer(spec.output.path, check_output(spec, may_grow=may_grow), spec.output.compression)


def create_output(spec: VolumeSpec) -> None:
    """Make the output layer: one scale, of the ROI's size, at the input's voxel size."""
    provenance = {
        "description": f"{spec.name}: {spec.model.engine} inference of {spec.written('input')}",
        "sources": [spec.written("input")],
        "processing": [],
    }
    if spec.output.format == "ome-zarr":
        _new_zarr(spec).publish(NO_PROVENANCE | provenance)
        return
    NewLayer(
        spec.output.path,
        spec.grid.roi.shape,
        dtype=spec.output.dtype,
        resolution=spec.input_scale.resolution,
        chunk=spec.storage_chunk,
        offset=spec.grid.roi.start,
        channels=spec.output.stored_channels,
        kind=spec.output.kind,
        provenance=provenance,
    )


def _new_zarr(spec: VolumeSpec) -> NewZarr:
    """The output layer as OME-Zarr."""
    return NewZarr(
        path=spec.output.path,
        name=spec.name,
        bounds=spec.grid.roi,
        dtype=spec.output.dtype,
        channels=spec.output.stored_channels,
        resolution=spec.input_scale.resolution,
        chunk=spec.storage_chunk,
        read_chunk=spec.output.read_chunk_size,
        compression=spec.output.compression,
    )


def check_output(spec: VolumeSpec, *, may_grow: bool = False) -> LayerScale:
    """The output layer's scale.

    Args:
        spec: The volume.
        may_grow: Whether a layer will do that starts where the ROI does and ends inside it;
            :func:`extend_output` makes it fit.

    Raises:
        MissingInputError: There is no layer.
        SpecError: The layer there has another shape than the spec says.
    """
    scale = read_scale(spec.output.path, 0)
    if scale.address != spec.output.path:
        raise SpecError(
            f"output.path: the info file at {spec.output.path} redirects to {scale.address}, where readers will look. "
            "Give that path, or delete that info file"
        )
    wanted: dict[str, tuple[object, object]] = {
        "dtype": (scale.dtype, spec.output.dtype),
        "channels": (scale.channels, spec.output.stored_channels),
        "chunk_size": (scale.chunk, spec.storage_chunk),
    }
    problems = [f"{what} {a}, the spec says {b}" for what, (a, b) in wanted.items() if a != b]
    if spec.output.format == "precomputed" and scale.encoding != "raw":
        problems.append(f"encoding {scale.encoding}, only raw is written")
    if spec.output.format == "ome-zarr" and scale.encoding != _new_zarr(spec).scale.encoding:
        problems.append("other codecs than the spec's output.compression and output.read_chunk_size ask for")
    if problems:
        raise SpecError(
            f"output.path: the layer at {spec.output.path} has {problems[0]}. Give another path, or delete that layer"
        )
    bounds, roi = scale.bounds, spec.grid.roi
    grows = bounds.start == roi.start and bounds in roi
    if bounds != roi and not (may_grow and grows):
        start, stop = list(bounds.start), list(bounds.stop)
        if grows:
            advice = "The volume has grown: `prepare` extends the layer"
        elif bounds.start == roi.start and roi in bounds:
            advice = (
                "A layer does not shrink. In Airflow, a later run has extended it: start a new run instead of clearing "
                f"tasks of an old one. Else set roi: [{start}, {stop}] to go on with it, give another path, or "
                "delete that layer"
            )
        else:
            advice = (
                "A layer can grow at its high ends, but neither shrink nor move: set "
                f"roi: [{start}, {stop}] to go on with it, give another path, or delete that layer"
            )
        raise SpecError(
            f"output.path: the layer at {spec.output.path} has bounds {bounds}, the spec says {roi}. {advice}"
        )
    return scale


def has_voxels(spec: VolumeSpec) -> bool:
    """Whether there is a storage chunk in the output layer."""
    folder = read_scale(spec.output.path, 0).folder
    with storage_errors(f"listing {spec.output.path}"):
        return any(True for _ in layer_files(spec.output.path).list(prefix=folder))


def extend_output(spec: VolumeSpec, layer: LayerScale) -> None:
    """Give the output layer the ROI's size, in one step.

    Storage chunks that were cut short at its old ends are left: see :func:`delete_cut_short`.

    Args:
        spec: The volume.
        layer: The layer's scale as it is before.
    """
    if spec.output.format == "ome-zarr":
        _new_zarr(spec).put_array()
        return
    first, *others = layer.info["scales"]
    info = layer.info | {"scales": [first | {"size": list(reversed(spec.grid.roi.shape))}, *others]}
    put_file(plain(spec.output.path), "info", json.dumps(info, sort_keys=True, indent=2).encode())


def delete_cut_short(spec: VolumeSpec) -> int:
    """Delete storage chunks that ended at an earlier end of the layer, and return how many.

    The layer has larger ones in their place.
    """
    layer = open_output(spec)
    names = []
    for name in layer.stored_chunks():
        with suppress(ValueError):  # of names that are no boxes
            box = Box.from_key(name)
            chunk = layer.chunk_at(box.start)
            if chunk and box != chunk and box.start == chunk.start and box in chunk:
                names.append(name)
    layer.delete_chunks(names)
    return len(names)
