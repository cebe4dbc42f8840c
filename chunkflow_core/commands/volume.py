"""Subcommands of ``chunkflow-core`` on one volume, each beside its arguments.

torch and cloudvolume take seconds to import: each command imports what it needs once its arguments
are right.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from chunkflow_core.commands.arguments import (
    Add,
    add_box_argument,
    add_request_arguments,
    add_spec_arguments,
    box_of,
    not_negative,
    positive,
    spec_of,
)
from chunkflow_core.commands.runs import add_run_arguments, add_take_over, lease_for
from chunkflow_core.errors import DataError, UsageError
from chunkflow_core.progress import progress
from chunkflow_core.variables import concealed

if TYPE_CHECKING:
    from chunkflow_core.lattice.boxes import Box, Vector
    from chunkflow_core.planning.estimate import Estimate
    from chunkflow_core.planning.planner import Plan
    from chunkflow_core.spec import VolumeSpec
    from chunkflow_core.steps.workspace import Workspace


def add_commands(add: Add) -> None:
    """Add the subcommands of this module to the command line."""
    for add_command in (
        _add_run,
        _add_plan,
        _add_repair,
        _add_prepare,
        _add_verify,
        _add_cleanup,
        _add_report,
        _add_picture,
    ):
        add_command(add)


def _add_run(add: Add) -> None:
    parser = add("run", run, "Run all that is due on this machine, without Airflow, and verify it.")
    add_spec_arguments(parser)
    add_request_arguments(parser)
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default: 1)")
    _add_seams(parser)
    _add_other_model(parser)
    add_take_over(parser)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="audit everything that is stored, and do again just what is wrong, instead of what is due",
    )


def run(options: argparse.Namespace) -> None:
    """Prepare, run all that is due, verify, clean up."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    _check_run(options)
    from chunkflow_core.steps.workspace import Workspace

    workspace = Workspace(spec)
    with lease_for(spec, options, "run") as lease:
        workspace.lease = lease
        _run_all(workspace, options, box, lease.run)
    print(f"output: {spec.written('output')}")


def _run_all(workspace: Workspace, options: argparse.Namespace, box: Box | None, name: str) -> None:
    """All that a run of this name has to do."""
    from chunkflow_core.planning.planner import Request, plan
    from chunkflow_core.reports import manifest
    from chunkflow_core.steps.cleanup import cleanup
    from chunkflow_core.steps.prepare import prepare

    spec = workspace.spec
    prepare(workspace, run=name, other=_other_model(options), take_over=options.take_over)
    if options.repair:
        from chunkflow_core.audit.audit import repair

        request = Request(blocks=repair(workspace, box=box, seams=options.seams, seed=options.seed))
    else:
        request = Request(box, force=options.force, check_input=options.check_input)
    due = plan(spec, request, workspace.state(confirm=True))
    print(f"{spec.name}: {len(due.infer)} blocks to infer, {len(due.blend)} to blend, {len(due.up_to_date)} up to date")
    if due.infer or due.blend:
        asked = _asked(options.bbox, force=options.force, check_input=options.check_input, repair=options.repair)
        manifest.begin(spec, name, asked)
        _run(workspace, due, name, options.workers)
        _verify(workspace, box, request.blocks, seams=options.seams, seed=options.seed, run=name)
        manifest.complete(spec, name, workspace.exchange.all_receipts())
    cleanup(spec)


