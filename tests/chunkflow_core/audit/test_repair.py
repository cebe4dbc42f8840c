"""What is wrong is undone and made right again, and nothing else is touched."""

from __future__ import annotations

import json
import logging
import re

import pytest

from chunkflow_core.__main__ import main
from chunkflow_core.audit.audit import repair, verify
from chunkflow_core.planning.planner import Plan, Request, plan
from chunkflow_core.steps.local import run_here
from chunkflow_core.steps.workspace import Workspace
from tests.support.harms import (
    FRAME,
    HARMS,
    LAST,
    Harm,
    Volume,
    core_chunk_lost,
    core_voxel_flipped,
    donation_cut_off,
    frame_chunk_lost,
    receipt_cut_off,
    receipts_that_disagree,
    stray_chunks,
)


def mend(volume: Volume, *, seams: int = 0) -> Plan:
    workspace = Workspace(volume.spec)
    due = plan(volume.spec, Request(blocks=repair(workspace, seams=seams, seed=0)), workspace.state())
    for _ in run_here(workspace, due, "mend", lambda: None):
        pass
    return due


@pytest.mark.parametrize("harm", HARMS, ids=str)
def test_a_harm_is_mended(volume: Volume, harm: Harm, caplog: pytest.LogCaptureFixture) -> None:
    allowed = volume.chunks_of(*harm.rewritten)
    harm.do(volume)
    before = volume.written()
    caplog.set_level(logging.INFO, "chunkflow_core.audit.audit")

    due = mend(volume, seams=harm.seams)

    assert volume.contents() == volume.healthy
    rewritten = {name for name, time in volume.written().items() if before.get(name) != time}
    assert rewritten == allowed
    assert set(due.infer) == {block for stage, block in harm.rewritten if stage == "infer"}
    assert harm.told in caplog.text or harm.kinds == {"donation", "incomplete"}, "a line for each thing undone"
    assert verify(Workspace(volume.spec), seams=harm.seams, deep=True).findings == []
    assert mend(volume, seams=harm.seams) == Plan((), (), ())


def test_where_donations_were_cleaned_up_just_the_donors_give_again(volume: Volume) -> None:
    """The storage chunk is in the frame of the second block, which gets from two."""
    assert main(["cleanup", str(volume.path)]) == 0
    pair = ((0, 0, 0), (0, 0, 1))
    allowed = volume.chunks_of(("infer", pair[0]), ("infer", pair[1]), ("blend", pair[1]))
    volume.chunk("24-32_0-8_0-4").unlink()
    before = volume.written()

    due = mend(volume)

    assert (due.infer, due.blend) == (pair, pair[1:])
    assert volume.contents() == volume.healthy
    assert {name for name, time in volume.written().items() if before.get(name) != time} == allowed


def test_a_truncated_donation_that_is_still_needed_is_made_again(volume: Volume) -> None:
    """The donation's receiver has not been blended, and could not be."""
    donation_cut_off(volume)
    whole = volume.donation_file((0, 0, 1), LAST).read_bytes()
    volume.receipt_file("blend", LAST).unlink()

    due = mend(volume)

    assert (due.infer, due.blend) == (((0, 1, 1),), (LAST,))
    assert volume.contents() == volume.healthy
    assert volume.donation_file((0, 0, 1), LAST).read_bytes() == whole


def test_a_part_is_repaired_alone(volume: Volume) -> None:
    core_chunk_lost(volume)
    volume.chunk("0-8_0-8_0-4").unlink()
    first = volume.spec.grid.block((0, 0, 0)).box

    assert repair(Workspace(volume.spec), box=first) == {(0, 0, 0)}

    assert not list(volume.exchange.glob("receipts/infer/0_0_0/0-24_0-24_0-12%*"))
    assert volume.receipt_file("infer", LAST).exists(), "though a storage chunk of it is missing, too"


class Interruption(logging.Handler):
    """Ends what is going on after some lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.left = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 5, 8])
def test_a_repair_that_was_interrupted(volume: Volume, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    """What a repair has undone is due for the next run, whether that repairs or not.

    A second repair does all that is left.
    """
    for harm in (core_voxel_flipped, frame_chunk_lost, donation_cut_off, stray_chunks, receipts_that_disagree):
        harm(volume)
    logger, interruption = logging.getLogger("chunkflow_core.audit.audit"), Interruption(lines)
    caplog.set_level(logging.INFO, "chunkflow_core.audit.audit")
    logger.addHandler(interruption)
    try:
        with pytest.raises(KeyboardInterrupt):
            repair(Workspace(volume.spec))
    finally:
        logger.removeHandler(interruption)
    workspace = Workspace(volume.spec)
    undone = {finding.block for finding in verify(workspace, seams=0).findings if finding.kind == "incomplete"}
    assert undone <= set(plan(volume.spec, Request(), workspace.state()).blend) | {None}

    mend(volume)

    assert volume.contents() == volume.healthy
    assert verify(Workspace(volume.spec), seams=4, deep=True).findings == []


def test_the_commands(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(volume.path)
    frame_chunk_lost(volume)
    receipt_cut_off(volume)
    assert main(["repair", path, "--json", "--set", "exchange.donations=keep"]) == 0
    due = json.loads(capsys.readouterr().out)
    assert (due["infer"], due["blend"], due["up_to_date"]) == ([], [list(LAST)], [])

    core_voxel_flipped(volume)
    assert main(["run", path, "--repair", "--set", "exchange.donations=keep"]) == 0

    assert re.search(
        r"verified: 1 blocks, 12 storage chunks, 2 windows computed again \(seed \d+\): 0 findings",
        capsys.readouterr().out,
    )
    assert volume.contents() == volume.healthy
    assert volume.chunk(FRAME).exists()


def test_a_repair_tried_again_knows_what_it_has_undone(volume: Volume) -> None:
    """Without receipt and without storage chunks, a stage looks as if it had never been begun."""
    output, frame = Workspace(volume.spec).output, volume.spec.grid.block(LAST).frame
    output.delete_chunks([chunk.key for box in frame for chunk in output.expected_chunks(box)])

    undone = repair(Workspace(volume.spec))

    assert undone == {LAST}
    assert repair(Workspace(volume.spec)) == undone
    mend(volume)
    assert volume.contents() == volume.healthy
    assert repair(Workspace(volume.spec)) == set()
