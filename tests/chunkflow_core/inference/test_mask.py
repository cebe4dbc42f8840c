"""The mask at the input's voxels, against a search for the mask voxel that holds each centre."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.errors import DataError, MissingInputError, SpecError
from chunkflow_core.inference.mask import Mask
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.spec import VolumeSpec, parse_spec
from chunkflow_core.storage.layers import NewLayer
from tests.support.random_examples import examples

Sizes = tuple[float, ...]


@dataclass(frozen=True)
class MaskLayer:
    """One scale of a mask layer; all zyx."""

    data: NDArray[Any]
    resolution: Sizes
    offset: Vector = (0, 0, 0)
    chunk: Vector = (4, 4, 4)


def write_mask(place: Path | str, *scales: MaskLayer, layer_type: str = "image", encoding: str = "raw") -> str:
    """Write a layer of such scales, mip 0 first, to a folder or an address; its address."""
    address, infos = place if isinstance(place, str) else f"file://{place}", []
    for scale in scales:
        options: dict[str, Any] = {"compressed_segmentation_block_size": (8, 8, 8)}
        infos.append(
            CloudVolume.create_new_info(
                num_channels=scale.data.shape[3] if scale.data.ndim == 4 else 1,
                layer_type=layer_type,
                data_type=str(scale.data.dtype),
                encoding=encoding,
                resolution=list(reversed(scale.resolution)),
                voxel_offset=list(reversed(scale.offset)),
                volume_size=list(reversed(scale.data.shape[:3])),
                chunk_size=list(reversed(scale.chunk)),
                **(options if encoding == "compressed_segmentation" else {}),
            )
        )
        infos[-1]["scales"][0]["key"] = f"scale{len(infos)}"
    info = infos[0] | {"scales": [info["scales"][0] for info in infos]}
    CloudVolume(address, info=info, progress=False).commit_info()
    for mip, scale in enumerate(scales):
        volume = CloudVolume(address, mip=mip, progress=False, delete_black_uploads=True)
        z, y, x = (slice(o, o + n) for o, n in zip(scale.offset, scale.data.shape[:3], strict=True))
        volume[x, y, z] = scale.data.transpose(2, 1, 0, *range(3, scale.data.ndim))
    return address


def make_spec(folder: Path, resolution: Sizes, mask: dict[str, Any], offset: Vector = (0, 0, 0)) -> VolumeSpec:
    """A spec whose input has a voxel size and an offset; its size and content are of no matter."""
    address = f"file://{folder}/input"
    NewLayer(address, (8, 8, 8), dtype="uint8", resolution=resolution, chunk=(8, 8, 8), offset=offset)
    return parse_spec(
        {
            "name": "masked",
            "input": {"path": address},
            "output": {"path": f"file://{folder}/output"},
            "exchange": {"path": f"file://{folder}/exchange"},
            "patch_size": [4, 4, 4],
            "patch_overlap": [0, 0, 0],
            "block_size": [8, 8, 8],
            "model": {"engine": "identity"},
            "skip": {"mask": mask},
        }
    )


def by_voxel(layer: MaskLayer, resolution: Sizes, box: Box) -> NDArray[np.bool_]:
    """Which voxels are inside.

    For each, all mask voxels are looked at for the one in which its centre lies.
    """

    def holder(axis: int, voxel: int) -> int | None:
        centre = (voxel + Fraction(1, 2)) * Fraction(str(resolution[axis]))
        size, offset = Fraction(str(layer.resolution[axis])), layer.offset[axis]
        found = [n for n in range(layer.data.shape[axis]) if (offset + n) * size <= centre < (offset + n + 1) * size]
        return found[0] if found else None

    holders = [[holder(a, n) for n in range(box.start[a], box.stop[a])] for a in range(3)]
    result = np.zeros(box.shape, np.bool_)
    for at in np.ndindex(box.shape):
        place = tuple(holders[a][n] for a, n in enumerate(at))
        result[at] = None not in place and layer.data[place] != 0
    return result


def assert_equal_to(layer: MaskLayer, resolution: Sizes, mask: Mask, box: Box, seed: int = 0) -> None:
    """Compare a window with the search, whole and in random parts."""
    expected, window, rng = by_voxel(layer, resolution, box), mask.window(box), np.random.default_rng(seed)
    np.testing.assert_array_equal(window.voxels(box), expected, strict=True)
    assert window.touches(box) == expected.any()
    for _ in range(12):
        corners = np.sort([rng.integers(box.start, np.add(box.stop, 1)) for _ in range(2)], axis=0)
        part = Box(vector(map(int, corners[0])), vector(map(int, corners[1])))
        inside = expected[part.slices(box.start)]
        np.testing.assert_array_equal(window.voxels(part), inside, strict=True)
        assert window.touches(part) == inside.any()


def speckles(shape: Vector, dtype: str = "uint8", seed: int = 0, share: float = 0.3) -> NDArray[Any]:
    """Random values, most of them 0."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 100, shape).astype(dtype)
    return np.where(rng.random(shape) < share, values, np.zeros_like(values))


