"""Block-wise convnet inference of a volume, exact to the bit.

One volume is described by a YAML spec; see dags/volumes/ for examples.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path

from tqdm import tqdm

from chunkflow_core.commandline import (
    EXIT_CODES,
    Parser,
    add_box_argument,
    add_request_arguments,
    add_spec_arguments,
    box_of,
    run_command,
    set_up_logging,
    spec_of,
)
from chunkflow_core.errors import DataError, UsageError
from chunkflow_core.progress import progress
from chunkflow_core.spec import check_storage_path

# torch and cloudvolume take seconds to import: each command imports what it needs once its arguments are right


def run(options: argparse.Namespace) -> None:
    """Prepare, run all that is due, verify, clean up."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    from chunkflow_core.local import run_here, run_in_processes
    from chunkflow_core.planner import Request, State, plan
    from chunkflow_core.prepare import cleanup, prepare
    from chunkflow_core.stages import Workspace

    workspace = Workspace(spec)
    prepare(workspace)
    due = plan(spec, Request(box, options.force), State.read(workspace.exchange))
    blocks = [spec.grid.block(index) for index in due.infer]
    print(f"{spec.name}: {len(due.infer)} blocks to infer, {len(due.blend)} to blend, {len(due.up_to_date)} up to date")
    name = f"run-{uuid.uuid4().hex[:12]}"
    with tqdm(total=sum(b.patches for b in blocks), unit="patch", desc="inference", disable=None) as bar:
        alone = options.workers == 1
        done = (
            run_here(workspace, due, name, bar.update) if alone else run_in_processes(spec, due, name, options.workers)
        )
        ended = {"infer": 0, "blend": 0}
        for (stage, index), receipt in done:
            ended[stage] += 1
            bar.set_postfix_str(
                f"{ended['infer']}/{len(due.infer)} inferred, {ended['blend']}/{len(due.blend)} blended"
            )
            if receipt is not None and not alone:
                bar.update(receipt.patches + sum(receipt.skipped.values()))
            logging.info("%s of block %s done", stage, index)
    options.json = False
    _verify(workspace, options)
    cleanup(spec)
    print(f"output: {spec.output.path}")


