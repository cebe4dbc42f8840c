"""The commands that do one stage of one block. Each is a process, or a pod, of its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from chunkflow_core.commands.arguments import (
    EXIT_CODES,
    Parser,
    add_spec_arguments,
    block_of,
    run_command,
    set_up_logging,
    spec_of,
)
from chunkflow_core.commands.runs import add_run_arguments
from chunkflow_core.planning.reasons import REASONS, Reason
from chunkflow_core.progress import progress

if TYPE_CHECKING:
    from chunkflow_core.exchange.leases import Lease
    from chunkflow_core.spec import VolumeSpec


def infer(arguments: Sequence[str] | None = None) -> int:
    """Run the first stage of a block; returns the exit code."""
    return run_command(_infer, arguments)


def blend(arguments: Sequence[str] | None = None) -> int:
    """Run the second stage of a block; returns the exit code."""
    return run_command(_blend, arguments)


def _infer(arguments: Sequence[str]) -> None:
    parser = _parser(
        "inference_and_donate",
        "First stage of one block: run its patches, write what is final, donate what others need.",
    )
    parser.add_argument(
        "--check-input", action="store_true", help="do it again if the input is not what the receipt says was read"
    )
    options = parser.parse_args(arguments)
    spec = spec_of(options)
    index = block_of(options, spec.grid)
    set_up_logging(verbose=True)
    from chunkflow_core.steps.infer import inference_and_donate  # torch only once the arguments are right
    from chunkflow_core.steps.workspace import Workspace

    block, why = spec.grid.block(index), _reason(options, check_input=options.check_input)
    workspace = Workspace(spec)
    bar = progress(f"block {block.name}", block.patches, "patches")
    with _lease(spec, options) as workspace.lease, bar as patch_done:
        result = inference_and_donate(workspace, index, run=options.run, why=why, patch_done=patch_done)
    if result.up_to_date:
        print(f"block {block.name}: inference is up to date")
    elif result.receipt is not None:
        facts = result.receipt.facts
        print(
            f"block {block.name}: {result.receipt.patches} patches inferred, {result.receipt.storage_chunks} storage "
            f"chunks written, {len(result.receipt.donations)} donations, {facts['wall']:.1f} s {facts['seconds']}"
        )


def _blend(arguments: Sequence[str]) -> None:
    parser = _parser(
        "receive_and_blend",
        "Second stage of one block: fetch what its neighbours donated, add it up, write the rest of the block.",
    )
    options = parser.parse_args(arguments)
    spec = spec_of(options)
    index = block_of(options, spec.grid)
    set_up_logging(verbose=True)
    from chunkflow_core.steps.blend import receive_and_blend  # heavy imports only once the arguments are right
    from chunkflow_core.steps.workspace import Workspace

    name, workspace = spec.grid.block(index).name, Workspace(spec)
    with _lease(spec, options) as workspace.lease:
        result = receive_and_blend(workspace, index, run=options.run, why=_reason(options))
    if result.receipt is None:
        print(f"block {name}: has no lower neighbour, nothing to receive")
    elif result.up_to_date:
        print(f"block {name}: blending is up to date")
    else:
        facts = result.receipt.facts
        print(
            f"block {name}: donations of {len(result.receipt.consumed)} blocks blended, "
            f"{result.receipt.storage_chunks} storage chunks written, {facts['wall']:.1f} s {facts['seconds']}"
        )


@contextmanager
def _lease(spec: VolumeSpec, options: argparse.Namespace) -> Iterator[Lease | None]:
    """The lease of the run that is named; without a name it is only looked whether a run has it.

    A run that has not begun, or has ended, begins and ends with the stage.

    Raises:
        BusyError: Another run has it.
    """
    from chunkflow_core.exchange.leases import Lease, held, refuse_beside_others

    if options.run:
        with held(Lease(spec, options.run, scheduler=options.scheduler), only_own=True) as lease:
            yield lease
    else:
        refuse_beside_others(spec)
        yield None


def _parser(module: str, text: str) -> Parser:
    """A parser with the arguments that both stages have."""
    parser = Parser(prog=f"python -m chunkflow_core.{module}", description=text, epilog=EXIT_CODES)
    add_spec_arguments(parser)
    parser.add_argument(
        "--block",
        type=int,
        nargs=3,
        required=True,
        metavar=("Z", "Y", "X"),
        help="index of the block, counted in blocks",
    )
    parser.add_argument("--force", action="store_true", help="do it again although there is a receipt")
    parser.add_argument(
        "--reason",
        choices=REASONS,
        help="for programs: why the block is due, as `chunkflow-core plan --json` says; default: its receipts decide",
    )
    add_run_arguments(
        parser,
        "name of the run; what is to be done again is done once a run, and no other run may be at work (default: none, "
        "which lets several be at work)",
    )
    return parser


def _reason(options: argparse.Namespace, *, check_input: bool = False) -> Reason | None:
    if options.force:
        return "forced"
    reason: Reason | None = "input" if check_input else options.reason
    return reason
