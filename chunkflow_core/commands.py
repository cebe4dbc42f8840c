"""What the subcommands of ``chunkflow-core`` do, given their parsed options.

torch and cloudvolume take seconds to import: each command imports what it needs once its arguments are right.
"""

from __future__ import annotations

import argparse
import json
import logging
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from chunkflow_core.commandline import box_of, spec_of
from chunkflow_core.errors import DataError, UsageError
from chunkflow_core.progress import progress

if TYPE_CHECKING:
    from chunkflow_core.lattice.boxes import Box, Vector
    from chunkflow_core.planning.planner import Plan
    from chunkflow_core.steps.stages import Workspace


def run(options: argparse.Namespace) -> None:
    """Prepare, run all that is due, verify, clean up."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    if options.overwrite and box is not None:
        raise UsageError("--overwrite: does the whole ROI again, so it can't be given with --bbox")
    if options.repair and (options.overwrite or options.accept_mixture):
        raise UsageError("--repair: of another model's output there is nothing to repair; run without it")
    if options.repair and (options.force or options.check_input):
        raise UsageError(
            "--repair: does just what an audit finds wrong, so --force and --check-input have no meaning with it"
        )
    from chunkflow_core.planning.planner import Request, plan
    from chunkflow_core.reports import manifest
    from chunkflow_core.steps.cleanup import cleanup
    from chunkflow_core.steps.prepare import prepare
    from chunkflow_core.steps.stages import Workspace

    workspace, name = Workspace(spec), f"run-{uuid.uuid4().hex[:12]}"
    prepare(workspace, run=name, other=_other(options))
    if options.repair:
        from chunkflow_core.audit.audit import repair

        request = Request(blocks=repair(workspace, box=box, seams=options.seams))
    else:
        request = Request(box, force=options.force, check_input=options.check_input)
    due = plan(spec, request, workspace.state())
    print(f"{spec.name}: {len(due.infer)} blocks to infer, {len(due.blend)} to blend, {len(due.up_to_date)} up to date")
    if due.infer or due.blend:
        manifest.begin(spec, name, _request(options))
        _run(workspace, due, name, options)
        options.json, options.run, options.deep, options.begun = False, name, False, False
        _verify(workspace, options, box, request.blocks)
        manifest.complete(spec, name, workspace.exchange.all_receipts())
    cleanup(spec)
    print(f"output: {spec.output.path}")


def _run(workspace: Workspace, due: Plan, name: str, options: argparse.Namespace) -> None:
    from chunkflow_core.steps.local import run_here, run_in_processes

    spec = workspace.spec
    blocks = [spec.grid.block(index) for index in due.infer]
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


def _request(options: argparse.Namespace) -> dict[str, object]:
    """What is asked for, for the run's manifest."""
    return {
        "box": options.bbox,
        "force": options.force,
        "check_input": options.check_input,
        "repair": getattr(options, "repair", False),
    }


