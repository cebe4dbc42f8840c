"""Block-wise convnet inference of a volume, exact to the bit.

One volume is described by a YAML spec; see dags/volumes/ for examples.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from chunkflow_core import commands
from chunkflow_core.commandline import (
    EXIT_CODES,
    Parser,
    add_box_argument,
    add_request_arguments,
    add_spec_arguments,
    run_command,
    set_up_logging,
)
from chunkflow_core.spec.sections import check_storage_path


def command(arguments: Sequence[str]) -> None:
    """Parse the arguments and run the subcommand."""
    options = parser().parse_args(arguments)
    set_up_logging(verbose=options.verbose)
    options.function(options)


@cache
def parser() -> Parser:
    """The command line."""
    top = Parser(prog="chunkflow-core", description=__doc__, epilog=EXIT_CODES)
    top.add_argument("-v", "--verbose", action="store_true", help="log every step")
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, function: object, text: str) -> Parser:
        sub: Parser = subparsers.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        sub.set_defaults(function=function)
        return sub

    sub = add("run", commands.run, "Run all that is due on this machine, without Airflow, and verify it.")
    add_spec_arguments(sub)
    add_request_arguments(sub)
    sub.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes (default: 1)")
    _add_seams(sub)
    _add_other_model(sub)
    sub.add_argument(
        "--repair",
        action="store_true",
        help="audit everything that is stored, and do again just what is wrong, instead of what is due",
    )
    sub = add("plan", commands.plan, "Print what would run, and what it costs; runs nothing.")
    add_spec_arguments(sub)
    add_request_arguments(sub)
    _add_plan_output(sub)
    sub = add(
        "repair", commands.repair, "Audit everything that is stored, undo what is wrong, print what has to run then."
    )
    add_spec_arguments(sub)
    add_box_argument(sub)
    _add_seams(sub, default=0)
    _add_plan_output(sub)
    sub = add("prepare", commands.prepare, "Check input, model, exchange and output, and make the output layer.")
    add_spec_arguments(sub)
    _add_other_model(sub)
    sub.add_argument("--once", action="store_true", help="try the model only if that has not been done yet")
    sub.add_argument("--run", default="", metavar="NAME", help="name of the run, for the layer's provenance")
    sub.add_argument(
        "--json", action="store_true", help="for programs: ROI and bounds of the input as [start, stop], zyx"
    )
    sub = add("verify", commands.verify, "Audit the output: storage chunks, receipts, and seams computed again.")
    add_spec_arguments(sub)
    add_box_argument(sub)
    _add_seams(sub)
    sub.add_argument("--begun", action="store_true", help="pass over blocks that were never begun")
    sub.add_argument("--deep", action="store_true", help="read all storage chunks and donations, and compare checksums")
    sub.add_argument("--run", default="", metavar="NAME", help="prefer seams of what this run has done")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub = add("cleanup", commands.cleanup, "Delete the donations that nothing needs any more.")
    add_spec_arguments(sub)
    sub = add("report", commands.report, "Summarise what is done: blocks, patches, speed, where the time went.")
    add_spec_arguments(sub)
    sub.add_argument("--run", metavar="NAME", help="only what this run has done")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.add_argument("--picture", type=_png, metavar="FILE.png", help="draw it too: shares of time, tasks, timeline")
    sub.add_argument(
        "--publish",
        action="store_true",
        help="complete the manifest of the run beside the output, draw the picture there, and print everything as JSON",
    )
    sub = add("picture", commands.picture, "Draw a section of input, output and blocks as PNG.")
    add_spec_arguments(sub)
    sub.add_argument("file", metavar="FILE.png")
    sub.add_argument("--z", type=int, help="section (default: the middle)")
    sub = add(
        "compile", commands.compile, "Convert the model for its engine, and time every engine that can run it here."
    )
    add_spec_arguments(sub)
    _add_compile(sub)
    sub = add(
        "ingest", commands.ingest, "Store a TIFF stack, folder of images, HDF5 dataset or npy as a precomputed layer."
    )
    _add_ingest(sub)
    for point in entry_points(group="chunkflow_core.commands"):
        point.load()(add)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(command, arguments)


def _add_seams(sub: argparse.ArgumentParser, default: int = 2) -> None:
    sub.add_argument(
        "--seams",
        type=_not_negative,
        default=default,
        metavar="N",
        help=f"seams between blocks to compute again (default: {default})",
    )


def _add_plan_output(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="for programs: block indices as [z, y, x]")
    sub.add_argument(
        "--run", default="", metavar="NAME", help="begin the manifest of this run beside the output, if anything is due"
    )


def _add_other_model(sub: argparse.ArgumentParser) -> None:
    ways = sub.add_mutually_exclusive_group()
    ways.add_argument(
        "--overwrite",
        action="store_true",
        help="if the output is of another model: do the whole ROI again, in its place",
    )
    ways.add_argument(
        "--accept-mixture",
        action="store_true",
        help="if the output is of another model: let blocks of both stand side by side, noted in the layer's provenance",
    )


def _add_compile(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-5,
        metavar="D",
        help="largest difference to the reference, PyTorch in float32, that an output value may have (default: 1e-5)",
    )
    sub.add_argument(
        "--patches", type=_positive, default=4, metavar="N", help="patches of the input layer to run (default: 4)"
    )
    sub.add_argument(
        "--engines",
        type=_engines,
        default="pytorch,openvino,onnx",
        metavar="NAMES",
        help="engines to try, of pytorch,openvino,onnx (default: all that take the model)",
    )


def _add_ingest(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SOURCE", help="stack.tif, folder of images, file.h5:dataset, or stack.npy; zyx")
    sub.add_argument("layer", type=_layer, metavar="LAYER", help='layer to make, such as "file:///data/em"')
    sub.add_argument(
        "--voxel-size", type=_voxel_size, nargs=3, required=True, metavar=("Z", "Y", "X"), help="in nm, such as 40 4 4"
    )
    sub.add_argument(
        "--chunk-size",
        type=_positive,
        nargs=3,
        default=[16, 128, 128],
        metavar=("Z", "Y", "X"),
        help="default: 16 128 128",
    )
    sub.add_argument(
        "--offset", type=int, nargs=3, default=[0, 0, 0], metavar=("Z", "Y", "X"), help="of the first voxel"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace a layer that is there")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 0")
    return value


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 0")
    return value


def _engines(text: str) -> list[str]:
    names, known = text.split(","), ("pytorch", "openvino", "onnx")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{text}: expected some of {','.join(known)}")
    return names


def _voxel_size(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected nanometres, more than 0")
    return int(value) if value.is_integer() else value


def _layer(text: str) -> str:
    try:
        check_storage_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return text


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .png")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
