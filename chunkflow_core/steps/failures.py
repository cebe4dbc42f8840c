"""Blocks that have failed, what that leaves undone, and how it is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from chunkflow_core.errors import ChunkflowError, StorageError
from chunkflow_core.exchange.marks import Stage
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Vector

_IN_WORDS = {"infer": "inference", "blend": "blending"}
_MOST = 50
_FEW = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """A task of a block that ended badly."""

    stage: Stage
    block: Vector
    reason: str
    """Kind of the failure in words, and the error's own text."""


class BlocksFailedError(ChunkflowError):
    """Some blocks have failed. All that does not depend on them is done."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Take the message, and the exit code of the most telling failure."""
        super().__init__(message)
        self.exit_code = exit_code


def is_final(code: int, *, inputs_may_come: bool) -> bool:
    """Whether a retry can't help after an exit code.

    Args:
        code: Exit code of a command.
        inputs_may_come: Whether a missing input can appear by itself: a donation can, a layer or a
            model can't.
    """
    return code in (64, 65, 78) or (code == 66 and not inputs_may_come)


def most_telling(codes: Sequence[tuple[Stage, int]]) -> int:
    """The exit code that stands for those of several failures: at least one, each with its stage.

    If none is final, the whole is worth a retry, which 75 says.
    """
    final = [code for stage, code in codes if is_final(code, inputs_may_come=stage == "blend")]
    found = [code for _, code in codes]
    return final[0] if final else StorageError.exit_code if StorageError.exit_code in found else found[0]


def lines(grid: BlockGrid, failures: Sequence[Failure], waiting: Collection[tuple[str, Vector]]) -> list[str]:
    """What has failed and what that leaves undone: a line for all, then one for each failure.

    Args:
        grid: The volume's blocks.
        failures: What has failed; at least one.
        waiting: Stage and block of the tasks that can't run because of them.
    """
    tasks = {(failure.stage, failure.block) for failure in failures} | set(waiting)
    failed = {failure.block for failure in failures}
    more = len({block for _, block in tasks} - failed)
    head = f"{_counted(len(failed), 'block')} failed"
    if more:
        head += f", {more} more {'waits' if more == 1 else 'wait'} for {'it' if len(failed) == 1 else 'them'}"
    told = [f"{head}: {_gap(grid, tasks)}"]
    told += [_line(grid, failure, waiting) for failure in failures[:_MOST]]
    return told + ([f"and {len(failures) - _MOST} more"] if len(failures) > _MOST else [])


def _line(grid: BlockGrid, failure: Failure, waiting: Collection[tuple[str, Vector]]) -> str:
    reason = " ".join(failure.reason.split())
    line = f"{_IN_WORDS[failure.stage]} of block {failure.block}, {grid.block(failure.block).box}: {reason}"
    receivers = grid.receivers(failure.block) if failure.stage == "infer" else []
    held = [block for block in receivers if block != failure.block and ("blend", block) in waiting]
    if not held:
        return line
    some = ", ".join(map(str, held[:_FEW])) + (f" and {len(held) - _FEW} more" if len(held) > _FEW else "")
    return f"{line.rstrip('.')}. Waiting for it: {some}"


def _gap(grid: BlockGrid, tasks: Iterable[tuple[str, Vector]]) -> str:
    """How much of the output some tasks would have written; no voxel is written by two of them."""
    missing = 0
    for stage, index in tasks:
        block = grid.block(index)
        missing += block.core.voxels if stage == "infer" else sum(box.voxels for box in block.frame)
    share = 100 * missing / grid.roi.voxels
    if 0 < share < 0.1:
        percent = "less than 0.1"
    elif 99.9 < share < 100:
        percent = "more than 99.9"
    else:
        percent = f"{share:.1f}".removesuffix(".0")
    return (
        f"{_counted(missing, 'voxel')} of the output ({percent} % of the ROI) {'is' if missing == 1 else 'are'} "
        "not complete"
    )


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
