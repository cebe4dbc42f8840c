"""Failed blocks are told: what failed, what waits, how much of the output that leaves open."""

from __future__ import annotations

import re
from collections.abc import Callable
from subprocess import CompletedProcess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkflow_core.exchange.marks import Stage
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box
from chunkflow_core.steps.failures import Failure, is_final, lines, most_telling
from tests.support.random_examples import examples

GRID = BlockGrid(Box((0, 0, 0), (20, 48, 40)), (8, 16, 16), (2, 4, 4), (12, 24, 24), (6, 12, 12))
"""2 × 2 × 2 blocks; storage chunks at a margin end 6, 12, 12 voxels after a block's start."""


def test_a_failed_inference_and_what_waits_for_it() -> None:
    failure = Failure("infer", (0, 0, 1), "data that can't be right: the model\n  gave NaN.")
    waiting = {("blend", b) for b in [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)]}

    # Its core is 12 × 24 × 4. Its own frame is 12 × 24 × 12. The frames of the others are their
    # boxes without their cores: 12 × 24 × 16 − 12 × 12 × 4, 8 × 24 × 16 − 2 × 24 × 4,
    # 8 × 24 × 16 − 2 × 12 × 4. In all 14,496 of 38,400.
    assert lines(GRID, [failure], waiting) == [
        "1 block failed, 3 more wait for it: 14,496 voxels of the output (37.8 % of the ROI) are not complete",
        "inference of block (0, 0, 1), z 0–12 y 0–24 x 24–40: data that can't be right: the model gave NaN. "
        "Waiting for it: (0, 1, 1), (1, 0, 1), (1, 1, 1)",
    ]


def test_only_some_of_many_waiting_blocks_are_named_but_all_count() -> None:
    others = [b for b in GRID.indices() if b != (0, 0, 0)]

    head, line = lines(GRID, [Failure("infer", (0, 0, 0), "killed")], {("blend", b) for b in others})

    assert head.startswith("1 block failed, 7 more wait for it: ")
    assert line.endswith(": killed. Waiting for it: (0, 0, 1), (0, 1, 0), (0, 1, 1) and 4 more")


def test_a_failed_blend_holds_nobody() -> None:
    """12 × 24 × 12 voxels."""
    assert lines(GRID, [Failure("blend", (0, 0, 1), "an input is missing: a donation.")], ()) == [
        "1 block failed: 3,456 voxels of the output (9 % of the ROI) are not complete",
        "blending of block (0, 0, 1), z 0–12 y 0–24 x 24–40: an input is missing: a donation.",
    ]


def test_a_single_block_is_all_there_is() -> None:
    grid = BlockGrid(Box((5, 0, 0), (17, 24, 24)), (8, 16, 16), (2, 4, 4), (12, 24, 24), (6, 12, 12))

    head, line = lines(grid, [Failure("infer", (0, 0, 0), "killed")], ())

    assert head == "1 block failed: 6,912 voxels of the output (100 % of the ROI) are not complete"
    assert line == "inference of block (0, 0, 0), z 5–17 y 0–24 x 0–24: killed"


def test_a_waiting_block_that_has_failed_too_is_not_counted_twice() -> None:
    failures = [Failure("infer", (0, 0, 0), "killed"), Failure("infer", (0, 0, 1), "killed")]
    waiting = [("blend", (0, 0, 1)), ("blend", (0, 1, 0))]

    head, first, second = lines(GRID, failures, waiting)

    assert head.startswith("2 blocks failed, 1 more waits for them: ")
    assert first.endswith("Waiting for it: (0, 0, 1), (0, 1, 0)")
    assert second.endswith(": killed"), "that its own blending waits goes without saying"


