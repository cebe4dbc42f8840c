"""What is due, on a real exchange, is found from its receipts and donations.

It is tried for a first run, after a crash at any point, for a part, forced, after cleaning up.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudvolume import CloudVolume
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_core.__main__ import main
from chunkflow_core.errors import StorageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.exchange.marks import STAGES, InferenceMark, Stage, given_places, parse_mark, receiver_at, slot
from chunkflow_core.inference_and_donate import main as infer_command
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.planning.inputs import Inputs
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.blend import receive_and_blend
from chunkflow_core.steps.infer import inference_and_donate
from chunkflow_core.steps.local import DueTasks, Task
from chunkflow_core.steps.workspace import Workspace
from chunkflow_core.storage.layer_info import read_scale
from chunkflow_core.storage.layer_reader import open_volume
from chunkflow_core.storage.layers import OutputLayer
from chunkflow_core.storage.signatures import WrittenChunk
from tests.support.random_examples import examples
from tests.support.volume import CHUNK, files_below, write_layer, write_volume

ALL = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    spec = write_volume(tmp_path)
    assert main(["prepare", str(spec)]) == 0
    return spec


def due(spec: VolumeSpec, box: Box | None = None, *, force: bool = False, check_input: bool = False) -> Plan:
    return plan(spec, Request(box, force=force, check_input=check_input), Workspace(spec).state())


def inside(grid: BlockGrid, index: Vector) -> Box:
    """One voxel in the middle of a block."""
    box = grid.block(index).box
    start = vector((a + b) // 2 for a, b in zip(box.start, box.stop, strict=True))
    return Box(start, vector(v + 1 for v in start))


def test_everything_then_nothing(path: Path) -> None:
    spec = load_spec(path)
    assert due(spec) == Plan(tuple(ALL), tuple(ALL[1:]), ())

    assert main(["run", str(path)]) == 0

    assert due(spec) == Plan((), (), tuple(ALL))


def test_what_is_left_after_stopping_anywhere(path: Path) -> None:
    spec = load_spec(path)
    workspace, first = Workspace(spec), due(spec)
    schedule, left = (
        DueTasks(spec.grid, first),
        {("infer", b) for b in first.infer} | {("blend", b) for b in first.blend},
    )
    while task := schedule.next():
        stage, index = task
        (inference_and_donate if stage == "infer" else receive_and_blend)(workspace, index)
        schedule.done(task)
        left.discard(task)
        now = due(spec)
        assert {("infer", b) for b in now.infer} | {("blend", b) for b in now.blend} == left
    assert not left


def test_a_part_needs_its_donors(path: Path) -> None:
    spec = load_spec(path)

    wanted = due(spec, inside(spec.grid, (0, 1, 1)))

    assert wanted.infer == ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1))
    assert wanted.blend == ((0, 1, 1),)


def test_two_parts_make_the_whole(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    lower, upper = spec.grid.roi.with_z(0, 12), spec.grid.roi.with_z(12, 20)
    for part in (lower, upper):
        assert main(["run", str(path), "--bbox", *map(str, (*part.start, *part.stop))]) == 0
    parts = files_below(tmp_path / "output")
    assert due(spec) == Plan((), (), tuple(ALL))

    assert main(["run", str(path), "--force"]) == 0

    assert files_below(tmp_path / "output") == parts


def test_forcing_a_block_after_cleaning_up(path: Path) -> None:
    """The forced block's receivers blend again, for which their other donors have to donate again.

    Those write nothing new to others.
    """
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    assert Exchange(spec).donation_keys() == set()

    forced = due(spec, inside(spec.grid, (1, 1, 1)), force=True)

    assert forced.infer == tuple(ALL)
    assert forced.blend == ((1, 1, 1),)


def test_a_lost_blend_receipt_brings_back_its_donors(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    next(tmp_path.rglob(f"receipts/blend/*/{spec.grid.block((0, 0, 1)).box.key}%*.json")).unlink()

    assert due(spec) == Plan(((0, 0, 0), (0, 0, 1)), ((0, 0, 1),), tuple(b for b in ALL if b[:2] != (0, 0)))


def edit(folder: Path, voxel: Vector, *, layer: str = "input") -> None:
    """Change a voxel of a layer, and so the file of its storage chunk."""
    path = f"file://{folder}/{layer}"
    with_zeros = open_volume(path, read_scale(path, 0), fill_missing=True)
    z, y, x = (slice(n // size * size, n // size * size + size) for n, size in zip(voxel, CHUNK, strict=True))
    bounds = read_scale(path, 0).bounds
    z, y, x = (slice(part.start, min(part.stop, stop)) for part, stop in zip((z, y, x), bounds.stop, strict=True))
    data = np.asarray(with_zeros[x, y, z])
    data[voxel[2] - x.start, voxel[1] - y.start, voxel[0] - z.start] += 1
    writable = CloudVolume(path, progress=False, compress="gzip")
    writable[x, y, z] = data


def test_an_edit_of_the_input(path: Path, tmp_path: Path) -> None:
    """The storage chunk of the voxel is read by the blocks whose input, 14 × 28 × 28, reaches it.

    It is z 0–8, y 0–16, x 32–40.
    """
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    edit(tmp_path, (3, 3, 38))

    assert due(spec) == Plan((), (), tuple(ALL)), "receipts alone can't tell"
    checked = due(spec, check_input=True)

    readers = {(0, 0, 1)}
    assert {block for block, reason in checked.why.items() if reason == "input"} == readers
    assert set(checked.blend) == {(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)}
    assert set(checked.infer) == set(ALL), "all are donors of those, and have to donate again"
    assert main(["run", str(path), "--check-input", "--seams", "12"]) == 0
    assert due(spec, check_input=True) == Plan((), (), tuple(ALL))


@pytest.mark.parametrize("command", [["run"], ["plan", "--run", "x"]], ids=" ".join)
def test_the_same_voxels_in_new_files(
    path: Path, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage can't tell, the voxels do; and notes then say what storage says."""
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    before = files_below(Path(Exchange(spec).path.removeprefix("file://")))
    for file in (tmp_path / "input").glob("*/*"):
        os.utime(file)

    assert due(spec, check_input=True) == Plan((), (), tuple(ALL))
    assert main(["plan", str(path), "--check-input"]) == 0

    assert files_below(Path(Exchange(spec).path.removeprefix("file://"))) == before, "a question does not write"

    assert main([command[0], str(path), "--check-input", *command[1:]]) == 0

    for block, mark in Exchange(spec).marks("infer", [(0, 0, 0)]).items():
        assert isinstance(mark, InferenceMark)
        assert mark.same == {(mark.signature, Workspace(spec).inputs.signature(block))}
    monkeypatch.setattr(Inputs, "content", pytest.fail)
    assert due(spec, check_input=True) == Plan((), (), tuple(ALL)), "no voxel has to be read again"
    monkeypatch.undo()
    assert main(["verify", str(path), "--seams", "0"]) == 0