@st.composite
def axes(draw: st.DrawFn) -> tuple[float, float, int, int, int, int, int]:
    """One axis of an input with a mask, and of a box of the input near the mask.

    Voxel sizes of input and mask; offset, length and chunk of the mask; start and stop of the box.
    """
    resolution = draw(st.sampled_from([1, 4, 4.0, 30.5, 0.1, 7]))
    ratio = draw(st.sampled_from(["1", "2", "8", "3", "1.5", "0.5", "0.25", "0.3", "1.1", "2.7", "6"]))
    mask_resolution = float(Fraction(str(resolution)) * Fraction(ratio))
    offset, length = draw(st.integers(-5, 9)), draw(st.integers(1, 7))
    first = math.floor(offset * Fraction(ratio))
    start = first + draw(st.integers(-4, 4))
    return resolution, mask_resolution, offset, length, draw(st.integers(1, 5)), start, start + draw(st.integers(1, 9))


@examples(60)
@given(axes=st.tuples(axes(), axes(), axes()), seed=st.integers(0, 2**32 - 1))
def test_every_voxel_takes_the_mask_voxel_that_holds_its_centre(
    tmp_path_factory: pytest.TempPathFactory, axes: tuple[Any, ...], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("mask")
    resolution, mask_resolution, offset, shape, chunk, start, stop = zip(*axes, strict=True)
    layer = MaskLayer(speckles(shape, seed=seed), mask_resolution, offset, chunk)
    address = write_mask(folder / "mask", layer)
    spec = make_spec(folder, resolution, {"path": address, "fill_missing": True}, offset=(3, -2, 1))
    assert_equal_to(layer, resolution, Mask(spec), Box(start, stop), seed)


@pytest.mark.parametrize(
    ("resolution", "mask_resolution"),
    [
        ((40, 4, 4), (40, 4, 4)),
        ((40, 4, 4), (40, 32, 32)),
        ((40, 4, 4), (80.0, 10.0, 6.0)),
        ((45, 8, 8), (45, 4, 4)),
        ((45, 8, 8), (30, 3, 11)),
        ((0.6, 0.3, 30.5), (0.1, 0.1, 61)),
    ],
    ids=str,
)
def test_voxel_sizes(tmp_path: Path, resolution: Sizes, mask_resolution: Sizes) -> None:
    layer = MaskLayer(speckles((9, 10, 11)), mask_resolution, (2, 1, -3))
    address = write_mask(tmp_path / "mask", layer)
    mask = Mask(make_spec(tmp_path, resolution, {"path": address, "fill_missing": True}))
    ends = [
        (math.floor(o * Fraction(str(m)) / Fraction(str(r))), math.ceil((o + n) * Fraction(str(m)) / Fraction(str(r))))
        for o, n, m, r in zip(layer.offset, layer.data.shape, mask_resolution, resolution, strict=True)
    ]
    box = Box(vector(a - 2 for a, _ in ends), vector(min(b, a + 30) + 2 for a, b in ends))
    assert_equal_to(layer, resolution, mask, box)


@pytest.mark.parametrize(("voxel", "inside"), [(2, False), (3, True)])
def test_a_centre_on_a_face_belongs_to_the_higher_voxel_whatever_the_size_in_binary(
    tmp_path: Path, voxel: int, inside: bool
) -> None:
    data = np.zeros((1, 1, 90), np.uint8)
    data[..., voxel::6] = 1  # of six mask voxels in one of the input, whose centre is between numbers 2 and 3
    address = write_mask(tmp_path / "mask", MaskLayer(data, (1, 1, 0.1), chunk=(1, 1, 90)))
    window = Mask(make_spec(tmp_path, (1, 1, 0.6), {"path": address})).window(Box((0, 0, 0), (1, 1, 15)))
    assert (window.voxels(window.box) == inside).all()


def test_scales_are_taken_by_voxel_size(tmp_path: Path) -> None:
    fine = MaskLayer(speckles((4, 16, 16), seed=1), (40, 8, 8), (0, 4, 8))
    coarse = MaskLayer(speckles((4, 4, 4), seed=2), (40, 32, 32), (0, 1, 2))
    address = write_mask(tmp_path / "mask", fine, coarse)
    box = Box((0, 0, 0), (5, 40, 50))
    for mip, layer in enumerate((fine, coarse)):
        mask = Mask(make_spec(tmp_path, (40, 4, 4), {"path": address, "mip": mip, "fill_missing": True}))
        assert_equal_to(layer, (40, 4, 4), mask, box)
    with pytest.raises(MissingInputError, match="mip 2 does not exist"):
        Mask(make_spec(tmp_path, (40, 4, 4), {"path": address, "mip": 2}))


@pytest.mark.parametrize(
    ("dtype", "layer_type", "encoding"),
    [
        ("uint32", "segmentation", "raw"),
        ("uint64", "segmentation", "compressed_segmentation"),
        ("uint16", "image", "raw"),
        ("float32", "image", "raw"),
    ],
)
def test_layer_types(tmp_path: Path, dtype: str, layer_type: str, encoding: str) -> None:
    data = speckles((8, 16, 8), dtype)
    if dtype == "uint64":
        data[data > 0] += np.uint64(2**60)
    if dtype == "float32":
        data[data > 0] *= np.float32(-1e-3)
    layer = MaskLayer(data, (8, 8, 8), chunk=(8, 8, 8))
    address = write_mask(tmp_path / "mask", layer, layer_type=layer_type, encoding=encoding)
    mask = Mask(make_spec(tmp_path, (8, 4, 4), {"path": address, "fill_missing": True}))
    assert_equal_to(layer, (8, 4, 4), mask, Box((-1, 0, 3), (9, 40, 12)))


@pytest.mark.parametrize("there", [(0, 0, 0), (5, 6, 7), (7, 7, 7)], ids=str)
def test_single_voxels(tmp_path: Path, there: Vector) -> None:
    data = np.zeros((8, 8, 8), np.uint8)
    data[there] = 1
    address = write_mask(tmp_path / "mask", MaskLayer(data, (8, 8, 8), chunk=(8, 8, 8)))
    mask = Mask(make_spec(tmp_path, (8, 8, 8), {"path": address}))
    for voxel in [there, (0, 1, 0), (5, 6, 6)]:
        window = mask.window(Box(voxel, vector(n + 1 for n in voxel)))
        assert window.touches(window.box) == (voxel == there)


def test_far_from_the_layer_nothing_is_inside_and_nothing_is_read(tmp_path: Path) -> None:
    layer = MaskLayer(np.ones((4, 4, 4), np.uint8), (8, 8, 8))
    address = write_mask(tmp_path / "mask", layer)
    mask = Mask(make_spec(tmp_path, (8, 8, 8), {"path": address}))
    for chunk in (tmp_path / "mask" / "scale1").iterdir():
        chunk.unlink()
    for start in [(4, 0, 0), (0, -9, 0), (100, 100, 100)]:
        window = mask.window(Box(start, vector(n + 3 for n in start)))
        assert not window.touches(window.box)
        assert not window.voxels(window.box).any()


def test_missing_chunks_are_zeros_only_on_demand(tmp_path: Path) -> None:
    data = np.ones((4, 4, 8), np.uint8)
    data[..., 4:] = 0  # not stored
    layer = MaskLayer(data, (8, 8, 8))
    address = write_mask(tmp_path / "mask", layer)
    box = Box((0, 0, 0), (4, 4, 8))
    strict = Mask(make_spec(tmp_path, (8, 8, 8), {"path": address}))
    with pytest.raises(MissingInputError, match=r"skip\.mask\.fill_missing: true"):
        strict.window(box)
    assert strict.window(Box((0, 0, 0), (4, 4, 4))).touches(Box((0, 0, 0), (4, 4, 4)))
    filling = Mask(make_spec(tmp_path, (8, 8, 8), {"path": address, "fill_missing": True}))
    assert_equal_to(layer, (8, 8, 8), filling, box)


def test_a_corrupt_chunk_is_an_error(tmp_path: Path) -> None:
    address = write_mask(tmp_path / "mask", MaskLayer(np.ones((4, 4, 4), np.uint8), (8, 8, 8)))
    mask = Mask(make_spec(tmp_path, (8, 8, 8), {"path": address}))
    for chunk in (tmp_path / "mask" / "scale1").iterdir():
        chunk.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="reading the mask"):
        mask.window(Box((0, 0, 0), (2, 2, 2)))


