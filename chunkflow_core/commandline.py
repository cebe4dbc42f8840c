"""What all commands share: arguments, logging, and how errors end a process."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from chunkflow_core.errors import ChunkflowError, UsageError
from chunkflow_core.lattice.blocks import BlockGrid
from chunkflow_core.lattice.boxes import Box, Vector, vector
from chunkflow_core.machine import share_one_heap
from chunkflow_core.spec import VolumeSpec, load_spec

EXIT_CODES = """exit codes: 0 done or up to date, 64 wrong usage, 65 data that can't be right, 66 an input is missing,
75 storage or network trouble (worth a retry), 78 wrong spec or credentials, 1 anything unforeseen"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends with EX_USAGE (64)."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Say what was wrong with the arguments, and how to get help."""
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\nSee {self.prog} -h\n")


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """SPEC and --set."""
    parser.add_argument("spec", metavar="SPEC", help="volume spec, a YAML file such as dags/volumes/NAME.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the spec, such as --set model.threads=4; can be given several times",
    )


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """--bbox, --force and --check-input."""
    add_box_argument(parser)
    parser.add_argument("--force", action="store_true", help="infer again although there are receipts")
    parser.add_argument(
        "--check-input",
        action="store_true",
        help="infer again where the voxels of the input (or mask) have changed: asks storage for the dates or checksums of its "
        "storage chunks, and reads them where that can't tell. Without it, only receipts are looked at",
    )


def add_box_argument(parser: argparse.ArgumentParser) -> None:
    """--bbox."""
    parser.add_argument(
        "--bbox",
        type=int,
        nargs=6,
        metavar=("Z0", "Y0", "X0", "Z1", "Y1", "X1"),
        help="only the blocks that touch this box of voxels (start, stop); default: the whole ROI",
    )


def spec_of(arguments: argparse.Namespace) -> VolumeSpec:
    """The spec that the arguments name."""
    return load_spec(arguments.spec, arguments.set)


def box_of(arguments: argparse.Namespace, grid: BlockGrid) -> Box | None:
    """The requested box; ``UsageError`` if it is empty or outside the ROI."""
    if arguments.bbox is None:
        return None
    box = Box(vector(arguments.bbox[:3]), vector(arguments.bbox[3:]))
    if not box & grid.roi:
        raise UsageError(
            f"--bbox: {box} holds no voxel of the ROI ({grid.roi}); give start and stop as Z0 Y0 X0 Z1 Y1 X1"
        )
    return box


def block_of(arguments: argparse.Namespace, grid: BlockGrid) -> Vector:
    """The requested block index; ``UsageError`` if there is no such block."""
    index = vector(arguments.block)
    if index not in grid:
        last = vector(n - 1 for n in grid.shape)
        raise UsageError(f"--block: there is no block {index}; the volume has (0, 0, 0) to {last}")
    return index


def set_up_logging(*, verbose: bool) -> None:
    """Log to standard error, one line a step."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


def run_command(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code. A user's mistake is told in a line, never with a traceback."""
    share_one_heap()
    gc.set_threshold(50_000)  # imports make hundreds of thousands of objects that stay
    try:
        command(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except ChunkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what is complete is kept, run again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads the output (head, less) has gone; Python would complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        return 1
    return 0
