"""Random NRRD, MRC and NIfTI files, hostile and odd: as another reader reads them, or refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mrcfile
import nibabel
import nrrd
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkflow_core.storage.ingest.axes import Choice
from tests.chunkflow_core.storage.test_ingest_random import CHOICES, numbers, outcome
from tests.support.flat_files import write_nrrd
from tests.support.random_examples import examples

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)
HARM = st.one_of(st.none(), st.none(), st.tuples(st.floats(0, 0.999), st.integers(0, 255)))
CUT = st.sampled_from([1.0] * 6 + [0.95, 0.6])
AXES = st.sampled_from([None, None, None, "ZYX", "XYZ", "CZYX", "YX", "ZYXC", "TZYX"])


def harmed(file: Path, harm: tuple[float, int] | None, cut: float) -> None:
    content = bytearray(file.read_bytes())
    if harm is not None and content:
        content[int(harm[0] * len(content))] = harm[1]
    file.write_bytes(content[: int(len(content) * cut)])


def arranged(data: NDArray[Any], axes: str, choice: Choice) -> NDArray[Any]:
    """The stack of an array whose axes are named, the slowest first."""
    for place in reversed(range(data.ndim)):
        if axes[place] in "CTS":
            number = choice.time if axes[place] == "T" else choice.channel
            assert number is not None or data.shape[place] == 1, "a channel or time was taken for sections"
            data = data.take(number or 0, place)
    left = [axis for axis in axes if axis not in "CTS"]
    data = data.transpose([left.index(axis) for axis in "ZYX" if axis in left])
    return data.reshape(-1, *data.shape[-2:])


def compare(found: NDArray[Any], data: NDArray[Any], axes: str | None, choice: Choice) -> None:
    axes = choice.axes or axes
    assert found.dtype == data.dtype.newbyteorder("=")
    if axes is None:
        assert data.ndim >= 3 and sum(n != 1 for n in data.shape) <= 3
        np.testing.assert_array_equal(found, data.reshape(found.shape))
    else:
        np.testing.assert_array_equal(found, arranged(data, axes, choice))


@given(
    shape=SHAPES,
    dtype=st.sampled_from(["u1", "i1", "<u2", ">u2", ">i4", "<f4", ">f8", "<u8"]),
    encoding=st.sampled_from(["raw", "raw", "gzip", "gz", "bzip2", "bz2", "ascii"]),
    files=st.sampled_from(["", "", "", "one", "LIST", "pattern"]),
    skips=st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 3), (2, 1), (0, -1)]),
    kinds=st.one_of(
        st.none(),
        st.lists(st.sampled_from(["domain", "space", "domain", "list", "time", "???", "RGB-color"]), max_size=5),
    ),
    harm=HARM,
    cut=CUT,
    axes=AXES,
    choice=CHOICES,
)
@examples(50)
def test_nrrd(
    shape: tuple[int, ...],
    dtype: str,
    encoding: str,
    files: str,
    skips: tuple[int, int],
    kinds: list[str] | None,
    harm: tuple[float, int] | None,
    cut: float,
    axes: str | None,
    choice: Choice,
) -> None:
    choice = Choice(axes=axes, channel=choice.channel, time=choice.time)
    fields = {"kinds": " ".join(kinds)} if kinds else {}
    with TemporaryDirectory() as folder:
        file, data = Path(folder, "a.nhdr"), numbers(1, shape, dtype)
        write_nrrd(file, data, encoding=encoding, files=files, lines=skips[0], skipped=skips[1], fields=fields)
        if not files and encoding != "ascii" and (encoding == "raw" or skips == (0, 0)):
            np.testing.assert_array_equal(nrrd.read(str(file), index_order="C")[0], data)  # they read what was written
        harmed(sorted(Path(folder).glob("part*"))[-1] if files else file, harm, cut)
        found = outcome(str(file), choice)
        if found is None or harm is not None:
            return
        assert cut == 1 and encoding != "ascii"
        known = kinds is not None and "???" not in kinds
        names = [("ZYX"[-1 - k] if k < 3 else "?") for k in range(5)]
        spatial = iter(names)
        letters = {"list": "C", "time": "T", "RGB-color": "S"}
        by_kinds = "".join(letters.get(kind) or next(spatial) for kind in kinds or ())[::-1]
        if known and choice.axes is None and sum(kind in ("domain", "space") for kind in kinds or ()) in (2, 3):
            compare(found, data, by_kinds, choice)
        elif choice.axes is not None:
            compare(found, data, None, choice)
        else:
            np.testing.assert_array_equal(found, data.reshape(found.shape))


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from(["i1", "<i2", ">i2", "<u2", ">f4", "<f4", ">c8"]),
    order=st.sampled_from([(1, 2, 3)] * 3 + [(3, 2, 1), (2, 1, 3), (3, 1, 2), (0, 0, 0), (1, 1, 3)]),
    extended=st.integers(0, 3),
    harm=HARM,
    cut=CUT,
    axes=AXES,
    choice=CHOICES,
)
@examples(50)
def test_mrc(
    shape: tuple[int, ...],
    dtype: str,
    order: tuple[int, int, int],
    extended: int,
    harm: tuple[float, int] | None,
    cut: float,
    axes: str | None,
    choice: Choice,
) -> None:
    choice = Choice(axes=axes, channel=choice.channel, time=choice.time)
    with TemporaryDirectory() as folder:
        file, data = Path(folder, "a.mrc"), numbers(2, shape, dtype)
        with mrcfile.new(file, data) as mrc:
            mrc.set_extended_header(np.zeros(extended, "V80"))
            mrc.header.mapc, mrc.header.mapr, mrc.header.maps = order
        harmed(file, harm, cut)
        found = outcome(str(file), choice)
        if found is None or harm is not None:
            return
        assert cut == 1
        with mrcfile.open(file) as mrc:
            held = np.array(mrc.data)
        np.testing.assert_array_equal(held, data)
        assert choice.axes or order != (1, 1, 3)
        named = "".join(" XYZ"[number or default] for number, default in zip(order[::-1], (3, 2, 1), strict=True))
        if choice.axes is None and len(shape) == 4:
            assert shape[0] == 1, "several volumes were taken for one"
            held = held[0]
        compare(found, held, named[-held.ndim :], choice)


@given(
    shape=SHAPES,
    dtype=st.sampled_from(["u1", "i1", "<u2", ">i2", ">u4", "<f4", ">f8", "<i8", "rgb"]),
    ending=st.sampled_from([".nii", ".nii", ".nii.gz", ".nii.gz", ".hdr", ".img"]),
    version=st.sampled_from([1, 1, 2]),
    scale=st.sampled_from([(1, 0)] * 4 + [(2, 0), (1, -7), (0.5, 0), (0, 3), (float("nan"), 1), (-3, 1e30)]),
    harm=HARM,
    cut=CUT,
    axes=AXES,
    choice=CHOICES,
)
@examples(50)
def test_nifti(
    shape: tuple[int, ...],
    dtype: str,
    ending: str,
    version: int,
    scale: tuple[float, float],
    harm: tuple[float, int] | None,
    cut: float,
    axes: str | None,
    choice: Choice,
) -> None:
    choice = Choice(axes=axes, channel=choice.channel, time=choice.time)
    with TemporaryDirectory() as folder:
        file, data = (
            Path(folder, f"a{ending}"),
            numbers(3, (*shape, 3) if dtype == "rgb" else shape, "u1" if dtype == "rgb" else dtype),
        )
        write_nifti(file, data, version, dtype, scale)
        voxels = Path(folder, "a.img") if ending in (".hdr", ".img") else file
        held = nibabel.load(file).dataobj
        harmed(voxels, harm, cut)
        found = outcome(str(file), choice)
        if found is None or harm is not None:
            return
        assert cut == 1
        expected = np.asarray(held).T
        named = "QCTZYX"[-len(shape) :]
        if dtype == "rgb":
            expected = np.stack([expected[name] for name in expected.dtype.names or ()], -1)
            named += "S"
        if expected.dtype.kind == "f" and found.dtype.kind in "iu":
            assert (held.slope, held.inter) != (1, 0)
            assert (expected == np.rint(expected)).all()
            expected = expected.astype(found.dtype)
        compare(found, expected, named, choice)


def write_nifti(file: Path, data: NDArray[Any], version: int, dtype: str, scale: tuple[float, float]) -> None:
    """Write the array, the slowest axis first, as it is, and how it is scaled into the header."""
    made = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    pair = file.suffix in (".hdr", ".img")
    kind = {(1, True): nibabel.Nifti1Pair, (1, False): nibabel.Nifti1Image, (2, True): nibabel.Nifti2Pair}.get(
        (version, pair), nibabel.Nifti2Image
    )
    stored = (
        np.ascontiguousarray(data).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0] if dtype == "rgb" else data
    )
    header = made(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(stored.dtype)
    nibabel.save(kind(stored.T, np.eye(4), header), file)
    target = file.with_suffix(".hdr") if pair else file
    opening = gzip.open if file.suffix == ".gz" else open
    with opening(target, "rb") as opened:
        content = bytearray(opened.read())
    place, width = (112, "f4") if version == 1 else (176, "f8")
    order = ">" if dtype[0] == ">" else "<"
    content[place : place + 2 * np.dtype(width).itemsize] = np.array(scale, order + width).tobytes()
    with opening(target, "wb") as opened:
        opened.write(content)