def test_the_layer_is_read_by_storage_chunks_and_only_where_it_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MaskLayer(np.ones((12, 8, 8), np.uint8), (2, 8, 8), (1, 0, 0), chunk=(4, 4, 4))
    address = write_mask(tmp_path / "mask", layer)
    read: list[tuple[int, int]] = []

    def planes_read(z: float) -> list[tuple[int, int]]:
        mask = Mask(make_spec(tmp_path, (z, 4, 4), {"path": address}))
        kind = type(mask._reader)
        original = kind.read

        def read_box(reader: Any, box: Box) -> Any:
            read.append((box.start[0], box.stop[0]))
            return original(reader, box)

        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(kind, "read", read_box)
            mask.window(Box((0, 0, 0), (12, 16, 16)))
        return read

    assert planes_read(2) == [(1, 5), (5, 9), (9, 12)]
    assert planes_read(11) == [(2, 3), (8, 9)]  # the centres 5.5 and 16.5 nm; 27.5 is beyond the layer
    assert planes_read(0.2) == [(1, 2)]  # centres up to 2.3 nm


def test_boxes_have_to_be_inside_the_window(tmp_path: Path) -> None:
    address = write_mask(tmp_path / "mask", MaskLayer(np.ones((4, 4, 4), np.uint8), (8, 8, 8)))
    window = Mask(make_spec(tmp_path, (8, 8, 8), {"path": address})).window(Box((1, 1, 1), (4, 4, 4)))
    for box in [Box((0, 1, 1), (2, 2, 2)), Box((1, 1, 1), (2, 2, 5))]:
        with pytest.raises(ValueError, match="not inside the mask's window"):
            window.touches(box)
        with pytest.raises(ValueError, match="not inside the mask's window"):
            window.voxels(box)
    empty = Box((2, 2, 2), (2, 3, 3))
    assert not window.touches(empty)
    assert window.voxels(empty).shape == (0, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_channels": 2}, "has 2 channels, expected 1"),
        ({"data_type": "complex64"}, "has dtype complex64, expected a number type"),
        ({"resolution": [8, 8, 0]}, r"resolution of \(0, 8, 8\) nm"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_masks_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Mask(spec_with_mask(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_type": "colour"}, "data type 'colour' not understood"),
        ({"resolution": [8, "wide", 8]}, "resolution is .*, expected three numbers"),
        ({"resolution": [8, 8]}, "resolution is .*, expected three numbers"),
    ],
    ids=str,
)
def test_a_mask_whose_info_makes_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MissingInputError, match=message):
        Mask(spec_with_mask(tmp_path, changes))


def spec_with_mask(tmp_path: Path, changes: dict[str, Any]) -> VolumeSpec:
    """A spec with a mask whose ``info`` has other values for some keys."""
    address = write_mask(tmp_path / "mask", MaskLayer(np.ones((4, 4, 4), np.uint8), (8, 8, 8)))
    info = json.loads((tmp_path / "mask" / "info").read_text())
    for key, value in changes.items():
        (info if key in info else info["scales"][0])[key] = value
    (tmp_path / "mask" / "info").write_text(json.dumps(info))
    return make_spec(tmp_path, (8, 8, 8), {"path": address})


def test_a_layer_that_is_not_there_is_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="there is no layer here"):
        Mask(make_spec(tmp_path, (8, 8, 8), {"path": f"file://{tmp_path}/nothing"}))


def test_a_spec_without_a_mask_has_none(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, (8, 8, 8), {"path": f"file://{tmp_path}/nothing"})
    with pytest.raises(ValueError, match=r"no skip\.mask"):
        Mask(spec.model_copy(update={"skip": spec.skip.model_copy(update={"mask": None})}))
