"""What is due, on a real exchange: first run, after a crash at any point, for a part, forced, after cleaning up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volume import files_below, write_layer, write_volume

from chunkflow_core.__main__ import main
from chunkflow_core.exchange import Exchange
from chunkflow_core.geometry import Box, Vector
from chunkflow_core.lattice import BlockGrid
from chunkflow_core.local import Schedule
from chunkflow_core.planner import Plan, Request, State, plan
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.stages import Workspace, inference_and_donate, receive_and_blend

ALL = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    spec = write_volume(tmp_path)
    assert main(["prepare", str(spec)]) == 0
    return spec


def due(spec: VolumeSpec, box: Box | None = None, *, force: bool = False) -> Plan:
    return plan(spec, Request(box, force), State.read(Exchange(spec)))


def inside(grid: BlockGrid, index: Vector) -> Box:
    """One voxel in the middle of a block."""
    box = grid.block(index).box
    start = tuple((a + b) // 2 for a, b in zip(box.start, box.stop, strict=True))
    return Box(start, tuple(v + 1 for v in start))


def test_everything_then_nothing(path: Path) -> None:
    spec = load_spec(path)
    assert due(spec) == Plan(tuple(ALL), tuple(ALL[1:]), ())

    assert main(["run", str(path)]) == 0

    assert due(spec) == Plan((), (), tuple(ALL))


def test_what_is_left_after_stopping_anywhere(path: Path) -> None:
    spec = load_spec(path)
    workspace, first = Workspace(spec), due(spec)
    schedule, left = (
        Schedule(spec.grid, first),
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
    """Its receivers blend again, for which their other donors have to donate again; those write nothing new to others."""
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    assert Exchange(spec).donation_keys() == set()

    forced = due(spec, inside(spec.grid, (1, 1, 1)), force=True)

    assert forced.infer == tuple(ALL)
    assert forced.blend == ((1, 1, 1),)


def test_a_lost_blend_receipt_brings_back_its_donors(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    next(tmp_path.rglob(f"receipts/blend/{spec.grid.block((0, 0, 1)).box.key}.json")).unlink()

    assert due(spec) == Plan(((0, 0, 0), (0, 0, 1)), ((0, 0, 1),), tuple(b for b in ALL if b[:2] != (0, 0)))


def test_a_receipt_that_was_cut_off_counts_for_nothing(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    assert main(["run", str(path)]) == 0
    receipt = next(tmp_path.rglob(f"receipts/infer/{spec.grid.block((1, 1, 1)).box.key}.json"))
    receipt.write_text(receipt.read_text()[:-50])

    assert (1, 1, 1) in due(spec).infer


def test_a_growing_volume_keeps_its_finished_blocks(tmp_path: Path) -> None:
    path = write_volume(tmp_path, roi=[[0, 0, 0], [16, 48, 40]])
    assert main(["run", str(path)]) == 0

    grown = due(load_spec(path, ["roi=[[0, 0, 0], [20, 48, 40]]"]))

    upper = tuple(index for index in ALL if index[0] == 1)
    assert grown.blend == upper
    assert grown.up_to_date == ()
    assert set(grown.infer) == set(ALL), "the lower blocks donate again, as their donations were cleaned up"


def test_an_input_that_has_grown_is_read_where_it_was_padded(tmp_path: Path) -> None:
    """The patches of the upper blocks reach past section 18, and were filled by reflection there."""
    path = write_volume(tmp_path, roi=[[0, 0, 0], [18, 48, 40]])
    write_layer(tmp_path / "input", (18, 48, 40))
    assert main(["run", str(path)]) == 0
    write_layer(tmp_path / "input", (28, 48, 40))

    grown = due(load_spec(path))

    assert grown.blend == tuple(index for index in ALL if index[0] == 1)
    assert main(["run", str(path), "--seams", "20"]) == 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_schedule_respects_all_dependencies(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    roi = Box((0, 0, 0), tuple(4 * n + 1 for n in shape))
    overlap = data.draw(st.tuples(*[st.integers(0, 1)] * 3))
    patch = tuple(4 + o for o in overlap)
    grid = BlockGrid(roi, patch, overlap, (4, 4, 4), (2, 2, 2))
    blocks = list(grid.indices())
    todo = Plan(tuple(blocks), tuple(b for b in blocks if grid.donors(b)), ())
    schedule, running, inferred, count = Schedule(grid, todo), [], set(), 0
    while True:
        while len(running) < data.draw(st.integers(1, 3)) and (task := schedule.next()):
            assert task[0] == "infer" or inferred.issuperset(grid.donors(task[1]))
            running.append(task)
        if not running:
            break
        stage, index = running.pop(data.draw(st.integers(0, len(running) - 1)))
        inferred |= {index} if stage == "infer" else set()
        schedule.done((stage, index))
        count += 1
    assert count == len(todo.infer) + len(todo.blend)
