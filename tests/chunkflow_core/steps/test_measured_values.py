"""Numbers that ``prepare`` measures: the same for all blocks, for as long as any block counts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.commands import stages
from chunkflow_core.engines.base import Engine
from chunkflow_core.errors import DataError, MissingInputError, SpecError
from chunkflow_core.inference.measuring import stored
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.planning.planner import Request, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.prepare import Other, prepare
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer
from tests.support.volume import output_of

FORMS: dict[str, dict[str, Any]] = {
    "percentiles": {"percentiles": [2, 98], "clip": True},
    "percentiles of each section": {"percentiles": [2, 98], "per_section": True, "invert": True},
    "mean": {"mean": "measured", "std": "measured", "clip": [-3, 3]},
    "mean of each section": {"mean": "measured", "std": "measured", "per_section": True},
}
CUTS: list[Vector] = [(12, 24, 24), (6, 48, 12), (24, 12, 48)]
SHAPE = (20, 48, 40)


def grey(shape: Vector, dtype: str = "uint8", start: int = 0) -> NDArray[Any]:
    """Sections that are each of another brightness and contrast, the same whatever the depth."""
    sections = []
    for z in range(start, start + shape[0]):
        rng = np.random.default_rng(z)
        sections.append(rng.normal(60 + 10 * (z % 11), 5 + 2 * (z % 7), (64, 64))[: shape[1], : shape[2]])
    return np.clip(np.rint(np.stack(sections)), 0, 255).astype(dtype)[None]


def write_input(folder: Path, data: NDArray[Any], resolution: Vector = (40, 4, 4)) -> None:
    shape = (data.shape[1], data.shape[2], data.shape[3])
    layer = NewLayer(f"file://{folder}/input", shape, dtype=str(data.dtype), resolution=resolution, chunk=(8, 16, 16))
    layer.write(Box((0, 0, 0), shape), data)


def write_spec(folder: Path, values: dict[str, Any], block: Vector = CUTS[0], **changes: Any) -> Path:
    """A spec beside its output and exchange; the input is in the folder above."""
    folder.mkdir(exist_ok=True)
    content = {
        "name": "values",
        "input": {"path": f"file://{folder.parent}/input", "values": values},
        "output": {
            "path": f"file://{folder}/output",
            "dtype": "float32",
            "chunk_size": [6, 12, 12],
            "range": [-99, 99],
        },
        "exchange": {"path": f"file://{folder}/exchange"},
        "patch_size": [8, 16, 16],
        "patch_overlap": [2, 4, 4],
        "block_size": list(block),
        "model": {"engine": "identity"},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


class Twisting(Engine):
    """A network in numpy that is not linear, and sees the neighbours of a voxel."""

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        rolled = np.roll(patches, 1, axis=4) - np.roll(patches, 1, axis=2)
        return np.ascontiguousarray(np.tanh(patches) * np.float32(3) + rolled * patches)


class TwistingOnDevice(Twisting):
    """The same, by the path of accelerators, in batches."""

    device, batch_size = torch.device("cpu"), 3

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self(patches.numpy()))


def run_in_turn(spec: VolumeSpec, engine: Engine, *, backwards: bool = False) -> NDArray[Any]:
    """Run a volume, each block with a workspace of its own, and give its output."""
    prepare(Workspace(spec, engine))
    blocks = sorted(spec.grid.indices(), reverse=backwards)
    for stage in (inference_and_donate, receive_and_blend):
        for index in blocks:
            stage(Workspace(spec, engine), index)
    return Workspace(spec).output.read(spec.grid.roi)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_however_the_volume_is_cut(tmp_path: Path, form: str) -> None:
    write_input(tmp_path, grey(SHAPE))
    outputs = [
        run_in_turn(load_spec(write_spec(tmp_path / str(n), FORMS[form], block)), Twisting(), backwards=n == 1)
        for n, block in enumerate(CUTS)
    ]
    outputs.append(run_in_turn(load_spec(write_spec(tmp_path / "device", FORMS[form])), TwistingOnDevice()))
    assert len(np.unique(outputs[0])) > 1000
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0], other)


def numbers(path: Path) -> dict[int, list[tuple[float, float]]]:
    """What is stored of a spec, by section; of the whole ROI as section 0."""
    measured = stored(Workspace(load_spec(path)).exchange.path)
    assert measured is not None
    sections = measured.sections if measured.sections is not None else {0: measured.whole}
    return {z: list(pairs) for z, pairs in sections.items()}


def test_the_numbers_do_not_depend_on_blocks(tmp_path: Path) -> None:
    write_input(tmp_path, grey(SHAPE, "float32"))
    for form, values in FORMS.items():
        found = []
        for n, block in enumerate(CUTS):
            path = write_spec(tmp_path / f"{form} {n}", values, block)
            assert main(["prepare", str(path)]) == 0
            found.append(numbers(path))
        assert found[0] == found[1] == found[2]
        assert len(found[0]) == (SHAPE[0] if values.get("per_section") else 1)


def test_what_processes_and_commands_read(tmp_path: Path) -> None:
    """Workers, and stages as commands of their own, have the numbers that ``prepare`` measured."""
    write_input(tmp_path, grey(SHAPE))
    first, second = (write_spec(tmp_path / name, FORMS["percentiles of each section"]) for name in ("one", "two"))
    assert main(["run", str(first), "--workers", "2", "--seams", "4"]) == 0
    assert main(["prepare", str(second)]) == 0
    for stage in (stages.infer, stages.blend):
        for index in load_spec(second).grid.indices():
            assert stage([str(second), "--block", *map(str, index)]) == 0
    np.testing.assert_array_equal(output_of(first), output_of(second))
    assert main(["verify", str(second), "--seams", "6"]) == 0
    data = grey(SHAPE)[0].astype(np.float32)
    for z, ((shift, divisor),) in numbers(first).items():
        ordered = np.sort(data[z].ravel())
        low, high = (ordered[math.ceil(len(ordered) * q / 100) - 1] for q in (2, 98))
        assert (shift, divisor) == (low, high - low)
        wanted = 1 - (data[z] - low) / (high - low)
        np.testing.assert_allclose(output_of(first)[0, z], wanted, atol=2e-4)  # the steps of a range of 99


# --------------------------------------------------------------------- what stays, and what not


def prepared(path: Path, other: Other = "refuse") -> VolumeSpec:
    spec = load_spec(path)
    prepare(Workspace(spec), other=other)
    return spec


def due(path: Path) -> int:
    spec = load_spec(path)
    return len(plan(spec, Request(), Workspace(spec).state()).infer)


@pytest.mark.parametrize("form", FORMS)
def test_a_volume_that_has_grown(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """Blocks that are done keep their numbers; sections that came get their own."""
    write_input(tmp_path, grey((44, 24, 24)))
    path = write_spec(tmp_path / "grown", FORMS[form])
    assert main(["run", str(path), "--seams", "0"]) == 0
    before, blocks = numbers(path), math.prod(load_spec(path).grid.shape)
    first = tmp_path / "grown/output/4_4_40/0-12_0-12_0-6.gz"
    written = first.stat().st_mtime_ns

    write_input(tmp_path, grey((60, 24, 24)))
    prepared(path)
    assert 0 < due(path) < math.prod(load_spec(path).grid.shape)
    assert main(["run", str(path), "--seams", "4"]) == 0
    after = numbers(path)
    assert {z: after[z] for z in before} == before
    assert first.stat().st_mtime_ns == written
    assert blocks > 2

    fresh = write_spec(tmp_path / "fresh", FORMS[form])
    assert main(["run", str(fresh), "--seams", "0"]) == 0
    if "section" in form:  # a section has the same numbers, whenever it came
        assert len(after) == 60
        assert numbers(fresh) == after
        np.testing.assert_array_equal(output_of(path), output_of(fresh))
    else:
        assert numbers(fresh) != after
        prepared(path, "overwrite")
        assert numbers(path) == numbers(fresh)
        assert due(path) == math.prod(load_spec(path).grid.shape)
        assert "all blocks are done again" in caplog.text


@pytest.mark.parametrize("form", ["percentiles", "mean of each section"])
def test_an_edit_changes_no_number_until_overwrite(tmp_path: Path, form: str) -> None:
    write_input(tmp_path, grey(SHAPE))
    path = write_spec(tmp_path / "v", FORMS[form])
    assert main(["run", str(path), "--seams", "0"]) == 0
    before = numbers(path)
    write_input(tmp_path, grey(SHAPE, start=3))
    prepared(path)
    assert numbers(path) == before
    assert due(path) == 0
    prepared(path, "overwrite")
    assert numbers(path) != before
    assert due(path) == math.prod(load_spec(path).grid.shape)


def test_overwrite_without_an_edit_discards_nothing(tmp_path: Path) -> None:
    write_input(tmp_path, grey(SHAPE))
    path = write_spec(tmp_path / "v", FORMS["percentiles"])
    assert main(["run", str(path), "--seams", "0"]) == 0
    prepared(path, "overwrite")
    assert due(path) == 0


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_are_lost(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """No stage guesses them; ``prepare`` measures anew, and no block counts any more."""
    write_input(tmp_path, grey(SHAPE))
    path = write_spec(tmp_path / "v", FORMS[form])
    assert main(["run", str(path), "--seams", "0"]) == 0
    (file,) = (tmp_path / "v").rglob("values.json")
    file.unlink()
    with pytest.raises(MissingInputError, match=r"values\.json: there is nothing that was measured"):
        inference_and_donate(Workspace(load_spec(path)), (0, 0, 0), why="forced")
    with caplog.at_level(logging.WARNING):
        prepared(path)
    assert "is lost" in caplog.text
    assert due(path) == math.prod(load_spec(path).grid.shape)
    assert main(["run", str(path), "--seams", "4"]) == 0


def _other_number(content: bytes) -> bytes:
    facts = json.loads(content)
    facts["values"]["whole"][0][0] += 1
    return json.dumps(facts).encode()


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-9], lambda _: b"", lambda _: b"[]", _other_number],
    ids=["cut", "", "[]", "edit"],
)
def test_numbers_that_are_damaged(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_input(tmp_path, grey(SHAPE))
    path = write_spec(tmp_path / "v", FORMS["percentiles"])
    prepared(path)
    (file,) = (tmp_path / "v").rglob("values.json")
    file.write_bytes(damage(file.read_bytes()))
    for step in (lambda: prepared(path), lambda: inference_and_donate(Workspace(load_spec(path)), (0, 0, 0))):
        with pytest.raises(DataError, match=r"values\.json, what was measured of the input, is damaged"):
            step()


def test_another_claim_measures_for_itself(tmp_path: Path) -> None:
    write_input(tmp_path, grey(SHAPE))
    path = write_spec(tmp_path / "v", FORMS["percentiles"])
    other = tmp_path / "v" / "other.yaml"
    content = yaml.safe_load(path.read_text())
    content["input"]["values"]["percentiles"] = [3, 98]
    other.write_text(yaml.safe_dump(content))
    first = prepared(path)
    assert prepared(other, "overwrite").fingerprint != first.fingerprint
    write_input(tmp_path, grey(SHAPE, start=3))
    before = prepared(path, "overwrite")
    assert before.fingerprint == first.fingerprint
    ((shift, _),) = numbers(path)[0]
    voxels = np.sort(grey(SHAPE, start=3).ravel())
    assert shift == voxels[math.ceil(len(voxels) * 2 / 100) - 1]


def coarser(folder: Path, factors: Vector) -> NDArray[Any]:
    """Give the input a coarser scale, and return its voxels."""
    fine = grey(SHAPE)
    z, y, x = factors
    coarse: NDArray[Any] = np.ascontiguousarray(fine[:, ::z, ::y, ::x])
    write_input(folder, coarse, (40 * z, 4 * y, 4 * x))
    (folder / "input").rename(folder / "coarse")
    write_input(folder, fine)
    info, more = (json.loads((folder / name / "info").read_text()) for name in ("input", "coarse"))
    info["scales"] += more["scales"]
    (folder / "input/info").write_text(json.dumps(info))
    key = more["scales"][0]["key"]
    (folder / "coarse" / key).rename(folder / "input" / key)
    voxels: NDArray[Any] = coarse[0]
    return voxels


def test_a_coarser_scale_is_measured(tmp_path: Path) -> None:
    """What is measured is the ROI, in the voxels of that scale that it touches."""
    coarse = coarser(tmp_path, (1, 2, 2))
    roi = [[2, 5, 8], [17, 39, 30]]
    path = write_spec(tmp_path / "v", {"percentiles": [10, 90], "mip": 1, "per_section": True}, roi=roi)
    assert main(["run", str(path), "--seams", "4"]) == 0
    assert sorted(numbers(path)) == list(range(2, 20)), "patches reach past the ROI"
    for z, ((shift, _),) in numbers(path).items():
        voxels = np.sort(coarse[z, 2:20, 4:15].ravel())
        assert shift == voxels[math.ceil(len(voxels) * 10 / 100) - 1]


def test_sections_of_another_depth_have_no_numbers(tmp_path: Path) -> None:
    coarser(tmp_path, (2, 2, 2))
    path = write_spec(tmp_path / "v", {"percentiles": [10, 90], "mip": 1, "per_section": True})
    with pytest.raises(SpecError, match=r"input\.values\.mip: 1: its voxels are 80 nm deep, .* 40 nm"):
        prepared(path)
    prepared(write_spec(tmp_path / "w", {"percentiles": [10, 90], "mip": 1}))


def test_a_missing_storage_chunk(tmp_path: Path) -> None:
    write_input(tmp_path, grey(SHAPE))
    path = write_spec(tmp_path / "v", FORMS["percentiles"])
    next((tmp_path / "input").rglob("*16-32_0-16_8-16*")).unlink()
    with pytest.raises(MissingInputError, match=r"set input\.fill_missing: true"):
        prepared(path)
    text = path.read_text().replace("input:\n", "input:\n  fill_missing: true\n")
    path.write_text(text)
    prepared(path)
    data = grey(SHAPE)
    data[0, 8:16, 0:16, 16:32] = 0
    voxels = np.sort(data[data != 0])
    assert numbers(path)[0][0][0] == voxels[math.ceil(len(voxels) * 2 / 100) - 1]
