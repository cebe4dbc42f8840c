"""The whole pipeline on one machine: a volume goes through a real Airflow, and is verified.

    python examples/demo.py [--input LAYER --roi Z0,Y0,X0,Z1,Y1,X1]

Everything it makes is in the folder ``.demo``. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sample_volume import write_sample
from tqdm import tqdm

from chunkflow_core.commands.arguments import Parser, run_command
from chunkflow_core.errors import ChunkflowError, UsageError
from chunkflow_core.exchange.folder import Exchange
from chunkflow_core.reports.figures import report_of, tally_of
from chunkflow_core.spec import VolumeSpec, load_spec
from chunkflow_core.steps.workspace import Workspace
from operators.commands import SELECT, infer_task_id
from operators.service import Client, Service, start

EXAMPLES = Path(__file__).resolve().parent
SAMPLE_SHAPE = (28, 416, 416)
POLL = 1.0
"""Seconds between looks at the run."""
FINISHED = ("success", "failed")


class DemoError(ChunkflowError):
    """The run did not end well."""


def demo(arguments: Sequence[str]) -> None:
    """Make the volume and the spec, run the DAG, show what came out."""
    options = parse(arguments)
    home = options.home.resolve()
    spec_file = write_spec(home, options)
    spec = load_spec(spec_file)
    started = time.monotonic()
    print(f"volume    {spec.input.path}, {spec.grid.roi}, {' × '.join(map(str, spec.grid.shape))} blocks")
    print("airflow   starting …", flush=True)
    environment = {"CHUNKFLOW_VOLUMES": str(home / "volumes")}
    with start(home / "airflow", environment=environment, with_parent=True) as service, Client(service) as client:
        print(f"airflow   {service.url}/dags/{spec.name}  log in as {service.username}, password {service.password}")
        run = begin(client, spec)
        state = follow(client, spec, run)
        report_failures(client, spec, run, state)
        show(spec, home, service, run, time.monotonic() - started)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    parser = Parser(prog="demo", description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(".demo"), help="folder for everything (default: .demo)")
    parser.add_argument("--input", help="a layer of yours instead of the sample, any path that CloudVolume reads")
    parser.add_argument("--mip", type=int, default=0, help="of the input layer (default: 0)")
    parser.add_argument("--roi", help="region of interest as Z0,Y0,X0,Z1,Y1,X1 in voxels; needed with --input")
    options = parser.parse_args(arguments)
    if bool(options.input) != bool(options.roi):
        parser.error("--input and --roi (INPUT= and ROI= of make demo) belong together")
    return options


def write_spec(home: Path, options: argparse.Namespace) -> Path:
    """Write the volume spec, and the sample volume if there is none."""
    text = (EXAMPLES / "demo.yaml").read_text()
    text = text.replace("${CHUNKFLOW_DEMO}", str(home)).replace("${CHUNKFLOW_EXAMPLES}", str(EXAMPLES))
    data = yaml.safe_load(text)
    if options.input:
        use_layer(data, home, options)
    elif not (home / "data" / "em" / "provenance").exists():
        print("volume    making a sample …", flush=True)
        partial = home / "data" / "em.partial"
        write_sample(f"file://{partial}", SAMPLE_SHAPE)
        partial.rename(home / "data" / "em")
    file: Path = home / "volumes" / f"{data['name']}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def use_layer(data: dict[str, Any], home: Path, options: argparse.Namespace) -> None:
    """Let the spec name the user's layer; its output gets a folder of its own."""
    try:
        numbers = [int(text) for text in options.roi.split(",")]
        start, stop = numbers[:3], numbers[3:]
        if len(stop) != 3:
            raise ValueError
    except ValueError:
        raise UsageError(f"ROI={options.roi}: expected six numbers, Z0,Y0,X0,Z1,Y1,X1") from None
    name = f"demo-{hashlib.sha256(f'{options.input} {options.mip} {options.roi}'.encode()).hexdigest()[:8]}"
    data["name"], data["roi"] = name, [start, stop]
    data["input"] = {"path": options.input, "mip": options.mip, "fill_missing": True}
    data["output"]["path"] = f"file://{home}/data/{name}"


def begin(client: Client, spec: VolumeSpec) -> str:
    """Trigger the DAG, or find the run that an interrupted demo left; return the run's id."""
    dag = f"dags/{spec.name}"
    wait_for_dag(client, spec)
    for run in client.get(f"{dag}/dagRuns", state=["running", "queued"])["dag_runs"]:
        print(f"run       going on with {run['dag_run_id']}")
        return str(run["dag_run_id"])
    run = client.post(f"{dag}/dagRuns", {"logical_date": None, "conf": {}})
    return str(run["dag_run_id"])