def test_a_check_that_is_interrupted_keeps_what_it_has_found(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    chunks = sorted((tmp_path / "input").glob("*/*"))
    for file in chunks:
        os.utime(file)
    last = max(chunks, key=lambda file: [int(part.split("-")[0]) for part in file.name.split(".")[0].split("_")][::-1])
    last.unlink()

    assert main(["run", str(path), "--check-input"]) == 66

    marks = Exchange(spec).marks("infer", [(0, 0, 0)])
    assert any(marks[block].same for block in ALL)


def test_what_is_found_out_of_a_receipt_that_is_retracted_meanwhile(path: Path) -> None:
    """It stays true, and brings nothing back."""
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    exchange = Exchange(spec)
    receipt = exchange.receipt("infer", (0, 0, 0))
    assert receipt is not None
    exchange.retract("infer", (0, 0, 0))

    exchange.put_note("infer", (0, 0, 0), receipt.signature, "0" * 13)

    assert exchange.receipt("infer", (0, 0, 0)) is None
    assert (0, 0, 0) not in exchange.marks("infer", [(0, 0, 0)])


def test_a_task_whose_input_is_unchanged(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(path)]) == 0
    before = files_below(tmp_path / "output")
    for file in (tmp_path / "input").glob("*/*"):
        os.utime(file)
    capsys.readouterr()

    assert infer_command([str(path), "--block", "0", "0", "1", "--check-input"]) == 0
    assert "inference is up to date" in capsys.readouterr().out

    edit(tmp_path, (3, 3, 38))
    assert infer_command([str(path), "--block", "0", "0", "0", "--check-input"]) == 0
    assert "inference is up to date" in capsys.readouterr().out
    assert files_below(tmp_path / "output") == before
    assert infer_command([str(path), "--block", "0", "0", "1", "--check-input"]) == 0
    assert "4 patches inferred" in capsys.readouterr().out


