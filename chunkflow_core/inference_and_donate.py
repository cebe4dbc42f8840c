"""First stage of one block: run its patches, write what is final, donate what others need.

python -m chunkflow_core.inference_and_donate SPEC --block Z Y X
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package's own folder must not shadow other modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from chunkflow_core.commandline import (
    EXIT_CODES,
    Parser,
    add_spec_arguments,
    block_of,
    run_command,
    set_up_logging,
    spec_of,
)
from chunkflow_core.progress import progress


def add_stage_arguments(parser: Parser) -> None:
    """The arguments of both stages."""
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
        "--run",
        default="",
        metavar="NAME",
        help="name of the run; with --force, a receipt of the same run counts as done",
    )


def command(arguments: Sequence[str]) -> None:
    """Parse the arguments and run the stage."""
    parser = Parser(prog="python -m chunkflow_core.inference_and_donate", description=__doc__, epilog=EXIT_CODES)
    add_stage_arguments(parser)
    parser.add_argument(
        "--check-input", action="store_true", help="do it again if the input is not what the receipt says was read"
    )
    options = parser.parse_args(arguments)
    spec = spec_of(options)
    index = block_of(options, spec.grid)
    set_up_logging(verbose=True)
    from chunkflow_core.steps.stages import Workspace, inference_and_donate  # torch only once the arguments are right

    block = spec.grid.block(index)
    with progress(f"block {block.name}", block.patches, "patches") as patch_done:
        result = inference_and_donate(
            Workspace(spec),
            index,
            run=options.run,
            force=options.force,
            check_input=options.check_input,
            patch_done=patch_done,
        )
    if result.up_to_date:
        print(f"block {block.name}: inference is up to date")
    elif result.receipt is not None:
        facts = result.receipt.facts
        print(
            f"block {block.name}: {result.receipt.patches} patches inferred, {result.receipt.storage_chunks} storage "
            f"chunks written, {len(result.receipt.donations)} donations, {facts['wall']:.1f} s {facts['seconds']}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