def wait_for_dag(client: Client, spec: VolumeSpec) -> None:
    """Wait until Airflow has parsed the spec; ``DemoError`` with Airflow's message if it can't."""
    while True:
        dags = {dag["dag_id"] for dag in client.pages("dags", "dags")}
        if spec.name in dags:
            return
        errors = client.get("importErrors")["import_errors"]
        if errors:
            raise DemoError(f"Airflow can't use the spec: {errors[0]['stack_trace']}")
        time.sleep(POLL)


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    state: str
    known: bool
    """Whether it is decided what is due in this run; before, all numbers are 0."""
    inferred: int
    to_infer: int
    blended: int
    to_blend: int
    patches: int
    """Patches done since the run began."""
    all_patches: int
    """Patches to do in this run."""

    @property
    def text(self) -> str:
        """The progress in words."""
        if not self.known:
            return "looking for what is due"
        if not self.to_infer and not self.to_blend:
            return "nothing is due, everything is up to date"
        return f"{self.inferred}/{self.to_infer} blocks inferred, {self.blended}/{self.to_blend} blended"


def follow(client: Client, spec: VolumeSpec, run: str) -> str:
    """Show a run's progress until it ends; return its state.

    Patches are shown as a bar if this is a terminal.
    """
    bar, shown = None, ""
    for progress in look(client, spec, run):
        if bar is None and progress.all_patches and sys.stderr.isatty():
            bar = tqdm(unit="patch", desc="inference", smoothing=0.1)
        if bar is not None:
            bar.total = progress.all_patches
            bar.set_postfix_str(progress.text, refresh=False)
            bar.update(progress.patches - bar.n)
            bar.refresh()
        elif progress.text != shown:
            patches = f", {progress.patches}/{progress.all_patches} patches" if progress.all_patches else ""
            print(f"progress  {progress.text}{patches}", flush=True)
            shown = progress.text
        if progress.state in FINISHED:
            if bar is not None:
                bar.close()
            return progress.state
        time.sleep(POLL)
    raise AssertionError("a run ends")


def look(client: Client, spec: VolumeSpec, run: str) -> Iterator[Progress]:
    """Look at a run again and again."""
    path = f"dags/{spec.name}/dagRuns/{run}"
    while True:
        state = client.get(path)["state"]
        tasks = {task["task_id"]: task["state"] for task in client.pages(f"{path}/taskInstances", "task_instances")}
        yield progress_of(spec, state, tasks)


def progress_of(spec: VolumeSpec, state: str, tasks: Mapping[str, str | None]) -> Progress:
    """How far a run is, given its state and that of its tasks by name.

    Blocks are counted by Airflow's word, patches by the blocks' sizes.
    """
    known = tasks.get(SELECT) == "success"  # what is not due is skipped from then on
    due = {task: at for task, at in tasks.items() if known and at != "skipped"}
    size = {infer_task_id(index): spec.grid.block(index).patches for index in spec.grid.indices()}
    infer = {task: at for task, at in due.items() if task in size}
    blend = [at for task, at in due.items() if task.startswith("blend.")]
    return Progress(
        state=state,
        known=known,
        inferred=sum(at == "success" for at in infer.values()),
        to_infer=len(infer),
        blended=blend.count("success"),
        to_blend=len(blend),
        patches=sum(size[task] for task, at in infer.items() if at == "success"),
        all_patches=sum(size[task] for task in infer),
    )


def report_failures(client: Client, spec: VolumeSpec, run: str, state: str) -> None:
    """Raise ``DemoError`` naming the tasks that failed.

    It is not raised where every task succeeded or had nothing to do.
    """
    path = f"dags/{spec.name}/dagRuns/{run}/taskInstances"
    tasks = list(client.pages(path, "task_instances"))
    failed = [task["task_id"] for task in tasks if task["state"] not in ("success", "skipped")]
    if state != "success" or failed:
        raise DemoError(
            f"the run {run} ended as {state}; not done: {', '.join(failed)}. Their logs are in Airflow's UI"
        )


def show(spec: VolumeSpec, home: Path, service: Service, run: str, seconds: float) -> None:
    """Draw the picture and say where everything is."""
    from chunkflow_core.reports.section import draw_section

    picture = home / f"{spec.name}.png"
    draw_section(Workspace(spec), picture)
    exchange = Exchange(spec)
    report = report_of(spec, exchange.path, tally_of(spec, exchange.all_receipts(), run=run))
    done = f"{report.inferred} blocks inferred, {report.blended} blended, {report.patches} patches in this run"
    verified = f"every storage chunk is there, receipts agree, seams are exact; {done}"
    rows = {
        "verified": verified if report.inferred or report.blended else "nothing was due: see the run that did it",
        "picture": str(picture),
        "volume": spec.output.path,
        "logs": str(service.home / "logs"),
        "time": f"{seconds:.0f} s",
        "airflow": f"{service.url}, stopped now; `make airflow` starts it again to look around: "
        f"log in as {service.username}, password {service.password}",
    }
    print("\n".join(f"{name:<10}{value}" for name, value in rows.items()))


def main() -> int:
    """Run the command; returns the exit code."""
    return run_command(demo, None)


if __name__ == "__main__":
    sys.exit(main())