def test_an_edit_of_the_mask(tmp_path: Path) -> None:
    """An edit counts also where it changes no patch: what is outside is 0 in the output."""
    path = write_volume(tmp_path, skip={"mask": {"path": f"file://{tmp_path}/mask"}})
    write_layer(tmp_path / "mask")
    assert main(["run", str(path)]) == 0
    spec = load_spec(path)
    scale = read_scale(f"file://{tmp_path}/mask", 0)
    mask = np.asarray(open_volume(f"file://{tmp_path}/mask", scale)[:, :, :])
    mask[20, 30, 3] = 0 if mask[20, 30, 3].any() else 1
    CloudVolume(f"file://{tmp_path}/mask", progress=False)[:, :, :] = mask

    checked = due(spec, check_input=True)

    assert {b for b, reason in checked.why.items() if reason == "input"} == {(0, 1, 0)}
    assert main(["run", str(path), "--check-input", "--seams", "20"]) == 0


def test_a_donor_whose_input_has_changed_is_no_mere_donor(path: Path, tmp_path: Path) -> None:
    """The donor is outside what is asked for, but its donations are needed.

    What it gives others changes, too.
    """
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    edit(tmp_path, (3, 3, 38))

    forced = due(spec, inside(spec.grid, (1, 1, 1)), force=True)

    assert forced.why[(1, 1, 1)] == "forced"
    assert set(forced.blend) == {(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)}


def test_an_edit_that_only_a_donor_of_the_requested_block_reads(path: Path, tmp_path: Path) -> None:
    """What the requested block gets from the donor is about to change.

    The input of that block itself has not changed.
    """
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    edit(tmp_path, (3, 3, 3))

    planned = due(spec, inside(spec.grid, (1, 1, 1)), check_input=True)

    assert planned.why[(0, 0, 0)] == "input"
    assert planned.why[(1, 1, 1)] == "donations"
    assert (1, 1, 1) in planned.blend


def test_a_donor_is_needed_whether_its_input_has_changed_or_not(path: Path, tmp_path: Path) -> None:
    """The task of such a donor may not find itself up to date.

    Its donations are gone, and another donor of the same block gives new ones.
    """
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    edit(tmp_path, (3, 3, 3))

    planned = due(spec, inside(spec.grid, (1, 1, 1)), force=True, check_input=True)

    assert planned.why[(1, 1, 1)] == "forced"
    assert planned.why[(0, 0, 0)] == "donations"


