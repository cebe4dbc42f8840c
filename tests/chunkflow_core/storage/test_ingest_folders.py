"""Folders of images: which files are sections, which are missing, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from chunkflow_core.errors import DataError
from chunkflow_core.storage.ingest.axes import Choice
from chunkflow_core.storage.ingest.sources import open_stack

DATA = np.random.default_rng(3).integers(1, 256, (40, 5, 6), np.uint8)


def write(folder: Path, *names: str) -> Path:
    """A folder of images, each of which has the voxels of the last number in its name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        digits = "".join(c if c.isdecimal() else " " for c in name.rpartition(".")[0]).split()
        Image.fromarray(DATA[int(digits[-1]) % 40 if digits else names.index(name)]).save(folder / name)
    return folder


def whole(source: Path, **choice: Any) -> NDArray[Any]:
    stack = open_stack(str(source), Choice(**choice))
    return stack.read(0, stack.shape[0])


@pytest.mark.parametrize(
    "names",
    [
        ["s9.png", "s10.png", "s11.png"],
        ["s009.png", "s010.png", "s011.png"],
        ["S9.PNG", "s10.png", "s011.png"],
        ["2024 slice 9 of 11.tif", "2024 slice 10 of 11.tif", "2024 slice 11 of 11.tif"],
        ["9.tif", "10.tiff", "11.TIF"],
        ["a3_y7_009.bmp", "a4_y7_010.bmp", "a5_y7_011.bmp"],
    ],
)
def test_numbers_that_go_on(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path / "f", *names)
    if "of" in names[0]:
        for z, name in enumerate(names):
            Image.fromarray(DATA[9 + z]).save(tmp_path / "f" / name)
    np.testing.assert_array_equal(whole(tmp_path / "f"), DATA[9:12])


def test_names_without_numbers_come_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "f", "alpha.png", "beta.png", "gamma.png")
    np.testing.assert_array_equal(whole(tmp_path / "f"), DATA[:3])


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["s0.png", "s1.png", "s3.png"], [2]),
        (["s07.tif", "s09.tif"], [1]),
        (["s1.png", "s2.png", "s5.png", "s6.png", "s8.png"], [2, 3, 6]),
        (["s0.png", "s2.png", "s4.png", "s6.png"], [1, 3, 5]),
        (["z0008.png", "z0010.png", "z0011.png"], [1]),
    ],
)
def test_gaps(tmp_path: Path, names: list[str], missing: list[int]) -> None:
    write(tmp_path / "f", *names)
    with pytest.raises(DataError) as caught:
        whole(tmp_path / "f")
    assert f"{len(missing)} section" in str(caught.value)
    assert f"between {names[missing[0] - 1]} and {names[missing[0]]}" in str(caught.value)
    first = int(names[0].strip("sz.pngtif"))
    expected = DATA[first : first + len(names) + len(missing)].copy()
    for z in missing:
        expected[z] = expected[z - 1]
    np.testing.assert_array_equal(whole(tmp_path / "f", gaps="repeat"), expected)
    expected[missing] = 0
    np.testing.assert_array_equal(whole(tmp_path / "f", gaps="blank"), expected)


@pytest.mark.parametrize("step", [2, 3, 10])
def test_numbers_in_steps_are_said_to_be_so(tmp_path: Path, step: int) -> None:
    write(tmp_path / "f", *(f"z{5 + k * step:04d}.png" for k in range(4)))
    with pytest.raises(DataError, match=f"or --step {step}"):
        whole(tmp_path / "f")
    np.testing.assert_array_equal(whole(tmp_path / "f", step=step), DATA[5 : 6 + 3 * step : step])
    with pytest.raises(DataError, match="no whole number of steps of --step 7"):
        whole(tmp_path / "f", step=7)


def test_a_number_from_elsewhere_is_no_gap_to_fill(tmp_path: Path) -> None:
    write(tmp_path / "f", "s1.png", "s2.png", "s20240101.png")
    with pytest.raises(DataError, match=r"20240098 sections are missing.*s20240101\.png"):
        whole(tmp_path / "f", gaps="repeat")


