"""Random sources, hostile and odd: each is read as another reader does, or refused in a line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import h5py
import numpy as np
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from chunkflow_core.errors import ChunkflowError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.sources import open_stack
from tests.support.random_examples import examples

DTYPES = ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64", "uint64"]


def numbers(seed: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    return random.integers(0, 1 << 30, shape).astype(dtype)


def outcome(source: str, choice: Choice) -> NDArray[Any] | None:
    """The stack of a source; None if it is refused. Anything else that is raised is a defect."""
    try:
        stack = open_stack(source, choice)
        try:
            return stack.read(0, stack.shape[0])
        finally:
            stack.close()
    except ChunkflowError as error:
        assert "\n" not in str(error)
        assert Path(source.partition(":")[0]).name in str(error)
        return None


# ------------------------------------------------------------------------------------------ TIFF


@dataclass(frozen=True)
class Tiff:
    """Stacks that are written into one file, and what happens to the file then."""

    parts: list[tuple[str, tuple[int, ...], str, dict[str, Any]]]
    layout: str
    byteorder: Literal["<", ">"]
    big: bool
    cut: float
    damage: list[tuple[float, int]]
    choice: Choice


PART = st.tuples(
    st.sampled_from(["YX", "ZYX", "ZYX", "ZYX", "CYX", "TYX", "ZCYX", "TZYX", "YXS", "ZYXS", "QQYX"]),
    st.tuples(*[st.integers(1, 4)] * 2, st.integers(2, 5), st.integers(2, 6)),
    st.sampled_from(DTYPES),
    st.fixed_dictionaries(
        {
            "photometric": st.sampled_from(["minisblack"] * 3 + ["miniswhite", "rgb"]),
            "compression": st.sampled_from([None, None, "zlib", "lzw", "packbits"]),
            "metadata": st.sampled_from(["axes", "axes", None, "default"]),
            "tile": st.sampled_from([None, None, (16, 16)]),
        }
    ),
)
CHOICES = st.builds(
    Choice,
    series=st.sampled_from([None, None, None, 0, 1]),
    level=st.sampled_from([0] * 9 + [1]),
    channel=st.sampled_from([None, None, 0, 0, 1]),
    time=st.sampled_from([None, 0, 0, 0, 1]),
)
TIFFS = st.builds(
    Tiff,
    st.one_of(st.lists(PART, min_size=1, max_size=1), st.lists(PART, min_size=1, max_size=3)),
    st.sampled_from(["plain", "plain", "imagej", "ome"]),
    st.sampled_from(["<", ">"]),
    st.booleans(),
    st.sampled_from([1.0] * 6 + [0.9, 0.5]),
    st.one_of(st.just([]), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4)),
    CHOICES,
)


def write_tiff(file: Path, case: Tiff) -> bool:
    """Write the file; whether tifffile can write such a one."""
    kind: dict[str, Any] = {case.layout: True} if case.layout != "plain" else {}
    try:
        with tifffile.TiffWriter(file, byteorder=case.byteorder, bigtiff=case.big and not kind, **kind) as writer:
            for axes, sizes, dtype, options in case.parts:
                shape = tuple(3 if axis == "S" else n for axis, n in zip(axes[:-2], sizes, strict=False))
                shape = {"S": (*sizes[: len(axes) - 3], *sizes[2:], 3)}.get(axes[-1], (*shape, *sizes[2:]))
                data = numbers(len(shape), shape, dtype)
                metadata = {"axes": {"axes": axes}, "default": {}, None: None}[options["metadata"]]
                photometric = "rgb" if axes[-1] == "S" else options["photometric"]
                writer.write(data, **options | {"metadata": metadata, "photometric": photometric})
    except Exception:  # tifffile refuses by exceptions of many kinds
        return False
    return True


def expected_of(tiff: tifffile.TiffFile, choice: Choice) -> NDArray[Any]:
    """The series that is chosen, by tifffile alone, with one axis for sections."""
    series = tiff.series
    pages = [page.aspage() for page in tiff.pages]
    if choice.series is None and len(series) > 1:
        assert len({(p.shape, str(p.dtype), p.photometric) for p in pages}) == 1
        data, axes = np.stack([page.asarray() for page in pages]), "I" + pages[0].axes
    else:
        chosen = series[choice.series or 0].levels[choice.level]
        data, axes = chosen.asarray().reshape(chosen.shape), chosen.axes
    for place in reversed(range(len(axes))):
        axis = axes[place]
        if data.shape[place] == 1 and axis not in "YX":
            data = data.take(0, place)
        elif axis in "CST":
            number = choice.time if axis == "T" else choice.channel
            assert number is not None, "a channel or time was taken for sections"
            data = data.take(number, place)
    if tiff.series[choice.series or 0].keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        data = np.iinfo(data.dtype).max - data
    return data.reshape(-1, *data.shape[-2:])


@given(TIFFS)
@examples(150)
def test_tiff(case: Tiff) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, "a.tif")
        if not write_tiff(file, case):
            return
        Path(folder, "whole").mkdir()
        shutil.copy(file, whole := Path(folder, "whole", "a.tif"))
        content = bytearray(file.read_bytes())
        for place, value in case.damage:
            content[int(place * len(content))] = value
        file.write_bytes(content[: int(len(content) * case.cut)])
        found = outcome(str(file), case.choice)
        if found is None or case.damage:
            return  # damaged numbers are read as they are; what is asked then is that nothing unforeseen is raised
        with tifffile.TiffFile(whole) as tiff:
            expected = expected_of(tiff, case.choice)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------ HDF5


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple),
    dtype=st.sampled_from([*DTYPES, "bool", "S3", ">u2", ">f4", "complex64"]),
    chunked=st.booleans(),
    written=st.floats(0, 1),
    filters=st.sampled_from(
        [{}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}]
    ),
    harm=st.one_of(st.none(), st.tuples(st.floats(0, 0.999), st.integers(0, 255))),
    axes=st.sampled_from([None, None, "ZYX", "XYZ", "CZYX", "YX"]),
    choice=CHOICES,
)
@examples(150)
def test_hdf5(
    shape: tuple[int, ...],
    dtype: str,
    chunked: bool,
    written: float,
    filters: dict[str, Any],
    harm: tuple[float, int] | None,
    axes: str | None,
    choice: Choice,
) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, "a.h5")
        chunked = chunked and all(shape)
        data = np.ones(shape, dtype) if dtype[0] in "Sbc" else numbers(1, shape, dtype)
        count = int(written * 1.3 * shape[0]) if written < 0.7 else shape[0]
        with h5py.File(file, "w") as store:
            options = filters | {"chunks": tuple(min(2, max(1, n)) for n in shape)} if chunked else {}
            dataset = store.create_dataset("raw", shape, dtype, **options)
            if count:
                dataset[:count] = data[:count]
        if harm is not None:
            content = bytearray(file.read_bytes())
            content[int(harm[0] * len(content))] = harm[1]
            file.write_bytes(content)
        found = outcome(f"{file}:raw", Choice(axes=axes, channel=choice.channel, time=choice.time))
        if found is None or harm is not None:
            return
        assert count + count % 2 * chunked >= shape[0] or (count and not chunked), "what was never written was taken"
        with h5py.File(file) as store:
            held = store["raw"][()]
        squeezed = tuple(n for n in shape if n != 1)
        order = axes or "ZYX"
        if order == "CZYX" and len(shape) == 4:
            assert shape[0] == 1 or choice.channel is not None
            held, order = held[choice.channel or 0], "ZYX"
        if axes is None:
            assert len(squeezed) <= 3
            held = held.reshape(found.shape)
        expected = held.transpose([order.index(axis) for axis in "ZYX" if axis in order]).reshape(found.shape)
        np.testing.assert_array_equal(found, expected)


# --------------------------------------------------------------------------------------- folders

NAMES: list[Callable[[int], str]] = [
    lambda n: f"s{n}",
    lambda n: f"s{n:04d}",
    lambda n: f"S{n:03d}",
    lambda n: f"t{n}",
    lambda n: f"s{n}_of_9",
    lambda n: f"{n}",
    lambda n: "over" + "view" * (n % 3),
]
WRITERS: dict[str, Callable[[Path, NDArray[Any]], object]] = {
    "tif": lambda file, data: tifffile.imwrite(file, data, photometric="minisblack"),
    "tiff": lambda file, data: tifffile.imwrite(file, data, photometric="minisblack", compression="zlib"),
    "png": lambda file, data: Image.fromarray(data).save(file),
    "bmp": lambda file, data: Image.fromarray(data.astype("uint8")).save(file, "BMP"),
}


@given(
    files=st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 5, 6]),
            st.sampled_from(["tif", "tif", "tif", "png", "tiff", "bmp"]),
        ),
        max_size=6,
    ),
    alike=st.booleans(),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "uint32"]),
    odd=st.one_of(st.none(), st.sampled_from(["size", "dtype", "empty"])),
    gaps=st.sampled_from(["error", "repeat", "blank"]),
    step=st.sampled_from([1, 1, 2]),
)
@examples(150)
def test_folders(
    files: list[tuple[int, int, str]], alike: bool, dtype: str, odd: str | None, gaps: Any, step: int
) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place, "folder")
        folder.mkdir()
        kept: dict[Path, NDArray[Any]] = {}
        for number, name, ending in files:
            name, ending = (files[0][1], files[0][2]) if alike else (name, ending)
            file = folder / f"{NAMES[name](number)}.{ending}"
            small = (
                dtype if ending.startswith("tif") else "uint16" if dtype == "uint16" and ending == "png" else "uint8"
            )
            kept[file] = numbers(number, (4, 5), small)
            if ending == "bmp":
                kept[file] = kept[file].astype("uint8")
        for k, (file, data) in enumerate(kept.items()):
            last = odd is not None and k == len(kept) - 1 and k > 0
            shown = (
                data[:, :-1] if last and odd == "size" else data.astype("uint8") if last and odd == "dtype" else data
            )
            WRITERS[file.suffix[1:]](file, shown)
            if last and odd == "empty":
                file.write_bytes(b"")
        found = outcome(str(folder), Choice(gaps=gaps, step=step))
        if found is None:
            return
        assert odd != "empty" or len(kept) < 2
        assert len({data.dtype for data in kept.values()}) == 1 or len(kept) < 2 or odd == "dtype"
        check_folder(kept, found, gaps, step)


def check_folder(kept: dict[Path, NDArray[Any]], found: NDArray[Any], gaps: str, step: int) -> None:
    """Check what was made of a folder that was not refused."""
    if not any(re.search("[0-9]", file.stem) for file in kept):
        np.testing.assert_array_equal(found, [kept[file] for file in sorted(kept, key=lambda file: file.name)])
        return
    by_number = {int(re.findall("[0-9]+", file.stem)[0]): data for file, data in kept.items()}
    assert len(by_number) == len(kept), "a section that is there twice was taken"
    assert len({file.suffix.replace("ff", "f") for file in kept}) == 1
    assert len({re.sub("[0-9]+", "#", file.stem.lower()) for file in kept}) == 1
    low, high = min(by_number), max(by_number)
    assert len(found) == (high - low) // step + 1
    assert gaps != "error" or len(found) == len(kept)
    last = np.zeros_like(found[0])
    for z, section in enumerate(found):
        data = by_number.get(low + z * step)
        last = data if data is not None else last if gaps == "repeat" else np.zeros_like(found[0])
        np.testing.assert_array_equal(section, last)