def test_an_edit_while_a_block_is_at_work_is_noticed(path: Path, tmp_path: Path) -> None:
    """Some of what was read may be of before, some of after: a retry reads all of it again."""
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    edits: list[Vector] = []

    def edit_once() -> None:
        if not edits:
            edits.append((19, 47, 39))
            edit(tmp_path, edits[0])

    workspace = Workspace(spec)
    with pytest.raises(StorageError, match=r"block \(1, 1, 1\) was changed while it was read"):
        inference_and_donate(workspace, (1, 1, 1), why="forced", patch_done=edit_once)

    assert edits
    assert due(spec, inside(spec.grid, (1, 1, 1))).why[(1, 1, 1)] == "new"
    assert inference_and_donate(workspace, (1, 1, 1), why="new", patch_done=edit_once).receipt is not None
    assert due(spec, inside(spec.grid, (1, 1, 1)), check_input=True).infer == ()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_done_again_has_no_receipt_while_it_writes(
    path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    """Half of the new beside half of the old is never vouched for."""
    spec = load_spec(path)
    assert main(["run", str(path), "--set", "exchange.donations=keep"]) == 0
    found: list[object] = []
    write = OutputLayer.write

    def look_and_write(self: OutputLayer, *arguments: Any) -> dict[str, WrittenChunk]:
        found.append(Exchange(spec).receipt(stage, (1, 1, 1)))
        return write(self, *arguments)

    monkeypatch.setattr(OutputLayer, "write", look_and_write)
    {"infer": inference_and_donate, "blend": receive_and_blend}[stage](Workspace(spec), (1, 1, 1), why="forced")

    assert found and set(found) == {None}
    assert Exchange(spec).receipt(stage, (1, 1, 1)) is not None


def test_a_receipt_remembers_the_latest_changes_only(path: Path) -> None:
    spec, runs = load_spec(path), tuple(f"run-{number}" for number in range(16, 0, -1))
    receipt = inference_and_donate(Workspace(spec), (0, 0, 0), run="run-0").receipt
    assert receipt is not None
    Exchange(spec).put_receipt(replace(receipt, changes=runs, written={}))

    again = inference_and_donate(Workspace(spec), (0, 0, 0), run="run-17", why="forced").receipt

    assert again is not None
    assert again.changes == ("run-17", *runs[:15])


def test_two_receipts_of_one_block(path: Path) -> None:
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    exchange = Exchange(spec)
    receipt = exchange.receipt("infer", (0, 1, 0))
    assert receipt is not None

    exchange.put_receipt(replace(receipt, signature="0" * 13))
    assert due(spec) == Plan((), (), tuple(ALL)), "of the same content"

    first, *others = receipt.donations
    exchange.put_receipt(replace(receipt, donations=(replace(first, checksum="0" * 32), *others)))
    assert due(spec).why[(0, 1, 0)] == "new", "which of them tells the truth?"
    assert exchange.receipt("infer", (0, 1, 0)) is None
    assert main(["run", str(path)]) == 0
    assert due(spec) == Plan((), (), tuple(ALL))


def test_a_receipt_of_another_fingerprint(path: Path, tmp_path: Path) -> None:
    spec, other = load_spec(path), load_spec(path, ["model.threads=2"])
    assert main(["run", str(path)]) == 0
    folder = Path(Exchange(other).path.removeprefix("file://"))
    shutil.copytree(Path(Exchange(spec).path.removeprefix("file://")) / "receipts", folder / "receipts")

    assert due(other) == Plan(tuple(ALL), tuple(ALL[1:]), ())


@examples(100)
@given(
    st.tuples(*[st.integers(-30, 30)] * 3),
    st.dictionaries(st.integers(0, 7), st.tuples(st.text("abc2", min_size=13, max_size=13), st.integers(0, 999))),
    st.sampled_from(["", "xyz7xyz7xyz7x"]),
    st.sampled_from(["", "abc2abc2abc2a"]),
)
def test_marks(donor: Vector, given: dict[int, tuple[str, int]], signature: str, stored: str) -> None:
    text = given_places(donor, {receiver_at(donor, place): entry for place, entry in given.items()})
    mark = InferenceMark("geometrygeome", stored, signature, text)

    assert parse_mark("infer", mark.text) == mark
    for place, (digest, count) in given.items():
        assert (mark.digest(place), mark.count(place)) == (digest, count)
        assert slot(donor, receiver_at(donor, place)) == place


MARK = f"{'g' * 13}%{'w' * 13}%{'s' * 13}%{'d' * 13}.3_______"
"""Mark of a block that has donated to itself only."""


@pytest.mark.parametrize(
    "text",
    [
        "",
        MARK[1:],
        MARK[:-1],
        MARK + "_",
        MARK + " (1)",
        MARK + f"%{'d' * 13}",
        MARK.upper(),
        MARK.replace("s" * 13, ""),
        MARK.replace("w" * 13, ""),
        MARK.replace(".3", ""),
        MARK.replace("3", "three"),
    ],
)
def test_names_that_are_no_marks(text: str) -> None:
    assert parse_mark("infer", MARK) is not None
    assert parse_mark("infer", text) is None


def test_a_growing_volume_keeps_its_finished_blocks(tmp_path: Path) -> None:
    path = write_volume(tmp_path, roi=[[0, 0, 0], [16, 48, 40]])
    assert main(["run", str(path)]) == 0

    grown = due(load_spec(path, ["roi=[[0, 0, 0], [20, 48, 40]]"]))

    upper = tuple(index for index in ALL if index[0] == 1)
    assert grown.blend == upper
    assert grown.up_to_date == ()
    assert set(grown.infer) == set(ALL), "the lower blocks donate again, as their donations were cleaned up"


@pytest.mark.parametrize("stage", STAGES)
def test_a_receipt_from_before_a_volume_grew_that_comes_late(tmp_path: Path, stage: Stage) -> None:
    """Beside that of what the block is now it decides nothing."""
    path = write_volume(tmp_path, roi=[[0, 0, 0], [16, 48, 40]])
    assert main(["run", str(path)]) == 0
    before = Exchange(load_spec(path)).receipt(stage, (1, 1, 1))
    assert before is not None
    grown = load_spec(path, ["roi=[[0, 0, 0], [20, 48, 40]]"])
    assert main(["run", str(path), "--set", "roi=[[0, 0, 0], [20, 48, 40]]"]) == 0

    Exchange(grown).put_receipt(before)

    assert due(grown) == Plan((), (), tuple(ALL))
    assert Exchange(grown).receipt(stage, (1, 1, 1)) is not None


def test_an_input_that_has_grown_is_read_where_it_was_padded(tmp_path: Path) -> None:
    """Patches of the upper blocks reach past section 18, and were filled by reflection there."""
    path = write_volume(tmp_path, roi=[[0, 0, 0], [18, 48, 40]])
    write_layer(tmp_path / "input", (18, 48, 40))
    assert main(["run", str(path)]) == 0
    write_layer(tmp_path / "input", (28, 48, 40))

    grown = due(load_spec(path))

    assert grown.blend == tuple(index for index in ALL if index[0] == 1)
    assert main(["run", str(path), "--seams", "20"]) == 0


@examples(200)
@given(st.data())
def test_a_schedule_respects_all_dependencies(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    roi = Box((0, 0, 0), tuple(4 * n + 1 for n in shape))
    overlap = data.draw(st.tuples(*[st.integers(0, 1)] * 3))
    patch = tuple(4 + o for o in overlap)
    grid = BlockGrid(roi, patch, overlap, (4, 4, 4), (2, 2, 2))
    blocks = list(grid.indices())
    todo = Plan(tuple(blocks), tuple(b for b in blocks if grid.donors(b)), ())
    tasks, count = DueTasks(grid, todo), 0
    running: list[Task] = []
    inferred: set[Vector] = set()
    while True:
        while len(running) < data.draw(st.integers(1, 3)) and (task := tasks.next()):
            assert task[0] == "infer" or inferred.issuperset(grid.donors(task[1]))
            running.append(task)
        if not running:
            break
        stage, index = running.pop(data.draw(st.integers(0, len(running) - 1)))
        inferred |= {index} if stage == "infer" else set()
        tasks.done((stage, index))
        count += 1
    assert count == len(todo.infer) + len(todo.blend)
