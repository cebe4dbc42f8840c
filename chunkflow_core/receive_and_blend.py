"""Second stage of one block: fetch what its neighbours donated, add it up, write the rest of the block.

python -m chunkflow_core.receive_and_blend SPEC --block Z Y X
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the package's own folder must not shadow other modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from chunkflow_core.commandline import EXIT_CODES, Parser, block_of, run_command, set_up_logging, spec_of
from chunkflow_core.inference_and_donate import add_stage_arguments


def command(arguments: Sequence[str]) -> None:
    """Parse the arguments and run the stage."""
    parser = Parser(prog="python -m chunkflow_core.receive_and_blend", description=__doc__, epilog=EXIT_CODES)
    add_stage_arguments(parser)
    options = parser.parse_args(arguments)
    spec = spec_of(options)
    index = block_of(options, spec.grid)
    set_up_logging(verbose=True)
    from chunkflow_core.steps.stages import (  # heavy imports only once the arguments are right
        Workspace,
        receive_and_blend,
    )

    name = spec.grid.block(index).name
    result = receive_and_blend(Workspace(spec), index, run=options.run, force=options.force)
    if result.receipt is None:
        print(f"block {name}: has no lower neighbour, nothing to receive")
    elif result.up_to_date:
        print(f"block {name}: blending is up to date")
    else:
        facts = result.receipt.facts
        print(
            f"block {name}: donations of {len(result.receipt.consumed)} blocks blended, {result.receipt.storage_chunks} "
            f"storage chunks written, {facts['wall']:.1f} s {facts['seconds']}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
