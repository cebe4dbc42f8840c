"""A volume that has grown: its output is extended, to what a fresh run would write."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.errors import SpecError, StorageError
from chunkflow_core.lattice.boxes import Box, Vector
from chunkflow_core.spec import load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.output import check_output, extend_output, open_output
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layers import NewLayer
from tests.support.outputs import OTHER, modes, prepared, run, steps
from tests.support.volume import files_below, spec_content

MakeSpec = Callable[..., Path]


def grow_input(layer: Path, shape: Vector) -> None:
    """Write the input layer anew: of another shape, with the same voxels where there were some."""
    data = np.random.default_rng(7).integers(0, 256, (1, 64, 64, 64), dtype=np.uint8)[
        :, : shape[0], : shape[1], : shape[2]
    ]
    new = NewLayer(f"file://{layer}", shape, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 16, 16))
    new.write(Box((0, 0, 0), shape), data)


def write_spec(folder: Path, shape: Vector, overlap: int) -> Path:
    folder.mkdir()
    grow_input(folder / "input", shape)
    path = folder / "spec.yaml"
    path.write_text(json.dumps(spec_content(folder / "input", folder) | {"patch_overlap": [overlap, 4, 4]}))
    return path


@pytest.mark.parametrize(
    ("before", "after", "overlap"),
    [
        ((44, 24, 24), (60, 24, 24), 2),  # along z, many blocks
        ((20, 47, 37), (26, 47, 37), 2),  # faces that cut storage chunks short and stay so
        ((14, 28, 26), (15, 40, 40), 2),  # along all axes, with blocks where there were none
        ((24, 24, 24), (27, 24, 24), 2),  # no storage chunk was cut short
        ((20, 16, 16), (30, 16, 16), 6),  # new patches reach into the last block but one
    ],
)
def test_grown_volume_is_what_a_fresh_run_would_write(
    tmp_path: Path, before: Vector, after: Vector, overlap: int
) -> None:
    """The outputs are equal by storage chunk; what is far from the old end is not done again."""
    path, fresh = write_spec(tmp_path / "grown", before, overlap), write_spec(tmp_path / "fresh", after, overlap)
    run(path)
    first = tmp_path / "grown/output/4_4_40/0-8_0-8_0-4.gz"
    written = first.stat().st_mtime_ns

    grow_input(tmp_path / "grown/input", after)
    run(path)
    run(fresh)

    chunks = files_below(tmp_path / "fresh/output/4_4_40")
    grown = files_below(tmp_path / "grown/output/4_4_40")
    assert grown.keys() == chunks.keys()
    assert grown == chunks
    infos = [json.loads((tmp_path / name / "output/info").read_text()) for name in ("grown", "fresh")]
    assert infos[0] == infos[1]
    assert [step["mode"] for step in steps(tmp_path / "grown")] == ["new", "extend"]
    assert steps(tmp_path / "grown")[-1]["roi"] == [[0, 0, 0], list(after)]
    if before == (44, 24, 24):
        assert first.stat().st_mtime_ns == written
    assert main(["verify", str(path), "--seams", "4"]) == 0


@pytest.mark.parametrize("padding", ["reflect", "edge", "constant"])
def test_input_that_grows_while_a_run_is_at_work(tmp_path: Path, padding: str, chunkflow: Callable[..., Any]) -> None:
    """The run is that of the volume as it was; the next does the rest.

    To this end, what ``prepare`` says is given to all that follows.
    """
    before, after = (14, 28, 26), (15, 40, 40)
    paths = [write_spec(tmp_path / name, shape, 2) for name, shape in (("it", before), ("was", before), ("is", after))]
    path, *others = paths
    of_padding = f"input.padding={padding}"
    for other in others:
        run(other, of_padding)
    found = json.loads(chunkflow("prepare", path, "--json", "--set", of_padding).stdout)
    settings = [of_padding, f"roi={found['roi']}", f"input.bounds={found['input_bounds']}"]
    (first, *rest) = load_spec(path, settings).grid.indices()
    inference_and_donate(Workspace(load_spec(path, settings)), first)

    grow_input(tmp_path / "it/input", after)

    for stage, blocks in ((inference_and_donate, rest), (receive_and_blend, [first, *rest])):
        for block in blocks:
            stage(Workspace(load_spec(path, settings)), block)
    assert files_below(tmp_path / "it/output/4_4_40") == files_below(tmp_path / "was/output/4_4_40")
    run(path, *settings)
    assert files_below(tmp_path / "it/output/4_4_40") == files_below(tmp_path / "was/output/4_4_40")
    run(path, of_padding)
    assert files_below(tmp_path / "it/output/4_4_40") == files_below(tmp_path / "is/output/4_4_40")


@pytest.mark.parametrize("fill_missing", [False, True])
def test_storage_chunks_at_the_old_end_get_other_names_while_a_block_reads(tmp_path: Path, fill_missing: bool) -> None:
    """Whoever has opened the layer before must not believe that a storage chunk is gone.

    Sections 40–44 are a file of their own until the layer grows.
    """
    path = write_spec(tmp_path / "it", (44, 24, 24), 2)
    spec = prepared(path, f"input.fill_missing={json.dumps(fill_missing)}")
    workspace, settings = Workspace(spec), [f"{key}={[[0, 0, 0], [44, 24, 24]]}" for key in ("roi", "input.bounds")]
    assert workspace.input.bounds.stop == (44, 24, 24)
    grow_input(tmp_path / "it/input", (60, 24, 24))
    for file in (tmp_path / "it/input").glob("*/*_40-44*"):
        file.unlink()

    with pytest.raises(StorageError, match=r"it had z 0–44 .*, now z 0–60 .*\. A retry reads it as it is now"):
        inference_and_donate(workspace, (3, 0, 0))

    assert workspace.exchange.receipts("infer") == {}
    again = load_spec(path, [*settings, f"input.fill_missing={json.dumps(fill_missing)}"])
    assert inference_and_donate(Workspace(again), (3, 0, 0)).receipt is not None


def test_bounds_that_the_input_does_not_have(make_spec: MakeSpec, chunkflow: Callable[..., Any]) -> None:
    outcome = chunkflow("prepare", make_spec(), "--set", "input.bounds=[[0, 0, 0], [20, 48, 41]]")
    assert outcome.returncode == 78
    assert "input.bounds: z 0–20 y 0–48 x 0–41 reach past the layer" in outcome.stderr
    assert "which has z 0–20 y 0–48 x 0–40; give a part of it" in outcome.stderr


def test_only_what_was_cut_short_is_deleted(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The ends at z 20 and x 40 cut storage chunks of 6 × 12 × 12 short, that at y 48 does not."""
    path = make_spec(roi=[[0, 0, 0], [14, 48, 40]])
    run(path)
    folder = tmp_path / "output" / "4_4_40"
    (folder / "notes.txt").write_text("not a storage chunk")
    before = set(files_below(folder))

    prepared(path, "roi=[[0, 0, 0], [16, 48, 40]]")

    gone = before - set(files_below(folder))
    assert gone == {name for name in before if name.endswith("_12-14.gz")}
    assert len(gone) == 16