@pytest.mark.parametrize(("count", "more"), [(50, []), (51, ["and 1 more"]), (90, ["and 40 more"])])
def test_no_more_than_fifty_failures_in_full(count: int, more: list[str]) -> None:
    grid = BlockGrid(Box((0, 0, 0), (4, 4, 400)), (4, 4, 4), (0, 0, 0), (4, 4, 4), (4, 4, 4))
    failures = [Failure("infer", (0, 0, x), f"reason {x}") for x in range(count)]

    head, *told = lines(grid, failures, ())

    assert head.startswith(f"{count} blocks failed: {count * 64:,} voxels of the output ({count} % of the ROI)")
    assert told[50:] == more
    assert [line.rpartition(": ")[2] for line in told[:50]] == [f"reason {x}" for x in range(50)]


@pytest.mark.parametrize(
    ("length", "failed", "percent"),
    [
        (4000, 1, "0.1"),
        (4400, 1, "less than 0.1"),
        (4400, 1099, "more than 99.9"),
        (4400, 1100, "100"),
        (4400, 550, "50"),
    ],
)
def test_a_share_is_never_rounded_to_none_or_all(length: int, failed: int, percent: str) -> None:
    grid = BlockGrid(Box((0, 0, 0), (4, 4, length)), (4, 4, 4), (0, 0, 0), (4, 4, 4), (4, 4, 4))

    head = lines(grid, [Failure("infer", (0, 0, x), "killed") for x in range(failed)], ())[0]

    assert f"({percent} % of the ROI)" in head


@examples(200)
@given(st.data())
def test_the_gap_is_what_the_tasks_would_have_written(data: st.DataObject) -> None:
    lengths = data.draw(st.tuples(*[st.integers(5, 17)] * 3))
    overlap = data.draw(st.tuples(*[st.integers(0, 3)] * 3))
    patch = tuple(4 + o for o in overlap)
    chunk = data.draw(st.tuples(*[st.sampled_from([1, 2, 4])] * 3))
    grid = BlockGrid(Box((3, 0, 7), (3 + lengths[0], lengths[1], 7 + lengths[2])), patch, overlap, (4, 4, 4), chunk)
    blocks = list(grid.indices())
    failed = data.draw(st.lists(st.sampled_from(blocks), unique=True, min_size=1))
    waiting = [("blend", block) for block in data.draw(st.lists(st.sampled_from(blocks), unique=True))]

    head = lines(grid, [Failure("infer", block, "killed") for block in failed], waiting)[0]

    written = np.zeros(grid.roi.shape, bool)
    for box in [grid.block(b).core for b in failed] + [box for _, b in waiting for box in grid.block(b).frame]:
        written[box.slices(grid.roi.start)] = True
    match = re.search(r"([\d,]+) voxels? of the output", head)
    assert match and int(match[1].replace(",", "")) == written.sum()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([("infer", 75)], 75),
        ([("infer", 1), ("infer", 75)], 75),
        ([("infer", 75), ("infer", 65), ("infer", 78)], 65),
        ([("infer", 1), ("infer", 1)], 1),
        ([("blend", 66), ("infer", 75)], 75),
        ([("infer", 75), ("infer", 66)], 66),
        ([("blend", 66), ("infer", 1)], 66),
    ],
)
def test_the_most_telling_exit_code(codes: list[tuple[Stage, int]], expected: int) -> None:
    """Donations come again, layers and models do not."""
    assert most_telling(codes) == expected


def test_which_ends_are_final() -> None:
    assert [code for code in range(256) if is_final(code, inputs_may_come=True)] == [64, 65, 78]
    assert [code for code in range(256) if is_final(code, inputs_may_come=False)] == [64, 65, 66, 78]


def test_nothing_heavy_is_imported(python: Callable[..., CompletedProcess[str]]) -> None:
    """What draws up a DAG imports this module, too."""
    heavy = {"numpy", "torch", "cloudvolume", "cloudfiles", "pydantic"}
    outcome = python("-c", f"import chunkflow_core.steps.failures, sys; print(sorted({heavy} & set(sys.modules)))")
    assert outcome.stdout.strip() == "[]", outcome.stderr