def _check_run(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` if options are given together that have no meaning together."""
    if options.overwrite and options.bbox is not None:
        raise UsageError("--overwrite: does the whole ROI again, so it can't be given with --bbox")
    if options.repair and (options.overwrite or options.accept_mixture):
        raise UsageError("--repair: of another model's output there is nothing to repair; run without it")
    if options.repair and (options.force or options.check_input):
        raise UsageError(
            "--repair: does just what an audit finds wrong, so --force and --check-input have no meaning with it"
        )


def _run(workspace: Workspace, due: Plan, name: str, workers: int) -> None:
    from chunkflow_core.steps.local import run_here, run_in_processes

    spec = workspace.spec
    blocks = [spec.grid.block(index) for index in due.infer]
    with tqdm(total=sum(b.patches for b in blocks), unit="patch", desc="inference", disable=None) as bar:
        alone = workers == 1
        there = partial(run_in_processes, spec, due, name, workers, leased=True)
        done = run_here(workspace, due, name, bar.update) if alone else there()
        ended = {"infer": 0, "blend": 0}
        for (stage, index), receipt in done:
            ended[stage] += 1
            bar.set_postfix_str(
                f"{ended['infer']}/{len(due.infer)} inferred, {ended['blend']}/{len(due.blend)} blended"
            )
            if receipt is not None and not alone:
                bar.update(receipt.patches + sum(receipt.skipped.values()))
            logging.info("%s of block %s done", stage, index)


def _asked(
    bbox: Sequence[int] | None, *, force: bool = False, check_input: bool = False, repair: bool = False
) -> dict[str, object]:
    """What is asked for, for the run's manifest."""
    return {"box": bbox, "force": force, "check_input": check_input, "repair": repair}


def _add_plan(add: Add) -> None:
    parser = add("plan", plan, "Print what would run, and what it costs; runs nothing.")
    add_spec_arguments(parser)
    add_request_arguments(parser)
    _add_plan_output(parser)


def plan(options: argparse.Namespace) -> None:
    """Print what would run, and what it costs."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    from chunkflow_core.planning.planner import Request, plan
    from chunkflow_core.steps.workspace import Workspace

    workspace = Workspace(spec)
    workspace.check_codecs()
    request = Request(box, force=options.force, check_input=options.check_input)
    due = plan(spec, request, workspace.state(confirm=bool(options.run)))
    asked = _asked(options.bbox, force=options.force, check_input=options.check_input)
    _tell_plan(workspace, due, options.run, asked, as_json=options.json)


def _add_repair(add: Add) -> None:
    parser = add("repair", repair, "Audit everything that is stored, undo what is wrong, print what has to run then.")
    add_spec_arguments(parser)
    add_box_argument(parser)
    _add_seams(parser, default=0)
    _add_plan_output(parser)
    add_take_over(parser)


def repair(options: argparse.Namespace) -> None:
    """Undo what is wrong, and print what has to run to make it right."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    from chunkflow_core.audit.audit import repair
    from chunkflow_core.planning.planner import Request, plan
    from chunkflow_core.steps.workspace import Workspace

    workspace = Workspace(spec)
    workspace.check_claim()
    with lease_for(spec, options, "repair") as lease:
        lease.take(take_over=options.take_over)
        undone = repair(workspace, box=box, seams=options.seams, seed=options.seed)
    due = plan(spec, Request(blocks=undone), workspace.state(confirm=True))
    _tell_plan(workspace, due, options.run, _asked(options.bbox, repair=True), as_json=options.json)


def _tell_plan(workspace: Workspace, due: Plan, run: str, asked: dict[str, object], *, as_json: bool) -> None:
    """Print a plan; begin the manifest of the named run if anything is due."""
    from chunkflow_core.planning.estimate import SAMPLE, estimate
    from chunkflow_core.reports import manifest

    spec, exchange = workspace.spec, workspace.exchange
    if run and (due.infer or due.blend):
        manifest.begin(spec, run, asked)
    costs = estimate(spec, due, exchange.some_receipts("infer", SAMPLE), exchange.trial())
    if as_json:
        facts = {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "blocks": spec.grid.shape,
            "roi": asdict(spec.grid.roi),
        }
        lists = {"infer": due.infer, "blend": due.blend, "up_to_date": due.up_to_date}
        why = {"{}_{}_{}".format(*block): reason for block, reason in due.why.items()}
        untold = {"unpublished": [other for other in manifest.unpublished(spec) if other != run]}
        print(json.dumps(facts | lists | {"why": why} | untold | asdict(costs)))
    else:
        print("\n".join(_plan_lines(spec, due, costs)))


def _plan_lines(spec: VolumeSpec, due: Plan, costs: Estimate) -> list[str]:
    """A plan for a terminal."""
    grid = spec.grid
    inferred = [
        f"  {text:<30} {len(blocks)} blocks{_some(blocks)}"
        for reason, text in _REASONS.items()
        if (blocks := [block for block in due.infer if due.why[block] == reason])
    ]
    data = f"{costs.data_bytes / 1e6:.1f} MB of data per inference task"
    if costs.memory_bytes is None:
        memory = f"{data}, besides interpreter and network, which `prepare` measures"
    else:
        memory = f"{costs.memory_bytes / 1e6:.0f} MB per inference task: {data}, the rest interpreter and network"
    known = "unknown before `prepare`" if costs.seconds is None else f"{costs.seconds:.0f} s on one process"
    cut = f"{' × '.join(map(str, grid.shape))} of {_size(spec.block_size)}, storage chunks {_size(spec.storage_chunk)}"
    return [
        f"{spec.name} (fingerprint {spec.fingerprint})",
        f"ROI            {grid.roi}, {grid.roi.voxels / 1e6:.1f} Mvoxel; input {spec.input_bounds}",
        f"blocks         {cut}",
        f"to infer       {len(due.infer)} blocks, {costs.patches} patches{_some(due.infer)}",
        *inferred,
        f"to blend       {len(due.blend)} blocks{_some(due.blend)}",
        f"up to date     {len(due.up_to_date)} blocks",
        f"donations      {costs.donated_bytes / 1e6:.1f} MB before compression",
        f"memory         {memory}",
        f"time           {known}",
    ]


_REASONS = {
    "new": "no valid receipt",
    "input": "input has changed",
    "forced": "forced",
    "donations": "donations are needed again",
}


def _add_prepare(add: Add) -> None:
    parser = add("prepare", prepare, "Check input, model, exchange and output, and make the output layer.")
    add_spec_arguments(parser)
    _add_other_model(parser)
    parser.add_argument("--once", action="store_true", help="try the model only if that has not been done yet")
    add_run_arguments(parser, "name of the run that begins: until `cleanup --run NAME` no other one may")
    add_take_over(parser)
    parser.add_argument(
        "--json", action="store_true", help="for programs: ROI and bounds of the input as [start, stop], zyx"
    )


def prepare(options: argparse.Namespace) -> None:
    """Check everything that can be known beforehand and make the output layer."""
    spec = spec_of(options)
    from chunkflow_core.steps.prepare import prepare
    from chunkflow_core.steps.workspace import Workspace

    workspace = Workspace(spec)
    with lease_for(spec, options, "prepare") as workspace.lease:
        settings = {"run": options.run, "once": options.once, "take_over": options.take_over}
        trial = prepare(workspace, other=_other_model(options), **settings)
    if options.json:
        print(json.dumps({"roi": spec.grid.roi.corners, "input_bounds": spec.input_bounds.corners} | asdict(trial)))
    else:
        print(f"{spec.name}: ready; a patch takes {trial.seconds:.3f} s, {trial.streams} at a time")


def _add_verify(add: Add) -> None:
    parser = add("verify", verify, "Audit the output: storage chunks, receipts, and windows computed again.")
    add_spec_arguments(parser)
    add_box_argument(parser)
    _add_seams(parser)
    parser.add_argument("--begun", action="store_true", help="pass over blocks that were never begun")
    parser.add_argument(
        "--deep", action="store_true", help="read all storage chunks and donations, and compare checksums"
    )
    parser.add_argument("--run", default="", metavar="NAME", help="prefer seams of what this run has done")
    parser.add_argument("--json", action="store_true", help="for programs")


def verify(options: argparse.Namespace) -> None:
    """Audit the output; ``DataError`` with advice if anything is wrong."""
    spec = spec_of(options)
    from chunkflow_core.steps.workspace import Workspace

    _verify(
        Workspace(spec),
        box_of(options, spec.grid),
        seams=options.seams,
        seed=options.seed,
        deep=options.deep,
        run=options.run,
        begun=options.begun,
        as_json=options.json,
    )


def _verify(
    workspace: Workspace,
    box: Box | None,
    blocks: Collection[Vector] | None = None,
    *,
    seams: int,
    seed: int | None,
    deep: bool = False,
    run: str = "",
    begun: bool = False,
    as_json: bool = False,
) -> None:
    from chunkflow_core.audit.audit import verify

    grid = workspace.spec.grid
    audited = len(grid.blocks_touching(box or grid.roi) if blocks is None else blocks)
    with progress("verify", audited + seams, "steps") as step_done:
        audit = verify(
            workspace, box=box, blocks=blocks, seams=seams, seed=seed, deep=deep, run=run, step_done=step_done
        )
    if begun:
        audit.findings = [finding for finding in audit.findings if finding.kind != "not done"]
    if as_json:
        print(json.dumps(concealed(asdict(audit))))
    else:
        print(
            f"verified: {audit.blocks} blocks, {audit.storage_chunks} storage chunks, "
            f"{audit.seams} windows computed again{f' (seed {audit.seed})' * (audit.seams > 0)}: "
            f"{len(audit.findings)} findings"
        )
    if audit.findings:
        from chunkflow_core.audit.audit import advice

        raise DataError(advice(audit, workspace.spec))


def _add_cleanup(add: Add) -> None:
    parser = add("cleanup", cleanup, "Delete the donations that nothing needs any more.")
    add_spec_arguments(parser)
    add_run_arguments(parser, "name of the run that ends with this: the next one may begin (default: none ends)")
    add_take_over(parser)


def cleanup(options: argparse.Namespace) -> None:
    """Delete the donations that have been used."""
    spec = spec_of(options)
    from chunkflow_core.steps.cleanup import cleanup

    with lease_for(spec, options, "cleanup", ends=True) as lease:
        lease.take(take_over=options.take_over)
        number, policy = cleanup(spec), spec.exchange.donations
    kept = policy if isinstance(policy, str) else f"kept for {policy.days:g} days"
    print(f"{spec.name}: {number} donations deleted (exchange.donations: {kept})")


def _add_report(add: Add) -> None:
    parser = add("report", report, "Summarise what is done: blocks, patches, speed, where the time went.")
    add_spec_arguments(parser)
    parser.add_argument("--run", metavar="NAME", help="only what this run has done")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--picture", type=_png, metavar="FILE.png", help="draw it too: shares of time, tasks, timeline")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="complete the manifest of the run beside the output, draw the picture there, and print everything as JSON",
    )


def report(options: argparse.Namespace) -> None:
    """Print a summary of what is done, or publish that of a run."""
    spec = spec_of(options)
    from chunkflow_core.exchange.folder import Exchange
    from chunkflow_core.reports.figures import lines, report_of, tally_of

    if options.publish:
        if not options.run or options.picture:
            raise UsageError("--publish: needs --run, the run to be published, and draws its picture beside the output")
        from chunkflow_core.reports.publication import publish

        print(json.dumps(publish(spec, options.run)))
        return
    exchange = Exchange(spec)
    tally = tally_of(spec, exchange.all_receipts(), run=options.run)
    report = report_of(spec, exchange.path, tally)
    if options.picture:
        from chunkflow_core.reports.chart import draw_chart

        try:
            draw_chart(report, tally.tasks, options.picture)
        except OSError as error:
            raise UsageError(f"{options.picture}: can't be written: {error.strerror}") from error
    print(json.dumps(asdict(report)) if options.json else "\n".join(lines(report)))


def _add_picture(add: Add) -> None:
    parser = add("picture", picture, "Draw a section of input, output and blocks as PNG.")
    add_spec_arguments(parser)
    parser.add_argument("file", type=_png, metavar="FILE.png")
    parser.add_argument("--z", type=int, help="section (default: the middle)")


def picture(options: argparse.Namespace) -> None:
    """Draw one section of input, output and blocks."""
    spec, file = spec_of(options), options.file
    low, high = spec.grid.roi.start[0], spec.grid.roi.stop[0]
    if options.z is not None and not low <= options.z < high:
        raise UsageError(f"--z: there is no section {options.z}; the ROI has {low} to {high - 1}")
    from chunkflow_core.reports.section import draw_section
    from chunkflow_core.steps.workspace import Workspace

    try:
        draw_section(Workspace(spec), file, z=options.z)
    except OSError as error:
        raise UsageError(f"{file}: can't be written: {error.strerror}") from error
    print(file)


def _add_seams(parser: argparse.ArgumentParser, default: int = 2) -> None:
    parser.add_argument(
        "--seams",
        type=not_negative,
        default=default,
        metavar="N",
        help=f"windows to compute again, most of them at seams between blocks (default: {default})",
    )
    parser.add_argument(
        "--seed",
        type=not_negative,
        metavar="N",
        help="choose the windows as an audit has that printed this seed (default: drawn anew each time)",
    )


def _add_plan_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: block indices as [z, y, x]")
    parser.add_argument(
        "--run",
        default="",
        metavar="NAME",
        help="begin the manifest of this run beside the output, if anything is due",
    )


def _add_other_model(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--overwrite",
        action="store_true",
        help="if the output is of another model: do the whole ROI again, in its place",
    )
    ways.add_argument(
        "--accept-mixture",
        action="store_true",
        help="if the output is of another model: let blocks of both stand side by side, noted in the layer's "
        "provenance",
    )


def _other_model(options: argparse.Namespace) -> Literal["refuse", "overwrite", "mixture"]:
    if options.overwrite:
        return "overwrite"
    return "mixture" if options.accept_mixture else "refuse"


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .png")
    return Path(text)


def _size(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _some(blocks: Sequence[object]) -> str:
    shown = ", ".join(map(str, blocks[:4]))
    return f": {shown}{', …' if len(blocks) > 4 else ''}" if blocks else ""