@pytest.mark.parametrize(
    ("names", "pieces"),
    [
        (["1.tif", "2.tif", "2.png"], ["2.png", "2.tif", "same section"]),
        (["1.tif", "0001.tif"], ["0001.tif", "1.tif", "same section"]),
        (["S1.png", "s01.png", "s2.png"], ["S1.png", "s01.png", "same section"]),
        (["1.jpg", "1.jpeg"], ["1.jpg", "1.jpeg", "same section"]),
        (["1.tif", "2.tif", "3.png"], ["2 .tif", "1 .png", "3.png", "several types"]),
        (["raw1.png", "raw2.png", "mask1.png", "mask2.png"], ["mask1.png", "raw1.png", "named otherwise"]),
        (["s1.png", "s2.png", "overview.png"], ["overview.png", "s1.png", "named otherwise"]),
        (["1a.png", "1b.png", "2a.png"], ["named otherwise"]),
        (["r1c1.png", "r1c2.png", "r2c1.png", "r2c2.png"], ["no number", "r1c1.png"]),
        (["a1_b4.png", "a5_b3.png", "a9_b2.png"], ["two orders", "a1_b4.png"]),
    ],
)
def test_what_no_order_follows_from(tmp_path: Path, names: list[str], pieces: list[str]) -> None:
    write(tmp_path / "f", *names)
    for gaps in ("error", "repeat", "blank"):
        with pytest.raises(DataError) as caught:
            whole(tmp_path / "f", gaps=gaps)
        for piece in pieces:
            assert piece in str(caught.value)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_a_section_of_another_size_is_named_before_anything_is_written(
    tmp_path: Path, ending: str, chunkflow: Callable[..., Any]
) -> None:
    write(tmp_path / "f", *(f"img_{4000 + k}.{ending}" for k in range(6)))
    Image.fromarray(DATA[3, :, :-1]).save(tmp_path / "f" / f"img_4003.{ending}")
    outcome = chunkflow("ingest", tmp_path / "f", f"file://{tmp_path}/layer", "--voxel-size", 40, 4, 4)
    assert outcome.returncode == 65
    for piece in (f"img_4003.{ending}: ", f"img_4000.{ending}", "(5, 5)", "(5, 6)"):
        assert piece in outcome.stderr
    assert not (tmp_path / "layer").exists()


@pytest.mark.parametrize("gaps", ["repeat", "blank"])
def test_what_was_filled_is_on_record(tmp_path: Path, gaps: str, chunkflow: Callable[..., Any]) -> None:
    write(tmp_path / "f", "s3.png", "s4.png", "s6.png")
    outcome = chunkflow("ingest", tmp_path / "f", f"file://{tmp_path}/layer", "--voxel-size", 40, 4, 4, "--gaps", gaps)
    assert outcome.returncode == 0, outcome.stderr
    assert f'filled: {{"with": "{gaps}", "sections": [2]}}' in outcome.stdout
    provenance = json.loads((tmp_path / "layer" / "provenance").read_text())
    assert provenance["sources"] == [str(tmp_path / "f")]
    assert provenance["processing"][0]["method"]["filled"] == {"with": gaps, "sections": [2]}


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA", "CMYK"])
def test_colours_and_alpha_are_chosen_from(tmp_path: Path, mode: str) -> None:
    ending = "tif" if mode == "CMYK" else "png"
    image = Image.merge(mode, [Image.fromarray(DATA[k]) for k in range(len(Image.new(mode, (1, 1)).getbands()))])
    (tmp_path / "f").mkdir()
    image.save(tmp_path / "f" / f"1.{ending}")
    with pytest.raises(DataError, match="SEPARATED" if mode == "CMYK" else "--channel N"):
        whole(tmp_path / "f")
    if mode != "CMYK":
        np.testing.assert_array_equal(whole(tmp_path / "f", channel=1)[0], DATA[1])


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_transparent_pixels(tmp_path: Path, mode: str) -> None:
    (tmp_path / "f").mkdir()
    image = Image.fromarray(DATA[0]).convert(mode)
    pixel = image.getpixel((0, 0))
    image.save(tmp_path / "f" / "1.png", transparency=pixel)
    with pytest.raises(DataError, match="transparent pixels"):
        whole(tmp_path / "f", channel=0)