def test_extension_that_was_cut_short_is_finished_by_the_next_prepare(make_spec: MakeSpec, tmp_path: Path) -> None:
    path, grown = make_spec(roi=[[0, 0, 0], [14, 48, 40]]), "roi=[[0, 0, 0], [16, 48, 40]]"
    run(path)
    folder, spec = tmp_path / "output" / "4_4_40", load_spec(path, [grown])

    extend_output(spec, check_output(spec, may_grow=True))  # killed here
    next(folder.glob("*_12-14.gz")).unlink()  # or after the first of those deletions

    prepared(path, grown)
    assert not list(folder.glob("*_12-14.gz"))
    assert modes(tmp_path) == ["new", "extend"]
    before = files_below(tmp_path / "output")
    prepared(path, grown)
    assert files_below(tmp_path / "output") == before


def test_claim_of_a_volume_that_has_grown(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Another model is refused before anything is extended; then both are one step."""
    path, grown = make_spec(roi=[[0, 0, 0], [14, 48, 40]]), "roi=[[0, 0, 0], [16, 48, 40]]"
    run(path)
    before = files_below(tmp_path)
    with pytest.raises(SpecError, match="--overwrite"):
        prepared(path, grown, *OTHER)
    assert files_below(tmp_path) == before

    prepared(path, grown, *OTHER, other="overwrite")
    assert modes(tmp_path) == ["new", "overwrite"]
    assert check_output(load_spec(path, [grown])).bounds == Box((0, 0, 0), (16, 48, 40))
    assert not list((tmp_path / "output" / "4_4_40").glob("*_12-14.gz"))


def test_other_keys_of_info_are_kept(make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_spec(roi=[[0, 0, 0], [14, 48, 40]])
    prepared(path)
    file = tmp_path / "output" / "info"
    info = json.loads(file.read_text())
    smaller = info["scales"][0] | {"key": "8_8_40", "resolution": [8, 8, 40], "size": [20, 24, 14]}
    info |= {"mesh": "mesh", "scales": [info["scales"][0] | {"hidden": True}, smaller]}
    file.write_text(json.dumps(info))

    with caplog.at_level(logging.WARNING):
        prepared(path, "roi=[[0, 0, 0], [16, 48, 40]]")

    assert "the 1 smaller scales" in caplog.text
    info["scales"][0]["size"] = [40, 48, 16]
    assert json.loads(file.read_text()) == info


@pytest.mark.parametrize(
    "roi",
    [
        [[0, 0, 0], [12, 48, 40]],  # less
        [[0, 0, 0], [16, 48, 36]],  # more along z, less along x
    ],
)
def test_layer_does_not_shrink(make_spec: MakeSpec, tmp_path: Path, roi: list[list[int]]) -> None:
    path = make_spec(roi=[[0, 0, 0], [14, 48, 40]])
    run(path)
    before = files_below(tmp_path)
    with pytest.raises(SpecError) as refusal:
        prepared(path, f"roi={roi}")
    assert "has bounds z 0–14 y 0–48 x 0–40, the spec says" in str(refusal.value)
    assert "set roi: [[0, 0, 0], [14, 48, 40]] to go on with it, give another path" in str(refusal.value)
    assert files_below(tmp_path) == before


def test_layer_does_not_move(make_spec: MakeSpec, tmp_path: Path) -> None:
    path = make_spec(roi=[[6, 0, 0], [14, 48, 40]])
    prepared(path)
    with pytest.raises(SpecError, match="neither shrink nor move"):
        prepared(path, "roi=[[0, 0, 0], [14, 48, 40]]", other="overwrite")


def test_tasks_write_only_to_a_layer_of_their_own_size(make_spec: MakeSpec) -> None:
    """A task of an earlier version of the volume's DAG may not cut storage chunks short again.

    One of a later version has to wait.
    """
    path, grown = make_spec(roi=[[0, 0, 0], [14, 48, 40]]), ["roi=[[0, 0, 0], [16, 48, 40]]"]
    prepared(path)
    with pytest.raises(SpecError, match="The volume has grown: `prepare` extends the layer"):
        open_output(load_spec(path, grown))
    prepared(path, *grown)
    open_output(load_spec(path, grown))
    with pytest.raises(SpecError, match="a later run has extended it: start a new run instead of clearing tasks"):
        open_output(load_spec(path))