def plan(options: argparse.Namespace) -> None:
    """Print what would run."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    from chunkflow_core.planning.planner import Request, plan
    from chunkflow_core.steps.stages import Workspace

    workspace = Workspace(spec)
    due = plan(spec, Request(box, force=options.force, check_input=options.check_input), workspace.state())
    _print_plan(workspace, due, options)


def repair(options: argparse.Namespace) -> None:
    """Undo what is wrong, and print what has to run to make it right."""
    spec = spec_of(options)
    box = box_of(options, spec.grid)
    from chunkflow_core.audit.audit import repair
    from chunkflow_core.planning.planner import Request, plan
    from chunkflow_core.steps.stages import Workspace

    workspace = Workspace(spec)
    harmed = repair(workspace, box=box, seams=options.seams)
    options.force, options.check_input, options.repair = False, False, True
    _print_plan(workspace, plan(spec, Request(blocks=harmed), workspace.state()), options)


def _print_plan(workspace: Workspace, due: Plan, options: argparse.Namespace) -> None:
    from chunkflow_core.planning.estimate import SAMPLE, estimate
    from chunkflow_core.reports import manifest

    spec, exchange, grid = workspace.spec, workspace.exchange, workspace.spec.grid
    if options.run and (due.infer or due.blend):
        manifest.begin(spec, options.run, _request(options))
    costs = estimate(spec, due, exchange.some_receipts("infer", SAMPLE), exchange.trial())
    if options.json:
        facts = {"name": spec.name, "fingerprint": spec.fingerprint, "blocks": grid.shape, "roi": asdict(grid.roi)}
        lists = {"infer": due.infer, "blend": due.blend, "up_to_date": due.up_to_date}
        why = {"{}_{}_{}".format(*block): reason for block, reason in due.why.items()}
        untold = {"unpublished": [run for run in manifest.unpublished(spec) if run != options.run]}
        print(json.dumps(facts | lists | {"why": why} | untold | asdict(costs)))
        return
    print(f"{spec.name} (fingerprint {spec.fingerprint})")
    print(f"ROI            {grid.roi}, {grid.roi.voxels / 1e6:.1f} Mvoxel; input {spec.input_bounds}")
    print(
        f"blocks         {' × '.join(map(str, grid.shape))} of {_size(spec.block_size)}, storage chunks {_size(spec.storage_chunk)}"
    )
    print(f"to infer       {len(due.infer)} blocks, {costs.patches} patches{_some(due.infer)}")
    for reason, text in _REASONS.items():
        blocks = [block for block in due.infer if due.why[block] == reason]
        if blocks:
            print(f"  {text:<30} {len(blocks)} blocks{_some(blocks)}")
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


_REASONS = {
    "new": "no valid receipt",
    "input": "input has changed",
    "forced": "forced",
    "donations": "donations are needed again",
}


def prepare(options: argparse.Namespace) -> None:
    """Check everything that can be known beforehand and make the output layer."""
    spec = spec_of(options)
    from chunkflow_core.steps.prepare import prepare
    from chunkflow_core.steps.stages import Workspace

    trial = prepare(Workspace(spec), run=options.run, other=_other(options), once=options.once)
    if options.json:
        print(json.dumps({"roi": spec.grid.roi.corners, "input_bounds": spec.input_bounds.corners} | asdict(trial)))
    else:
        print(f"{spec.name}: ready; a patch takes {trial.seconds:.3f} s, {trial.streams} at a time")


def _other(options: argparse.Namespace) -> Literal["refuse", "overwrite", "mixture"]:
    if options.overwrite:
        return "overwrite"
    return "mixture" if options.accept_mixture else "refuse"


def verify(options: argparse.Namespace) -> None:
    """Audit the output."""
    spec = spec_of(options)
    from chunkflow_core.steps.stages import Workspace

    _verify(Workspace(spec), options, box_of(options, spec.grid))


def cleanup(options: argparse.Namespace) -> None:
    """Delete donations that nothing needs any more."""
    spec = spec_of(options)
    from chunkflow_core.steps.cleanup import cleanup

    number, policy = cleanup(spec), spec.exchange.donations
    kept = policy if isinstance(policy, str) else f"kept for {policy.days:g} days"
    print(f"{spec.name}: {number} donations deleted (exchange.donations: {kept})")


def report(options: argparse.Namespace) -> None:
    """Summarise what is done."""
    spec = spec_of(options)
    from chunkflow_core.exchange.folder import Exchange
    from chunkflow_core.reports.figures import lines, of_run, report_of, tasks_of

    if options.publish:
        if not options.run or options.picture:
            raise UsageError("--publish: needs --run, the run to be published, and draws its picture beside the output")
        from chunkflow_core.reports.publication import publish

        print(json.dumps(publish(spec, options.run)))
        return
    exchange = Exchange(spec)
    tasks = tasks_of(spec, exchange.all_receipts())
    report = report_of(spec, exchange.path, tasks, run=options.run)
    if options.picture:
        from chunkflow_core.reports.chart import draw

        try:
            draw(report, of_run(tasks, options.run), options.picture)
        except OSError as error:
            raise UsageError(f"{options.picture}: can't be written: {error.strerror}") from error
    print(json.dumps(asdict(report)) if options.json else "\n".join(lines(report)))


def picture(options: argparse.Namespace) -> None:
    """Draw one section of input, output and blocks."""
    spec, file = spec_of(options), Path(options.file)
    low, high = spec.grid.roi.start[0], spec.grid.roi.stop[0]
    if options.z is not None and not low <= options.z < high:
        raise UsageError(f"--z: there is no section {options.z}; the ROI has {low} to {high - 1}")
    if file.suffix.lower() != ".png":
        raise UsageError(f"{file}: expected a name that ends in .png")
    from chunkflow_core.reports.section import draw
    from chunkflow_core.steps.stages import Workspace

    try:
        draw(Workspace(spec), file, z=options.z)
    except OSError as error:
        raise UsageError(f"{file}: can't be written: {error.strerror}") from error
    print(file)


def compile(options: argparse.Namespace) -> None:
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


def ingest(options: argparse.Namespace) -> None:
    """Store an image stack as a precomputed layer."""
    from chunkflow_core.lattice.boxes import vector
    from chunkflow_core.storage.ingest import ingest, open_stack

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


def _verify(
    workspace: Workspace, options: argparse.Namespace, box: Box | None, blocks: Collection[Vector] | None = None
) -> None:
    from chunkflow_core.audit.audit import verify

    grid = workspace.spec.grid
    audited = len(grid.blocks_touching(box or grid.roi) if blocks is None else blocks)
    with progress("verify", audited + options.seams, "steps") as step_done:
        audit = verify(
            workspace,
            box=box,
            blocks=blocks,
            seams=options.seams,
            deep=options.deep,
            run=options.run or "",
            step_done=step_done,
        )
    if options.begun:
        audit.findings = [finding for finding in audit.findings if finding.kind != "not done"]
    if options.json:
        print(json.dumps(asdict(audit)))
    else:
        print(
            f"verified: {audit.blocks} blocks, {audit.storage_chunks} storage chunks, {audit.seams} seams computed again: "
            f"{len(audit.findings)} findings"
        )
    if audit.findings:
        from chunkflow_core.audit.audit import advice

        raise DataError(advice(audit, workspace.spec))


def _size(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _some(blocks: Sequence[object]) -> str:
    shown = ", ".join(map(str, blocks[:4]))
    return f": {shown}{', …' if len(blocks) > 4 else ''}" if blocks else ""