def plan_command(options: argparse.Namespace) -> None:
    """Print what would run."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    from chunkflow_core.estimate import estimate
    from chunkflow_core.exchange import Exchange
    from chunkflow_core.planner import Request, State, plan

    exchange = Exchange(spec)
    state = State.read(exchange)
    due = plan(spec, Request(box, options.force), state)
    costs = estimate(spec, due, state.inferred.values(), exchange.trial())
    if options.json:
        facts = {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "blocks": spec.grid.shape,
            "roi": asdict(spec.grid.roi),
        }
        print(json.dumps(facts | asdict(due) | asdict(costs)))
        return
    grid = spec.grid
    print(f"{spec.name} (fingerprint {spec.fingerprint})")
    print(f"ROI            {grid.roi}, {grid.roi.voxels / 1e6:.1f} Mvoxel; input layer {spec.input_scale.bounds}")
    print(
        f"blocks         {' × '.join(map(str, grid.shape))} of {_size(spec.block_size)}, storage chunks {_size(spec.storage_chunk)}"
    )
    print(f"to infer       {len(due.infer)} blocks, {costs.patches} patches{_some(due.infer)}")
    print(f"to blend       {len(due.blend)} blocks{_some(due.blend)}")
    print(f"up to date     {len(due.up_to_date)} blocks")
    print(f"donations      {costs.donated_bytes / 1e6:.1f} MB before compression")
    data = f"{costs.data_bytes / 1e6:.1f} MB of data per inference task"
    if costs.memory_bytes is None:
        print(f"memory         {data}, besides interpreter and network, which `prepare` measures")
    else:
        print(
            f"memory         {costs.memory_bytes / 1e6:.0f} MB per inference task: {data}, the rest interpreter and network"
        )
    known = "unknown before `prepare`" if costs.seconds is None else f"{costs.seconds:.0f} s on one process"
    print(f"time           {known}")


def prepare_command(options: argparse.Namespace) -> None:
    """Check everything that can be known beforehand and make the output layer."""
    spec = spec_of(options)
    from chunkflow_core.prepare import prepare
    from chunkflow_core.stages import Workspace

    trial = prepare(Workspace(spec))
    print(f"{spec.name}: ready; a patch takes {trial.seconds:.3f} s, {trial.streams} at a time")


def verify_command(options: argparse.Namespace) -> None:
    """Audit the output."""
    spec = spec_of(options)
    from chunkflow_core.stages import Workspace

    _verify(Workspace(spec), options)


def cleanup_command(options: argparse.Namespace) -> None:
    """Delete donations that nothing needs any more."""
    spec = spec_of(options)
    from chunkflow_core.prepare import cleanup

    print(f"{spec.name}: {cleanup(spec)} donations deleted (exchange.donations: {spec.exchange.donations})")


def report_command(options: argparse.Namespace) -> None:
    """Summarise what is done."""
    spec = spec_of(options)
    from chunkflow_core.exchange import Exchange
    from chunkflow_core.report import lines, of_run, read_tasks, report_of

    exchange = Exchange(spec)
    tasks = read_tasks(spec, exchange)
    report = report_of(spec, exchange.path, tasks, run=options.run)
    if options.picture:
        from chunkflow_core.report_picture import draw

        try:
            draw(report, of_run(tasks, options.run), options.picture)
        except OSError as error:
            raise UsageError(f"{options.picture}: can't be written: {error.strerror}") from error
    print(json.dumps(asdict(report)) if options.json else "\n".join(lines(report)))


def picture_command(options: argparse.Namespace) -> None:
    """Draw one section of input, output and blocks."""
    spec, file = spec_of(options), Path(options.file)
    low, high = spec.grid.roi.start[0], spec.grid.roi.stop[0]
    if options.z is not None and not low <= options.z < high:
        raise UsageError(f"--z: there is no section {options.z}; the ROI has {low} to {high - 1}")
    if file.suffix.lower() != ".png":
        raise UsageError(f"{file}: expected a name that ends in .png")
    from chunkflow_core.picture import draw
    from chunkflow_core.stages import Workspace

    try:
        draw(Workspace(spec), file, z=options.z)
    except OSError as error:
        raise UsageError(f"{file}: can't be written: {error.strerror}") from error
    print(file)


def compile_command(options: argparse.Namespace) -> None:
    """Convert the model, and time every engine that can run it."""
    spec = spec_of(options)
    from chunkflow_core import compile

    candidates = compile.settings(spec, options.engines)
    patches = compile.sample(spec, options.patches)
    with tqdm(total=compile.steps(candidates), unit="step", desc="compile", disable=None) as bar:
        measurements = compile.measure(spec, candidates, patches, bar.update)
    best, reference = compile.fastest(measurements, options.tolerance), candidates[0]
    print("\n".join(compile.table(measurements, best)))
    print(f"\n► the fastest within {options.tolerance:g} of {reference.engine} {reference.precision}; in the spec:\n")
    print(compile.spec_lines(best.setting))


def ingest_command(options: argparse.Namespace) -> None:
    """Store an image stack as a precomputed layer."""
    from chunkflow_core.geometry import vector
    from chunkflow_core.ingest import ingest, open_stack

    stack = open_stack(options.source)
    with tqdm(total=stack.shape[0], unit="section", desc="ingest", disable=None) as bar:
        ingest(
            stack,
            options.layer,
            resolution=tuple(options.voxel_size),
            chunk=vector(options.chunk_size),
            offset=vector(options.offset),
            overwrite=options.overwrite,
            planes_done=bar.update,
        )
    print(f"{options.layer}: {' × '.join(map(str, stack.shape))} voxels (zyx), {stack.dtype}")


def command(arguments: Sequence[str]) -> None:
    """Parse the arguments and run the subcommand."""
    options = parser().parse_args(arguments)
    set_up_logging(verbose=options.verbose)
    options.function(options)


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="chunkflow-core", description=__doc__, epilog=EXIT_CODES)
    top.add_argument("-v", "--verbose", action="store_true", help="log every step")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, function: object, text: str) -> Parser:
        sub: Parser = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        sub.set_defaults(function=function)
        return sub

    sub = add("run", run, "Run all that is due on this machine, without Airflow, and verify it.")
    add_spec_arguments(sub)
    add_request_arguments(sub)
    sub.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes (default: 1)")
    _add_seams(sub)
    sub = add("plan", plan_command, "Print what would run, and what it costs; changes nothing.")
    add_spec_arguments(sub)
    add_request_arguments(sub)
    sub.add_argument("--json", action="store_true", help="for programs: block indices as [z, y, x]")
    sub = add("prepare", prepare_command, "Check input, model, exchange and output, and make the output layer.")
    add_spec_arguments(sub)
    sub = add("verify", verify_command, "Audit the output: storage chunks, receipts, and seams computed again.")
    add_spec_arguments(sub)
    add_box_argument(sub)
    _add_seams(sub)
    sub.add_argument("--json", action="store_true", help="for programs")
    sub = add("cleanup", cleanup_command, "Delete the donations that nothing needs any more.")
    add_spec_arguments(sub)
    sub = add("report", report_command, "Summarise what is done: blocks, patches, speed, where the time went.")
    add_spec_arguments(sub)
    sub.add_argument("--run", metavar="NAME", help="only what this run has done")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub.add_argument("--picture", type=_png, metavar="FILE.png", help="draw it too: shares of time, tasks, timeline")
    sub = add("picture", picture_command, "Draw a section of input, output and blocks as PNG.")
    add_spec_arguments(sub)
    sub.add_argument("file", metavar="FILE.png")
    sub.add_argument("--z", type=int, help="section (default: the middle)")
    sub = add(
        "compile", compile_command, "Convert the model for its engine, and time every engine that can run it here."
    )
    add_spec_arguments(sub)
    _add_compile(sub)
    sub = add(
        "ingest", ingest_command, "Store a TIFF stack, folder of images, HDF5 dataset or npy as a precomputed layer."
    )
    _add_ingest(sub)
    for point in entry_points(group="chunkflow_core.commands"):
        point.load()(add)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(command, arguments)


def _verify(workspace: object, options: argparse.Namespace) -> None:
    from chunkflow_core.stages import Workspace
    from chunkflow_core.verify import verify

    assert isinstance(workspace, Workspace)
    with progress("verify", options.seams, "seams") as step_done:
        audit = verify(workspace, box=box_of(options, workspace.spec.grid), seams=options.seams, step_done=step_done)
    if options.json:
        print(json.dumps(asdict(audit)))
    else:
        print(
            f"verified: {audit.blocks} blocks, {audit.storage_chunks} storage chunks, {audit.seams} seams computed again: "
            f"{len(audit.findings)} findings"
        )
    if audit.findings:
        shown = audit.findings[:20]
        more = [f"… and {len(audit.findings) - len(shown)} more"] if len(audit.findings) > len(shown) else []
        raise DataError("\n  ".join([f"{workspace.spec.output.path} is not right:", *shown, *more]))


def _add_seams(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--seams", type=_not_negative, default=2, metavar="N", help="seams between blocks to compute again (default: 2)"
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


def _size(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _some(blocks: Sequence[object]) -> str:
    shown = ", ".join(map(str, blocks[:4]))
    return f": {shown}{', …' if len(blocks) > 4 else ''}" if blocks else ""


if __name__ == "__main__":
    sys.exit(main())
